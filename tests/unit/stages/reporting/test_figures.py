"""Figures: what stands in the axes against independent computation; the folder that the stage writes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from mpl_toolkits.mplot3d import Axes3D
from torch import Tensor

from kurtail_pl.cli import verbs
from kurtail_pl.errors import ArtefactError, ConfigError, StoreMismatch
from kurtail_pl.maths.sensitivity import Sensitivity
from kurtail_pl.stages.reporting.figures import Pages, figures
from kurtail_pl.stages.reporting.figures.histogram import BINS, densities, draw_histogram
from kurtail_pl.stages.reporting.figures.kurtosis import draw_kurtosis_by_layer
from kurtail_pl.stages.reporting.figures.reduction import Reductions
from kurtail_pl.stages.reporting.figures.sensitivity import draw_sensitivity
from kurtail_pl.stages.reporting.figures.style import COLOURS, HADAMARD, VANILLA
from kurtail_pl.stages.reporting.figures.surface import draw_surfaces, patches
from kurtail_pl.storage.activations import ActivationStore, block_sites
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.surgery.rotations import Rotations

METHODS = (VANILLA, HADAMARD, "kurtail")
SITE = "layer007.ffn_in"


def heavy(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).pow(3)


def of_methods(*shape: int) -> dict[str, Tensor]:
    return {method: (3 - place) * heavy(*shape, seed=place) for place, method in enumerate(METHODS)}


def assert_legend_is_off_the_axes(figure: Figure) -> None:
    """Of the methods, in their order, and above every axes."""
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(METHODS)
    top = max(axes.get_window_extent().y1 for axes in figure.axes)
    assert legend.get_window_extent().y0 > top
    assert figure.bbox.y1 >= legend.get_window_extent().y1


def labels(axes: Any) -> tuple[str, ...]:
    return tuple(getattr(axes, f"get_{name}label")() for name in axes._axis_names)


@pytest.mark.parametrize("shape", [(512, 576), (130, 100), (65, 73), (64, 72), (5, 7), (100, 3)])
def test_patches_keep_every_maximum(shape: tuple[int, int]) -> None:
    magnitude = heavy(*shape).abs()
    magnitude[shape[0] // 2, shape[1] // 3] = 1000.0
    pooled, x = patches(magnitude), magnitude.numpy()
    rows, columns = min(shape[0], 64), min(shape[1], 72)
    assert pooled.shape == (rows, columns)
    ordered = x[np.argsort(x.max(1), kind="stable")]
    # Patch i of n covers the places from floor(i m / n) to ceil((i + 1) m / n).
    for row in range(rows):
        first, last = row * shape[0] // rows, -(-(row + 1) * shape[0] // rows)
        assert pooled[row].max().item() == ordered[first:last].max()
    for column in range(columns):
        first, last = column * shape[1] // columns, -(-(column + 1) * shape[1] // columns)
        assert pooled[:, column].max().item() == x[:, first:last].max()
    assert pooled[-1].max() == 1000.0


def test_surfaces_share_their_scale_and_have_a_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[np.ndarray] = []
    plot_surface = Axes3D.plot_surface

    def watched(axes: Axes3D, x: np.ndarray, y: np.ndarray, z: np.ndarray, **style: Any) -> Any:
        heights.append(z)
        return plot_surface(axes, x, y, z, **style)

    monkeypatch.setattr(Axes3D, "plot_surface", watched)
    before, after = 9 * heavy(40, 30).abs(), heavy(40, 30, seed=1).abs()
    figure = draw_surfaces(before, after, "kurtail", SITE)
    limits = [axes.get_zlim() for axes in figure.axes]
    assert limits[0] == limits[1]
    assert limits[0][0] == 0
    assert before.max() < limits[0][1] < 1.2 * before.max()
    assert [axes.get_title() for axes in figure.axes] == ["vanilla", "kurtail"]
    assert "FFN, layer 7" in figure.get_suptitle()
    for axes, magnitude in zip(figure.axes, (before, after), strict=True):
        assert all(labels(axes))
        assert axes.zz_dataLim.intervalx[1] == pytest.approx(magnitude.max().item())
        surface, sheet = heights.pop(0), heights.pop(0)
        ordered = magnitude.numpy()[np.argsort(magnitude.numpy().max(1))]
        np.testing.assert_array_equal(surface, ordered)
        np.testing.assert_array_equal(sheet, np.repeat(ordered.max(1, keepdims=True), 30, axis=1))
        assert to_hex(axes.collections[0].get_facecolor()[0]) != to_hex(axes.collections[1].get_facecolor()[0])
        assert 0 < (axes.collections[1].get_alpha() or 1) < 1


def test_sensitivity_lines_are_the_curves() -> None:
    fractions = torch.linspace(0.5, 2, 7)
    curves = {
        method: Sensitivity(torch.tensor(0.1), torch.tensor(0.2), values.abs())
        for method, values in of_methods(7).items()
    }
    figure = draw_sensitivity(curves, fractions, SITE, bits=4)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    for method, colour in zip(METHODS, COLOURS, strict=False):
        assert lines[method].get_xdata() == pytest.approx(fractions.tolist())
        assert lines[method].get_ydata() == pytest.approx(curves[method].growth.tolist())
        assert lines[method].get_color() == colour
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] > max(curve.growth.max() for curve in curves.values())
    assert all(labels(axes))
    assert axes.get_title() == "input of FFN, layer 7, 4 bits"
    assert_legend_is_off_the_axes(figure)


def test_kurtosis_bars_end_at_the_values() -> None:
    values = {method: 1.2 + tensor.abs() for method, tensor in of_methods(5, 2).items()}
    figure = draw_kurtosis_by_layer(values)
    for block, axes in enumerate(figure.axes):
        assert axes.get_yscale() == "log"
        assert [line.get_ydata()[0] for line in axes.lines] == [1.8, 3.0]
        assert axes.get_ylabel() == f"kurtosis, input of {('MHSA', 'FFN')[block]}"
        places = []
        for tensor, bars, colour in zip(values.values(), axes.containers, COLOURS, strict=False):
            tops = [bar.get_y() + bar.get_height() for bar in bars]
            assert tops == pytest.approx(tensor[:, block].tolist())
            assert {to_hex(bar.get_facecolor()).upper() for bar in bars} == {colour}
            places += [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
        places.sort()
        assert all(left[1] <= right[0] + 1e-9 for left, right in pairwise(places))
    assert figure.axes[-1].get_xlabel() == "layer"
    assert_legend_is_off_the_axes(figure)


def test_histograms_are_numpys_on_common_bins() -> None:
    values = of_methods(50, 20)
    edges, density = densities(values)
    assert edges[0] == -edges[-1] == -max(tensor.abs().max() for tensor in values.values())
    figure = draw_histogram(edges, density, SITE)
    (axes,) = figure.axes
    for (method, tensor), stairs in zip(values.items(), axes.patches, strict=True):
        expected, _ = np.histogram(tensor.double().numpy(), edges.numpy(), density=True)
        assert density[method].tolist() == pytest.approx(expected.tolist())
        drawn = stairs.get_data()
        assert drawn.values.tolist() == pytest.approx(expected.tolist())
        assert len(drawn.edges) == BINS + 1
    assert axes.get_yscale() == "log"
    assert all(labels(axes))
    assert_legend_is_off_the_axes(figure)


def share(first: Tensor, second: Tensor) -> float:
    return float(np.mean(np.abs(first.numpy()).max(-1) < np.abs(second.numpy()).max(-1)))


def test_the_table_of_reductions() -> None:
    sites = {site: of_methods(30, 8) for site in ("layer000.attn_in", "layer000.ffn_in", "layer001.attn_in")}
    for number, views in enumerate(sites.values()):
        views["kurtail"] = views["kurtail"] * (number + 1)
    table = Reductions("kurtail")
    for site, views in sites.items():
        table.update(site, views)
    table.update("layer001.ffn_in", sites["layer000.ffn_in"])
    found = table.to_dict()
    assert list(found) == ["kurtail_over_vanilla", "hadamard_over_vanilla", "kurtail_over_hadamard"]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.markdown().splitlines()]
    assert lines[0] == ["smaller maximum", "MHSA", "FFN"]
    for (comparison, rates), line in zip(found.items(), lines[2:], strict=True):
        first, second = comparison.split("_over_")
        each = {site: share(views[first], views[second]) for site, views in sites.items()}
        attention = (each["layer000.attn_in"] + each["layer001.attn_in"]) / 2
        assert rates["MHSA"] == pytest.approx(attention)
        assert rates["FFN"] == pytest.approx(each["layer000.ffn_in"])
        assert rates["sites"] == pytest.approx({**each, "layer001.ffn_in": each["layer000.ffn_in"]})
        assert line[1:] == [f"{100 * rates[block]:.2f} %" for block in ("MHSA", "FFN")]
    assert [line[0] for line in lines[2:]] == [
        "kurtail over vanilla",
        "hadamard over vanilla",
        "kurtail over hadamard",
    ]


@pytest.fixture(scope="module")
def learned(rotations: Rotations) -> Rotations:
    """Some other orthogonal R1 than the random Hadamard."""
    assert rotations.residual is not None
    residual = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(5)).double()).Q
    return replace(rotations, residual=residual, origin={**rotations.origin, "method": "kurtail"})


@pytest.fixture(scope="module")
def drawn(
    store: ActivationStore, learned: Rotations, rotations: Rotations, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pages, Path]:
    folder = tmp_path_factory.mktemp("figures") / "figures"
    return figures(store, learned, rotations, 1e-6, folder, rows=20), folder


def held_out(store: ActivationStore, bases: Mapping[str, Rotations | None]) -> dict[str, dict[str, np.ndarray]]:
    """The last 20 rows of each site, normed and rotated, in NumPy."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for site in block_sites(4):
        rows = store.read(site, 30, 50).double().numpy()
        rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
        found[site] = {
            name: rows if chosen is None or chosen.residual is None else rows @ chosen.residual.numpy()
            for name, chosen in bases.items()
        }
    return found


