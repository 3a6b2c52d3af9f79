"""Results of a folder: kurtosis by definition, cost, names; damaged ones are named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from results import results_of

from kurtail_pl.errors import ArtefactError, StoreMismatch
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.evaluation.results import RESULTS, artefact_name, block_kurtosis, evaluate_folder, read_results
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore, block_sites
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations


def kurtosis_by_hand(store: ActivationStore, rotation: np.ndarray | None, start: int, stop: int) -> dict[str, float]:
    """Of each block input: every row divided by its root mean square, rotated, all entries pooled."""
    found = {}
    for site in block_sites(4):
        rows = store.read(site, start, stop).double().numpy()
        rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
        rows = rows if rotation is None else rows @ rotation
        found[site] = float(scipy.stats.kurtosis(rows, axis=None, fisher=False))
    return found


@pytest.mark.parametrize("rotated", [False, True])
def test_kurtosis_is_the_fourth_moment(store: ActivationStore, rotations: Rotations, rotated: bool) -> None:
    residual = rotations.residual if rotated else None
    values = block_kurtosis(store, Rotations(residual=residual), 30, 50, eps=1e-6)
    expected = kurtosis_by_hand(store, None if residual is None else residual.numpy(), 30, 50)
    assert values.tolist() == pytest.approx(list(expected.values()), rel=1e-9)


@pytest.mark.parametrize("which", ["tiny", "artefact"])
def test_results_of_a_folder(
    which: str,
    request: pytest.FixtureRequest,
    store: ActivationStore,
    text: TextSpec,
    rotations: Rotations,
    tmp_path: Path,
) -> None:
    folder: Path = request.getfixturevalue(which)
    ours = which == "artefact"
    results = evaluate_folder(Checkpoint(folder), tmp_path, text, store, 20)
    assert json.loads((tmp_path / RESULTS).read_text()) == results == read_results(tmp_path)
    assert rotations.residual is not None
    expected = kurtosis_by_hand(store, rotations.residual.numpy() if ours else None, 30, 50)
    assert results["kurtosis"]["sites"] == pytest.approx(expected, rel=1e-9)
    assert results["kurtosis"]["mean"] == pytest.approx(np.mean(list(expected.values())), rel=1e-9)
    assert results["kurtosis"]["max"] == pytest.approx(max(expected.values()), rel=1e-9)
    assert results["kurtosis"]["rows"] == 20
    assert results["evaluation"]["perplexity"] == perplexity(Checkpoint(folder), text)["perplexity"]
    assert "cost" not in results["evaluation"]
    assert results["method"] == ("quarot" if ours else "float")
    assert Scheme.from_dict(results["scheme"]) == (Scheme() if ours else FLOAT)
    assert list(results["cost"]) == (["learn", "fuse", "quantize", "evaluate"] if ours else ["evaluate"])
    if ours:
        assert results["cost"]["learn"] == rotations.origin["cost"]
    assert results["disk_bytes"] == sum(p.stat().st_size for p in folder.glob("model*.safetensors"))


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"has no results; run kurtail eval"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is not JSON"),
        ({"cost": ...}, "cost"),
        ({"evaluation": []}, r"evaluation is \[\]"),
        ({"evaluation": {"perplexity": "low"}}, "perplexity is 'low'"),
        ({"evaluation": {"perplexity": 10**400}}, "perplexity is 1000"),
        ({"scheme": {"weights": {"kind": "Uniform", "settings": {"bits": 99}}}}, "bits is 99"),
        ({"kurtosis": {"mean": 2.0}}, "max"),
        ({"tasks": 3}, "tasks is 3"),
        ({"tasks": {"tasks": {}}}, "settings"),
    ],
)
def test_damaged_results_are_named(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    results = {**results_of("kurtail"), **(change or {})}
    content = json.dumps({key: value for key, value in results.items() if value is not ...})
    (tmp_path / RESULTS).write_text(content if change else "{")
    with pytest.raises(
        ArtefactError, match=rf"results.json.*{message}.*; remove it and run kurtail eval again"
    ) as error:
        read_results(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m", "smollm2-135m-quarot-w4a4kv4"),
        ("models/Tiny", "tiny-quarot-w4a4kv4"),
        ("models/Tiny.Q4_1.gguf", "tiny.q4_1-quarot-w4a4kv4"),
        ("HuggingFaceTB/SmolLM2-1.7B", "smollm2-1.7b-quarot-w4a4kv4"),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b-quarot-w4a4kv4"),
    ],
)
def test_artefact_names_tell_models_apart(model: str, name: str) -> None:
    assert artefact_name(model, "quarot", "w4a4kv4") == name


def test_a_store_of_another_model_is_refused(artefact: Path, tied: Path, text: TextSpec, tmp_path: Path) -> None:
    other = capture(CaptureSpec(str(tied), text, rows=50), tmp_path / "store")
    assert other is not None
    with pytest.raises(StoreMismatch, match="activations of another model"):
        evaluate_folder(Checkpoint(artefact), artefact, text, other, 20)
