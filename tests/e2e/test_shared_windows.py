"""Capture and GPTQ by two processes, one with more windows than the other, against one; killed in the middle."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import tiny_family
from safetensors.torch import load_file
from sharing import stages

from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint

PROGRAM = (str(Path(__file__).resolve().parents[1] / "sharing.py"),)


@pytest.fixture(scope="module")
def outputs(
    kurtail: Callable[..., None],
    start: Callable[..., subprocess.Popen[str]],
    tied: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """What one process made, and two after one of them was killed."""
    place = tmp_path_factory.mktemp("shared")
    (place / "model").symlink_to(tied)
    (place / "text.txt").write_text(text_file.read_text())
    tiny_family("mixtral").save_pretrained(place / "mixture")
    kurtail(place, "fuse", "--model", tied, "--method", "quarot", "--out", "fused")
    one, two = place / "one", place / "two"
    one.mkdir()
    two.mkdir()
    stages(place, one)

    def both(*layers: int) -> list[int]:
        """Run two processes; how each ended."""
        processes = [start(place, place, two, rank, 2, *layers, program=PROGRAM) for rank in range(2)]
        messages = [process.communicate(timeout=240)[1] for process in processes]
        assert layers or not any(process.returncode for process in processes), messages
        return [process.returncode for process in processes]

    first, second = both(2)
    assert first != 0
    assert second == -signal.SIGKILL
    record = json.loads((two / ".artefact.partial" / "unfinished" / "progress.json").read_text())
    assert record["done"] == 1  # A layer counts when all have finished it.
    shutil.copytree(two / ".artefact.partial", place / ".fewer.partial")
    quantize(place / "fused", QuantizeSpec(text=TextSpec(str(place / "text.txt"), 3, 64)), place / "fewer")
    for name in ("mixture1", "mixture3"):
        shutil.rmtree(two / name)
    assert both() == [0, 0]
    return one, two


@pytest.mark.parametrize("windows", [1, 3])
def test_rows_are_the_same_bytes(outputs: tuple[Path, Path], windows: int) -> None:
    """With one window for two processes, the one that writes has none."""
    one, two = (sorted((folder / f"store{windows}").glob("*.safetensors")) for folder in outputs)
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 3 * 4
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    manifests = [json.loads((folder / f"store{windows}" / "manifest.json").read_text()) for folder in outputs]
    assert manifests[0] == manifests[1]


def test_levels_of_a_cache_are_the_same_bytes(outputs: tuple[Path, Path]) -> None:
    """Keys and values come to the first process in the order of their windows."""
    one, two = (load_file(folder / "levels" / "model.safetensors") for folder in outputs)
    assert sum("cache_value_levels" in name for name in one) == 4
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("windows", [1, 3])
def test_hessians_are_sums_over_all_windows(outputs: tuple[Path, Path], windows: int) -> None:
    """Float64 sums in another order; experts that borrow tokens borrow the same ones."""
    one, two = (folder / f"mixture{windows}" for folder in outputs)
    expected, notes = load_file(one / "hessians0"), json.loads((one / "notes0").read_text())
    assert len(expected) == 4 + 4 * 3
    assert notes["borrowers"]
    errors = notes.pop("errors")
    for rank in range(2):
        found = json.loads((two / f"notes{rank}").read_text())
        assert all(found["errors"][name] == pytest.approx(each, rel=1e-4) for name, each in errors.items())
        assert {**found, "errors": None} == {**notes, "errors": None}
        for name, hessian in load_file(two / f"hessians{rank}").items():
            assert (hessian - expected[name]).norm() <= 1e-12 * expected[name].norm()


@pytest.mark.parametrize("windows", [1, 3])
def test_static_scales_are_of_all_windows(outputs: tuple[Path, Path], windows: int) -> None:
    """Counts add up exactly; what comes after the first codes may differ in the last bit, and be counted beside."""
    one, two = (folder / f"mixture{windows}" for folder in outputs)
    expected = load_file(one / "scales0")
    assert len(expected) == 4 + 4 * 3
    for rank in range(2):
        found = load_file(two / f"scales{rank}")
        assert torch.equal(found["self_attn.q_proj.input_scale"], expected["self_attn.q_proj.input_scale"])
        for name, scale in found.items():
            torch.testing.assert_close(scale, expected[name], rtol=1e-2, atol=0)


@pytest.mark.parametrize("artefact", ["artefact", "gptaq"])
def test_the_quantized_model_is_the_same(artefact: str, outputs: tuple[Path, Path], text_file: Path) -> None:
    """Codes differ at most where rounding was a tie; a thousandth of them would move the loss by far less than 1e-3."""
    artefacts = [folder / artefact for folder in outputs]
    weights = [
        {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}
        for folder in artefacts
    ]
    assert weights[0].keys() == weights[1].keys()
    codes = [torch.cat([t.flatten() for name, t in state.items() if name.endswith("codes")]) for state in weights]
    assert len(codes[0]) > 10_000
    assert (codes[0] != codes[1]).double().mean() < 1e-3
    spec = TextSpec(str(text_file), windows=4, seqlen=64)
    values = [perplexity(Checkpoint(folder), spec)["perplexity"] for folder in artefacts]
    assert values[1] == pytest.approx(values[0], rel=1e-3)


def test_learned_clips_are_the_same(outputs: tuple[Path, Path]) -> None:
    """Of gradients that were added, by processes of which one has twice as many windows.

    After the first layer an activation on an edge may be rounded otherwise, and be felt.
    """
    one, two = (json.loads((folder / "learned" / "kurtail.json").read_text())["clips"] for folder in outputs)
    assert len(one) == 4
    for index, (layer, expected) in enumerate(zip(two, one, strict=True)):
        assert set(expected.values()) != {0.9}
        assert layer == pytest.approx(expected, abs=5e-3 if index else 1e-5)


def test_transforms_are_trained_alike(outputs: tuple[Path, Path]) -> None:
    """The condition numbers of the first layer's maps, and all others nearly."""
    one, two = (json.loads((folder / "trained" / "kurtail.json").read_text())["transforms"] for folder in outputs)
    assert len(one) == 4
    for index, (layer, expected) in enumerate(zip(two, one, strict=True)):
        assert max(expected.values()) > 1.001
        assert layer == pytest.approx(expected, abs=5e-3 if index else 1e-4)


def test_one_process_does_not_go_on_where_two_were_killed(outputs: tuple[Path, Path]) -> None:
    """It has the hidden states of half of the windows; so it begins anew, and ends as one process alone does."""
    one = outputs[0]
    for file in (one / "artefact").glob("model*.safetensors"):
        assert (one.parent / "fewer" / file.name).read_bytes() == file.read_bytes()


def test_no_work_is_left(outputs: tuple[Path, Path]) -> None:
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*/*")) for folder in outputs]
    assert [name for name in names[1] if not name.endswith("1")] == names[0]
    assert not list(outputs[1].glob(".*.partial"))