def test_numbers_are_those_of_the_held_out_rows(
    drawn: tuple[Pages, Path], store: ActivationStore, learned: Rotations, rotations: Rotations
) -> None:
    pages, folder = drawn
    summary = json.loads((folder / "figures.json").read_text())
    assert summary == json.loads(json.dumps(pages.summary))
    assert (summary["method"], summary["rows"], summary["model"]) == ("kurtail", 20, store.origin.model)
    views = held_out(store, {VANILLA: None, HADAMARD: rotations, "kurtail": learned})
    for method in METHODS:
        kurtosis = [float(scipy.stats.kurtosis(v[method], axis=None, fisher=False)) for v in views.values()]
        assert np.ravel(summary["kurtosis"][method]).tolist() == pytest.approx(kurtosis, rel=1e-4)
    rates = summary["max_reduction"]["kurtail_over_vanilla"]
    for site, view in views.items():
        expected = np.mean(np.abs(view["kurtail"]).max(1) < np.abs(view[VANILLA]).max(1))
        assert rates["sites"][site] == pytest.approx(expected)
    site = views["layer003.ffn_in"]
    curve = summary["layer003.ffn_in"]["sensitivity"]["kurtail"]
    rounded = curve["step"] * np.clip(np.rint(site["kurtail"] / curve["step"]), -8, 7)
    assert curve["error"] == pytest.approx(np.mean((site["kurtail"] - rounded) ** 2), rel=1e-4)
    surface = summary["layer003.ffn_in"]["surface"]
    assert np.max(surface["kurtail"]) == pytest.approx(np.abs(site["kurtail"]).max(), rel=1e-4)
    assert np.max(surface["vanilla"]) == pytest.approx(np.abs(site["vanilla"]).max(), rel=1e-4)


