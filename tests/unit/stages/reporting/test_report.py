"""The table of methods measured alike, and the model card."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from logits import IDS
from results import results_of

import kurtail_pl
from kurtail_pl.errors import ArtefactError
from kurtail_pl.methods import RTN, LowRank, Normal
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.results import RESULTS, evaluate_folder
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.reporting.report import COLUMNS, report, row, siblings
from kurtail_pl.stages.tables import markdown
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations


def test_damaged_results_beside_a_folder_are_left_out(artefacts: Path) -> None:
    (artefacts / "r" / RESULTS).write_text("{")
    assert [results["method"] for results in siblings(artefacts / "k")] == [
        "float",
        "gptq",
        "quarot",
        "kurtail",
        "mine",
    ]


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    """Methods in no good order, one of a user's own, and four measured on something else."""
    perplexities = {"kurtail": 13.0, "mine": 12.0, "quarot": 20.0, "gptq": 500.0, "rtn": 600.0}
    folders = {
        **{method[0]: results_of(method, evaluation={"perplexity": value}) for method, value in perplexities.items()},
        "f": results_of("float", evaluation={"perplexity": 12.5}),
        "other-text": results_of("rtn", evaluation={"text_sha256": "b" * 64}),
        "other-windows": results_of("rtn", evaluation={"windows": 7}),
        "other-length": results_of("rtn", evaluation={"seqlen": 49}),
        "other-model": results_of("rtn", measured={"model_sha256": "d" * 64}),
    }
    for name, results in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / RESULTS).write_text(json.dumps(results))
    (tmp_path / "not-measured").mkdir()
    return tmp_path


@pytest.mark.parametrize("own", ["k", "f", "m"])
def test_siblings_are_those_measured_alike_float_first_then_ever_better(artefacts: Path, own: str) -> None:
    methods = [results["method"] for results in siblings(artefacts / own)]
    assert methods == ["float", "rtn", "gptq", "quarot", "kurtail", "mine"]
    assert len(siblings(artefacts / "other-windows")) == 1


def test_a_row_of_the_table() -> None:
    assert row(results_of("kurtail")) == ("kurtail", "w4a4kv4", "1.91", "2.09", "12.35", "21", "0.35 GB")
    assert row(results_of("float")) == ("float", "w16a16kv16", "1.91", "2.09", "12.35", "-", "0.30 GB")
    assert row(results_of("mine"))[0] == "mine"


def test_the_table_is_aligned_markdown() -> None:
    lines = markdown(COLUMNS, [row(results_of("kurtail")), row(results_of("float"))]).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(cells[0]) == COLUMNS
    assert all(set(cell) == {"-"} for cell in cells[1])
    assert [line[0] for line in cells[2:]] == ["kurtail", "float"]


def test_report_of_an_artefact(store: ActivationStore, artefact: Path, text: TextSpec, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact, tmp_path / "tiny-quarot-w4a4kv4")
    results = evaluate_folder(Checkpoint(folder), folder, text, store, 20)
    page = report(folder)
    assert (folder / "report.md").read_text() == f"# tiny-quarot-w4a4kv4\n\n{page}"
    assert f"{results['evaluation']['perplexity']:.2f}" in page
    assert "tales.txt: 6 windows of 48 tokens, 282 predicted" in page
    card = (folder / "README.md").read_text()
    weights = "- weights: 4-bit integers, symmetric, per output channel, rounded by GPTQ\n"
    for part in (weights, "cache: keys and values in 4 bits, asymmetric, clip ratio 0.95", "by quarot."):
        assert part in card
    assert f"{results['evaluation']['perplexity']:.3f}" in card
    # Results and pages are no part of the model: it still loads.
    kurtail_pl.load(folder)


