"""Figures at the end of `kurtail fit`, on disk and in TensorBoard, and by their own verb."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.callbacks import Figures, Fusion, RotationWriter, WeightQuantization
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.surgery.rotations import Rotations

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]
SITES = ["layer001.attn_in", "layer001.ffn_in"]
FIGURES = {"kurtosis_by_layer", *(f"{kind}/{s}" for kind in ("surface", "sensitivity", "histogram") for s in SITES)}
HISTOGRAMS = {f"activation/{site}/{method}" for site in SITES for method in ("vanilla", "hadamard", "kurtail")}


def events(place: Path) -> EventAccumulator:
    """What TensorBoard reads of the one run under a folder."""
    (file,) = place.rglob("events.out.tfevents.*")
    accumulator = EventAccumulator(str(file), size_guidance={"images": 0, "histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def pictures(folder: Path) -> set[str]:
    found = list(folder.glob("*.png"))
    assert all(imread(path).shape[1] == 1300 for path in found)
    return {path.stem for path in found}


def test_fit_leaves_figures_in_the_artefact_and_in_tensorboard(kurtail: Kurtail, recipe: Path) -> None:
    place = recipe.parent
    kurtail(place, "fit", "--config", recipe, "--figures.layers", "[1]")
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4" / "figures"
    assert pictures(folder) == {tag.replace("/", "-") for tag in FIGURES}

    board = events(place / "runs")
    tags = board.Tags()
    assert set(tags["images"]) == FIGURES
    assert set(tags["histograms"]) == HISTOGRAMS
    assert all(len(board.Images(tag)) == 1 for tag in FIGURES)
    assert all(len(board.Histograms(tag)) == 1 for tag in HISTOGRAMS)
    summary = json.loads((folder / "figures.json").read_text())
    (text,) = board.Tensors("max_reduction/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert table == (folder / "max_reduction.md").read_text()
    assert f"{100 * summary['max_reduction']['kurtail_over_vanilla']['FFN']:.2f} %" in table
    # 128 rows of 48 channels are fewer than are kept for a histogram: all of them.
    histogram = board.Histograms(f"activation/{SITES[0]}/vanilla")[0].histogram_value
    assert histogram.num == 128 * 48
    rows = load_file(place / "runs" / "store" / f"{SITES[0]}.safetensors")["rows"][-128:].double()
    normed = rows / (rows.square().mean(1, keepdim=True) + 1e-6).sqrt()
    assert histogram.max == pytest.approx(normed.max().item(), rel=1e-5)


def test_the_number_of_tags_does_not_grow_with_the_steps(kurtail: Kurtail, recipe: Path) -> None:
    place = recipe.parent
    tags, shown = [], ("--figures.layers", "[1]")
    for steps in (1, 6):
        runs = f"steps{steps}"
        folders = ("--trainer.default_root_dir", runs, "--quantization.out", f"artifacts/{runs}")
        kurtail(place, "fit", "--config", recipe, "--data.init_args.steps", steps, *shown, *folders)
        found = events(place / runs).Tags()
        tags.append({kind: set(found[kind]) for kind in ("scalars", "images", "histograms", "tensors")})
    assert tags[0] == tags[1]
    assert tags[0]["images"] == FIGURES


def test_without_quantization_and_logger_the_figures_go_to_the_root_and_the_verb_draws_the_same(
    own_trainer: Callable[..., None], kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    place = recipe.parent
    own_trainer(RotationWriter(), Figures(layers=[1]))
    drawn = place / "runs" / "figures"
    assert pictures(drawn) == {tag.replace("/", "-") for tag in FIGURES}
    capsys.readouterr()

    verb = ["figures", "--store", "runs/store", "--rotations", "runs/rotations.safetensors", "--layers", "[1]"]
    kurtail(place, *verb, "--validation_rows", 128, "--out", "again")
    printed = capsys.readouterr().out
    assert printed.startswith((drawn / "max_reduction.md").read_text())
    for path in drawn.iterdir():
        assert (place / "again" / path.name).read_bytes() == path.read_bytes()

    for arguments, message in (
        (["--out", "again"], "--overwrite"),
        (["--out", "new", "--validation_rows", 10**6], "rows is 1000000"),
        (["--out", "new", "--model", "./nowhere"], "nowhere"),
    ):
        with pytest.raises(SystemExit, match="1"):
            kurtail(place, *verb, *arguments)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kurtail ")]
        assert message in line
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("order", "needed"),
    [
        ("Figures RotationWriter", "RotationWriter"),
        ("RotationWriter Fusion Figures WeightQuantization", "WeightQuantization"),
    ],
)
def test_a_wrong_order_is_refused_before_training(
    own_trainer: Callable[..., None], recipe: Path, order: str, needed: str
) -> None:
    text = TextSpec(**yaml.safe_load(recipe.read_text())["quantization"]["text"])
    made = {
        "RotationWriter": RotationWriter(),
        "Fusion": Fusion(),
        "Figures": Figures(layers=[1]),
        "WeightQuantization": WeightQuantization(text=text),
    }
    with pytest.raises(ConfigError, match=f"Figures needs {needed} before it"):
        own_trainer(*(made[name] for name in order.split()))
    assert not (recipe.parent / "runs" / "rotations.safetensors").exists()


def test_a_layer_that_is_not_there_is_refused_before_training(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    with pytest.raises(SystemExit, match="1"):
        kurtail(recipe.parent, "fit", "--config", recipe, "--figures.layers", "[1, 4]")
    assert "layers has 4; the model's are 0 to 3" in capsys.readouterr().err
    assert not (recipe.parent / "runs" / "rotations.safetensors").exists()


def test_rotations_that_rotate_nothing_are_refused(
    own_trainer: Callable[..., None], kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    own_trainer(RotationWriter())
    write_rotations(recipe.parent / "none.safetensors", Rotations())
    verb = ["figures", "--store", "runs/store", "--out", "drawn", "--validation_rows", 128]
    with pytest.raises(SystemExit, match="1"):
        kurtail(recipe.parent, *verb, "--rotations", "none.safetensors")
    assert "there is none" in capsys.readouterr().err
    assert not (recipe.parent / "drawn").exists()