def test_files_and_tags(drawn: tuple[Pages, Path]) -> None:
    """By default layer 1 and, as there is no layer 15, the last one."""
    pages, folder = drawn
    sites = [f"layer{layer:03d}.{block}" for layer in (1, 3) for block in ("attn_in", "ffn_in")]
    kinds = ("surface", "sensitivity", "histogram")
    assert set(pages.figures) == {f"{kind}/{site}" for kind in kinds for site in sites} | {"kurtosis_by_layer"}
    assert set(pages.histograms) == {f"activation/{site}/{method}" for site in sites for method in METHODS}
    assert all(values.numel() <= 65_536 for values in pages.histograms.values())
    assert (folder / "max_reduction.md").read_text() == pages.tables["max_reduction"]
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {f"{tag.replace('/', '-')}.png" for tag in pages.figures}
    assert {path.name for path in folder.iterdir()} == pictures | {"figures.json", "max_reduction.md"}
    for picture in pictures:
        pixels = imread(folder / picture)
        assert pixels.shape[1] == 1300  # 6.5 inches of 200 dots
        assert pixels[..., :3].std() > 0.02


def test_the_same_again(
    drawn: tuple[Pages, Path], store: ActivationStore, learned: Rotations, rotations: Rotations, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    with pytest.raises(ArtefactError, match="--overwrite"):
        figures(store, learned, rotations, 1e-6, drawn[1], rows=20)
    folder.mkdir()
    (folder / "surface-old.png").write_text("of another layer")
    figures(store, learned, rotations, 1e-6, folder, rows=20, overwrite=True)
    for path in drawn[1].iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert len(list(folder.iterdir())) == len(list(drawn[1].iterdir()))


def test_the_method_is_the_rotations_own(
    store: ActivationStore, learned: Rotations, rotations: Rotations, tmp_path: Path
) -> None:
    other = replace(learned, origin={**learned.origin, "method": "spinquant"})
    pages = figures(store, other, rotations, 1e-6, tmp_path / "figures", rows=20, layers=[2])
    assert "spinquant over vanilla" in pages.tables["max_reduction"]
    assert "activation/layer002.attn_in/spinquant" in pages.histograms
    texts = [text.get_text() for text in pages.figures["kurtosis_by_layer"].legends[0].get_texts()]
    assert texts == ["vanilla", "hadamard", "spinquant"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [0, 4]}, "layers has 4"),
        ({"layers": [-1]}, "layers has -1"),
        ({"rows": 51}, "rows is 51"),
        ({"rows": 0}, "rows is 0"),
        ({"rotations": Rotations()}, "there is none"),
        ({"hadamard": Rotations(residual=torch.eye(16))}, "it is 16 wide"),
        ({"rotations": Rotations(residual=torch.diag(torch.tensor([*[1.0] * 47, 0.999])))}, "R1 is not orthogonal"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(
    store: ActivationStore, rotations: Rotations, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"rotations": rotations, "hadamard": rotations, "rows": 20, **change}
    with pytest.raises(ConfigError, match=message):
        figures(store, rms_norm_eps=1e-6, folder=tmp_path / "figures", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_another_model_is_refused(store: ActivationStore, stories: Path, tmp_path: Path) -> None:
    write_rotations(tmp_path / "none.safetensors", Rotations())
    with pytest.raises(StoreMismatch, match="is of a model of other sizes than"):
        verbs.figures(store.folder, tmp_path / "none.safetensors", tmp_path / "drawn", model=str(stories))