def test_the_hub_reads_the_model_card(tiny: Path, text: TextSpec, tmp_path: Path) -> None:
    """A source from the hub with a license, as far as `huggingface_hub` itself understands the page."""
    source = tmp_path / "models--someone--tiny" / "snapshots" / "0123"
    shutil.copytree(tiny, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: another/one\n---\n# Tiny\n")
    made = capture(CaptureSpec(str(source), text, rows=20, seed=3), tmp_path / "store")
    assert made is not None
    fused = fuse(Checkpoint(source), Rotations(), "none", tmp_path / "fused")
    folder = quantize(fused, QuantizeSpec(rounder=RTN(), text=text), tmp_path / "tiny-rtn-w4a4kv4")
    results = evaluate_folder(Checkpoint(folder), folder, text, made, 10)
    report(folder)
    page = ModelCard.load(folder / "README.md")
    data = page.data
    assert (data.base_model, data.license) == ("someone/tiny", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["kurtail", "quantized", "w4a4kv4"]
    (measured,) = data.eval_results
    assert (measured.metric_type, measured.metric_value) == ("perplexity", results["evaluation"]["perplexity"])
    assert (measured.dataset_name, measured.dataset_args) == ("tales.txt", {"windows": 6, "seqlen": 48, "bos": False})
    assert page.text.startswith("\n# tiny-rtn-w4a4kv4\n")
    (snippet,) = re.findall(r"```python\n(.*?)```", page.text, re.S)
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec(snippet, names)
    assert torch.equal(names["model"](IDS).logits, kurtail_pl.load(folder)(IDS).logits)


def test_the_model_card_of_uneven_levels_says_the_bits_of_each_layer(
    fused: Path, text: TextSpec, store: ActivationStore, tmp_path: Path
) -> None:
    average = "; but with bits of each layer's own, 4.25 bits on average: layer by layer 4 2 8 3"
    for bits, said in (
        (None, ""),
        ([3, 3, 3, 3], "; but with bits of each layer's own, 3 bits"),
        ([4, 2, 8, 3], average),
    ):
        folder = quantize(fused, QuantizeSpec(Scheme(Normal(3), layer_bits=bits), RTN()), tmp_path / str(bits))
        evaluate_folder(Checkpoint(folder), folder, text, store, 40)
        report(folder)
        card = (folder / "README.md").read_text()
        weights = "8 levels of the normal distribution (HIGGS), per output channel, rounded to nearest"
        assert f"- weights: {weights}{said}\n- activations: 4 bits" in card


def test_the_model_card_says_that_scales_are_static_and_what_stands_before_texts(
    fused: Path, text: TextSpec, store: ActivationStore, tmp_path: Path
) -> None:
    spec = QuantizeSpec(Scheme(activation_scales="static", prefix=[5, 7]), RTN(), text=text)
    folder = quantize(fused, spec, tmp_path / "static")
    evaluate_folder(Checkpoint(folder), folder, text, store, 40)
    report(folder)
    said = "- activations: 4 bits, symmetric, clip ratio 0.9; one calibrated scale for all tokens of each input\n"
    card = (folder / "README.md").read_text()
    assert said in card
    assert "- before every text: float keys and values of the tokens [5, 7]\n" in card


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme(), "as packed codes; activations and the KV cache are quantized at run time, "),
        (Scheme(activations=None, cache=None), "as packed codes. `kurtail.json`"),
        (Scheme(weights=None, activations=None), "in floating point; the KV cache is quantized at run time, "),
    ],
)
def test_the_model_card_says_what_is_stored_and_what_is_done_at_run_time(
    scheme: Scheme, said: str, fused: Path, text: TextSpec, store: ActivationStore, tmp_path: Path
) -> None:
    folder = quantize(fused, QuantizeSpec(scheme, RTN(), text=text), tmp_path / "made")
    evaluate_folder(Checkpoint(folder), folder, text, store, 40)
    report(folder)
    assert f"\nWeights are stored {said}" in (folder / "README.md").read_text()


def test_the_model_card_says_what_stands_beside_the_weights(
    fused: Path, text: TextSpec, store: ActivationStore, tmp_path: Path
) -> None:
    """Bits are those of the file: codes, scales, and both matrices of the side, over the numbers of all linears."""
    folder = quantize(fused, QuantizeSpec(Scheme(side=LowRank(2)), RTN(), text=text), tmp_path / "side")
    evaluate_folder(Checkpoint(folder), folder, text, store, 40)
    report(folder)
    card = (folder / "README.md").read_text()
    said = "rounded to nearest, beside them a side of rank 2 in 16 bits, which reads the inputs before they are rounded"
    assert f"- weights: 4-bit integers, symmetric, per output channel, {said}\n" in card
    hidden, attention, cache, width = 48, 96, 32, 172
    rows = [attention, cache, cache, hidden, width, width, hidden]
    columns = [hidden, hidden, hidden, attention, hidden, hidden, width]
    numbers = sum(out * read for out, read in zip(rows, columns, strict=True))
    side = 2 * (sum(rows) + hidden + attention + hidden + width)
    assert f"{(4 * numbers + 32 * sum(rows) + 16 * side) / numbers:.3g} bits for each number of a linear" in card


def test_report_of_the_float_reference_has_no_model_card(artefacts: Path) -> None:
    page = report(artefacts / "f")
    assert page.count("\n|") == 7
    assert not (artefacts / "f" / "README.md").exists()


def test_report_without_folder_or_results(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="none does not exist"):
        report(tmp_path / "none")
    with pytest.raises(ArtefactError, match="has no results"):
        report(tmp_path)
