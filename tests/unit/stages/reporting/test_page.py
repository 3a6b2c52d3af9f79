"""The page `report.html`, read back by an HTML parser and compared with the files that it was made of."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import PageReader, read_page
from results import results_of

from kurtail_pl.errors import ArtefactError
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.reporting.comparison import write_comparison
from kurtail_pl.stages.reporting.lines import Row
from kurtail_pl.stages.reporting.report import report
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.surgery.rotations import Rotations

LAYERS = 4
SITES = [f"layer{layer:03}.{block}" for layer in range(LAYERS) for block in ("attn_in", "ffn_in")]
ALL = [
    "Methods", "Training", "Kurtosis by layer", "Error by linear and site", "Activations", "Cost", "What was run",
    "Where it runs",
]  # fmt: skip
Make = Callable[..., Path]


def errors_of(layers: int, linears: tuple[str, ...] = ("self_attn.v_proj", "mlp.down_proj")) -> dict[str, Any]:
    """Of each linear its own number."""
    names = [f"model.layers.{layer}.{linear}" for layer in range(layers) for linear in linears]
    return {name: {"weight": 0.02, "output": 0.001 * (number + 1)} for number, name in enumerate(names)}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(method: str = "kurtail", name: str | None = None, bare: bool = False, **changes: Any) -> Path:
        """A folder with all that a page can show, or with results and card alone."""
        folder = tmp_path / (name or method)
        folder.mkdir(parents=True)
        kurtosis = {"mean": 2.25, "max": 2.75, "rows": 20, "sites": dict(zip(SITES, range(2, 10), strict=True))}
        measured = {"kurtosis": kurtosis, **changes.pop("results", {})}
        results = results_of(measured.pop("method", method), **measured)
        (folder / "results.json").write_text(json.dumps(results))
        if method == "float":
            return folder
        write_rotations(folder / "rotations.safetensors", Rotations())
        card = {
            "format": 3, "method": method, "scheme": Scheme().to_dict(), "cost": {}, "sha256": {}, "rounding": "gptq",
            "source": {"model": "tiny", "sha256": "c" * 64}, "versions": {"torch": "2.99"},
            "quantize": {"rounder": {"kind": "GPTQ", "settings": {}}},
        }  # fmt: skip
        if not bare:
            card["errors"] = changes.pop("errors", errors_of(LAYERS))
            curves = {"loss/total": [2.5, 2.25, 2.125], "loss/r1": [1.5, 1.25, 1.125], "kurtosis/r1/mean": [9, 8, 7]}
            (folder / "training.json").write_text(json.dumps({"steps": [1, 2, 3], "values": curves}))
            by_layer = [[3.0 + layer, 4.0 + layer] for layer in range(LAYERS)]
            surface = {"vanilla": [[1.0, 8.0], [2.0, 9.0]], method: [[1.0, 1.5], [2.0, 1.5]]}
            drawn = {
                "kurtosis": {"vanilla": by_layer, method: by_layer},
                "rounding_error": {"vanilla": by_layer, method: by_layer},
                "layer001.ffn_in": {"surface": surface},
            }
            (folder / "figures").mkdir()
            (folder / "figures" / "figures.json").write_text(json.dumps(drawn | changes.pop("figures", {})))
            (folder / "recipe.yaml").write_text("seed_everything: 7\n")
        (folder / "kurtail.json").write_text(json.dumps(card | changes.pop("card", {})))
        assert not changes
        return folder

    return write


def number(cell: str) -> float:
    """What a cell says, in megabytes where it is memory."""
    found = re.match(r"-?[\d.]+", cell)
    assert found is not None
    return float(found[0]) * (1000 if cell.endswith(" GB") else 1)


def test_every_number_of_the_table_is_that_of_the_results(make: Make) -> None:
    folder = make()
    make("float", results={"evaluation": {"perplexity": 9.8765}})
    make("quarot", results={"evaluation": {"perplexity": 20.123}})
    report(folder)
    ((columns, *lines),) = read_page(folder).tables["Methods"]
    assert [line[0] for line in lines] == ["float", "quarot", "kurtail"]
    for line in lines:
        results = json.loads((folder.parent / line[0] / "results.json").read_text())
        cells = dict(zip((column.strip() for column in columns), line, strict=True))
        assert number(cells["perplexity"]) == pytest.approx(results["evaluation"]["perplexity"], abs=0.005)
        assert number(cells["kurtosis mean"]) == pytest.approx(results["kurtosis"]["mean"], abs=0.005)
        assert number(cells["kurtosis max"]) == pytest.approx(results["kurtosis"]["max"], abs=0.005)
        peak = max(cost["peak_bytes"] for cost in results["cost"].values())
        assert number(cells["peak memory"]) == pytest.approx(peak / 1e6, abs=5)
        seconds = sum(cost["seconds"] for stage, cost in results["cost"].items() if stage != "evaluate")
        assert cells["seconds"] == "-" if not seconds else number(cells["seconds"]) == pytest.approx(seconds, abs=0.5)


def test_cost_and_what_was_run(make: Make) -> None:
    folder = make()
    report(folder)
    page = read_page(folder)
    ((_, *cost),) = page.tables["Cost"]
    results = json.loads((folder / "results.json").read_text())
    assert [line[0] for line in cost] == list(results["cost"])
    assert [number(line[1]) for line in cost] == [spent["seconds"] for spent in results["cost"].values()]
    ((_, *run),) = page.tables["What was run"]
    assert {"torch": "2.99", "rounding": "gptq"}.items() <= dict(map(tuple, run)).items()
    assert "seed_everything: 7" in page.text
    assert f"kurtail fit --config {folder / 'recipe.yaml'}" in page.text
    ((_, *runtimes),) = page.tables["Where it runs"]
    assert {"torch", "vLLM", "llama.cpp"} <= {line[0] for line in runtimes}


def test_the_worst_linears_and_sites_stand_first(make: Make) -> None:
    folder = make()
    report(folder)
    (_, *linears), (_, *sites) = read_page(folder).tables["Error by linear and site"]
    shown = [(line[0], number(line[1])) for line in linears]
    expected = {name: found["output"] for name, found in errors_of(LAYERS).items()}
    assert dict(shown) == pytest.approx(expected)
    assert [value for _, value in shown] == sorted(expected.values(), reverse=True)
    assert sites[0][0] == f"input of FFN, layer {LAYERS - 1}"
    assert number(sites[0][1]) == 4.0 + LAYERS - 1


def test_of_experts_of_a_kind_the_map_shows_the_worst(make: Make) -> None:
    folder = make(errors=errors_of(2, tuple(f"mlp.experts.{expert}.up_proj" for expert in range(3))))
    report(folder)
    cells = [title for title in read_page(folder).titles if title.startswith("mlp.experts.*.up_proj")]
    assert cells == ["mlp.experts.*.up_proj, layer 0: 0.003", "mlp.experts.*.up_proj, layer 1: 0.006"]


def test_kurtosis_before_and_after_is_that_of_the_figures_or_else_of_the_results(make: Make) -> None:
    folder = make()
    report(folder)
    drawn = [title for title in read_page(folder).titles if title.startswith("vanilla, layer")]
    assert drawn == [f"vanilla, layer {layer}: {block + layer}" for block in (3, 4) for layer in range(LAYERS)]
    bare = make(name="bare", bare=True)
    report(bare)
    measured = [title for title in read_page(bare).titles if title.startswith("kurtail, layer")]
    assert measured == [
        f"kurtail, layer {layer}: {2 + 2 * layer + block}" for block in (0, 1) for layer in range(LAYERS)
    ]


def test_a_folder_without_some_part_has_a_page_without_that_section(make: Make) -> None:
    full = make()
    report(full)
    assert read_page(full).sections == ALL
    bare = make(name="bare", bare=True)
    report(bare)
    lacking = {"Training", "Error by linear and site", "Activations"}
    assert read_page(bare).sections == [name for name in ALL if name not in lacking]
    float_model = make("float")
    report(float_model)
    assert read_page(float_model).sections == ["Methods", "Kurtosis by layer", "Cost"]


def test_weights_that_were_treated_otherwise_are_named(make: Make) -> None:
    folder = make(card={"fallbacks": ["model.layers.3.mlp.up_proj"]})
    report(folder)
    ((_, *lines),) = read_page(folder).tables["Exceptions"]
    assert lines == [["model.layers.3.mlp.up_proj", "left to plain rounding, its Hessian was not positive definite"]]


def require_alone(page: PageReader) -> None:
    """The page loads nothing: no address but of its own sections, no script but its own, nothing in its styles."""
    assert page.elements.count("script") == page.elements.count("style") == 1
    loading = ("img", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "image", "use")
    assert not set(loading) & set(page.elements)
    addresses = [
        value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "srcset")
    ]
    assert all(address.startswith("#") for address in addresses)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert not re.search(r"url\(|@import|https?:|fetch\(|import\(|XMLHttp", page.raw)
    assert any("default-src 'none'" in value for _, name, value in page.attributes if name == "content")


HOSTILE = "\"><script>alert('x')</script><img src=http://example.org/x onerror=alert(1)>{{ 7*7 }}"


def test_the_page_loads_nothing_and_hostile_names_are_text(make: Make) -> None:
    named = {f"model.layers.0.{HOSTILE}": {"weight": 0.5}}
    folder = make(
        results={"model": HOSTILE, "method": HOSTILE, "evaluation": {"source": HOSTILE}},
        errors=named,
        card={"rounding": HOSTILE, "fallbacks": [HOSTILE], "versions": {HOSTILE: HOSTILE}},
        figures={"kurtosis": {HOSTILE: [[3, 4]] * LAYERS}, "layer000.ffn_in": {"surface": {HOSTILE: [[1.0, 2.0]]}}},
    )
    (folder / "recipe.yaml").write_text(f"model: {HOSTILE}\n")
    report(folder)
    page = read_page(folder)
    require_alone(page)
    assert page.text.count(HOSTILE) > 10
    assert page.sections == [*ALL, "Exceptions"]
    assert all(
        any(HOSTILE in cell for line in page.tables[name][0] for cell in line) for name in ("Methods", "Exceptions")
    )


def test_the_page_of_a_model_of_many_experts_is_small(make: Make) -> None:
    """48 layers of 128 experts, and surfaces of as many points as are ever kept."""
    experts = tuple(f"mlp.experts.{n}.{kind}_proj" for n in range(128) for kind in ("gate", "up", "down"))
    rows = [[1 + (token * channel) % 7 / 7 for channel in range(72)] for token in range(64)]
    surfaces = {f"layer{layer:03}.ffn_in": {"surface": {"vanilla": rows, "kurtail": rows}} for layer in range(48)}
    folder = make(errors=errors_of(48, experts), figures=surfaces)
    report(folder)
    assert (folder / "report.html").stat().st_size < 3_000_000
    assert "of 18432; kurtail.json has all" in read_page(folder).text


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("training.json", "{", "training.json is not JSON"),
        ("training.json", '{"steps": [1, 2], "values": {"loss/total": [1.0]}}', "has not as many values as steps"),
        ("training.json", '{"steps": [1], "values": {"loss/total": ["much"]}}', "values.loss/total.0 is 'much'"),
        (
            "figures/figures.json",
            '{"kurtosis": {"vanilla": [[1.0, 2.0, 3.0]]}}',
            "has not two block inputs in each layer",
        ),
        ("figures/figures.json", '{"layer000.ffn_in": {}}', "figures.json has no surface"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(make: Make, file: str, content: str, said: str) -> None:
    folder = make()
    (folder / file).write_text(content)
    with pytest.raises(ArtefactError, match=re.escape(said)) as error:
        report(folder)
    assert "remove it, and run kurtail report again" in str(error.value)


def test_a_comparison_has_one_page(make: Make, tmp_path: Path) -> None:
    folders = [
        make("float", results={"evaluation": {"perplexity": 10.0}}),
        make("quarot", "q0", bare=True, results={"evaluation": {"perplexity": 30.0}}),
        make("quarot", "q1", bare=True, results={"evaluation": {"perplexity": 34.0}}),
        make("kurtail", "k0", results={"evaluation": {"perplexity": 20.0}}),
    ]
    out = tmp_path / "out"
    out.mkdir()
    write_comparison([Row(folder, seed) for folder, seed in zip(folders, (0, 0, 1, 0), strict=True)], out)
    page = read_page(out)
    require_alone(page)
    assert page.sections == ALL
    ((columns, *lines),) = page.tables["Methods"]
    place = columns.index("perplexity")
    assert [line[place] for line in lines] == ["10.00", "32.00 (30.00 to 34.00)", "20.00"]
    assert page.text.count("seed_everything: 7") == 1
    # All were made to have the same kurtosis: one curve for all.
    assert "float, quarot, kurtail, layer 0: 2" in page.titles
    # The best of those that were quantized is shown in full.
    assert "What each runtime makes of the folder k0" in page.text
