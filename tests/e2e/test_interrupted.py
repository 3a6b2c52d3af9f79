"""Ctrl-C in the real command, and what comes back with --ckpt_path."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]
Start = Callable[..., subprocess.Popen[str]]
SECONDS = 60
STEPS = ["--data.init_args.steps", 400]


def wait_for(process: subprocess.Popen[str], seen: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not seen():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def interrupted(start: Start, recipe: Path) -> tuple[int, str]:
    """Exit code and messages of a run that was interrupted after its first checkpoint."""
    process = start(recipe.parent, "fit", "--config", recipe, *STEPS)
    checkpoints = recipe.parent / "runs" / "checkpoints"
    try:
        wait_for(process, lambda: (checkpoints / "last.ckpt").is_file())
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, messages


def test_an_interrupted_run_goes_on_to_the_same_rotations(
    interrupted: tuple[int, str], kurtail: Kurtail, recipe: Path, tmp_path: Path
) -> None:
    runs = recipe.parent / "runs"
    assert (runs / "checkpoints" / "last.ckpt").is_file()
    assert not (runs / "rotations.safetensors").exists()
    assert not (recipe.parent / "artifacts").exists()
    kurtail(recipe.parent, "fit", "--config", recipe, *STEPS, "--ckpt_path", runs / "checkpoints" / "last.ckpt")
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    kurtail(undisturbed, "fit", "--config", recipe, *STEPS)
    resumed, expected = (load_file(root / "rotations.safetensors") for root in (runs, undisturbed / "runs"))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    curves = [place / "artifacts" / "tied-kurtail-w4a4kv4" / "training.json" for place in (recipe.parent, undisturbed)]
    assert curves[0].read_text() == curves[1].read_text()


def test_an_interrupted_run_says_so_in_its_exit_code(interrupted: tuple[int, str]) -> None:
    code, messages = interrupted
    assert "Traceback" not in messages
    assert "kurtail fit: interrupted" in messages
    assert code == 130


def test_a_run_that_finished_its_steps_goes_on_with_the_later_stages(kurtail: Kurtail, recipe: Path) -> None:
    # As when Ctrl-C came during GPTQ: the steps are done, the artefact is not there.
    kurtail(recipe.parent, "fit", "--config", recipe)
    artefact = recipe.parent / "artifacts" / "tied-kurtail-w4a4kv4"
    weights = {path.name: path.read_bytes() for path in artefact.glob("model*.safetensors")}
    shutil.rmtree(artefact)
    last = recipe.parent / "runs" / "checkpoints" / "last.ckpt"
    kurtail(recipe.parent, "fit", "--config", recipe, "--ckpt_path", last)
    assert {path.name: path.read_bytes() for path in artefact.glob("model*.safetensors")} == weights
    assert (artefact / "report.md").is_file()


def test_a_run_killed_while_it_wrote_its_pages_goes_on(
    kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures stand in results.json, the pages made of them do not; and a finished artefact is not replaced."""
    kurtail(recipe.parent, "fit", "--config", recipe)
    artefact = recipe.parent / "artifacts" / "tied-kurtail-w4a4kv4"
    finished = {path.relative_to(artefact): path.stat().st_mtime_ns for path in artefact.rglob("*") if path.is_file()}
    (artefact / "report.md").unlink()
    (artefact / "README.md").unlink()
    kurtail(recipe.parent, "fit", "--config", recipe)
    again = {path.relative_to(artefact): path.stat().st_mtime_ns for path in artefact.rglob("*") if path.is_file()}
    assert again.keys() == finished.keys()
    assert all(again[path] == finished[path] for path in finished if path.suffix == ".safetensors")
    with pytest.raises(SystemExit, match="1"):
        kurtail(recipe.parent, "fit", "--config", recipe)
    assert "--overwrite" in capsys.readouterr().err
    assert again == {
        path.relative_to(artefact): path.stat().st_mtime_ns for path in artefact.rglob("*") if path.is_file()
    }


def test_the_recipe_comes_before_the_figures(kurtail: Kurtail, recipe: Path) -> None:
    """`compare` knows by it whose results they are, also after a kill between the two."""
    kurtail(recipe.parent, "fit", "--config", recipe)
    artefact = recipe.parent / "artifacts" / "tied-kurtail-w4a4kv4"
    assert (artefact / "recipe.yaml").stat().st_mtime_ns < (artefact / "results.json").stat().st_mtime_ns


def test_what_is_learned_is_written_once(kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned again from the checkpoint on another number of threads, the last bits would differ: it is not."""
    kurtail(recipe.parent, "fit", "--config", recipe)
    rotations = recipe.parent / "runs" / "rotations.safetensors"
    written = rotations.stat().st_mtime_ns
    shutil.rmtree(recipe.parent / "artifacts")
    kurtail(recipe.parent, "fit", "--config", recipe)
    assert rotations.stat().st_mtime_ns == written
    # Its last checkpoint is now that of an ended training, from which no seven steps can be reached.
    shutil.rmtree(recipe.parent / "artifacts")
    more = ["fit", "--config", recipe, "--data.init_args.steps", 7]
    with pytest.raises(SystemExit, match="1"):
        kurtail(recipe.parent, *more)
    assert "ended after 5 steps, and data.steps is 7" in capsys.readouterr().err
    kurtail(recipe.parent, *more, "--overwrite")
    assert rotations.stat().st_mtime_ns > written


@pytest.mark.parametrize(("steps", "refusal"), [(3, "taken 4 steps, and data.steps is 3"), (7, None)])
def test_another_number_of_steps_is_taken_or_refused(
    kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str], steps: int, refusal: str | None
) -> None:
    """The last checkpoint of five steps is that of the fourth, from which seven can be reached and three cannot."""
    kurtail(recipe.parent, "fit", "--config", recipe)
    shutil.rmtree(recipe.parent / "artifacts")
    other_steps = ["fit", "--config", recipe, "--data.init_args.steps", steps]
    if refusal is not None:
        with pytest.raises(SystemExit, match="1"):
            kurtail(recipe.parent, *other_steps)
        assert refusal in capsys.readouterr().err
        other_steps.append("--overwrite")
    kurtail(recipe.parent, *other_steps)
    undisturbed = recipe.parent / "undisturbed"
    undisturbed.mkdir()
    kurtail(undisturbed, *other_steps)
    one, other = (load_file(place / "runs" / "rotations.safetensors") for place in (recipe.parent, undisturbed))
    assert all(torch.equal(one[name], other[name]) for name in other)
