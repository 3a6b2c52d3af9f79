"""Two processes that share every batch learn what one learns."""

import json
import math
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        port: int = here.getsockname()[1]
    return port


def test_two_gloo_processes_learn_the_same_rotations(
    kurtail: Callable[..., None], start: Callable[..., subprocess.Popen[str]], recipe: Path, tmp_path: Path
) -> None:
    """The kurtosis is that of all rows: a mean of two halves' kurtosis would lead elsewhere.

    The recipe's rows are all that its text has: asked for by number, or as all of them.
    """
    places = {name: tmp_path / name for name in ("one", "two")}
    for place in places.values():
        place.mkdir()
    steps = ["--data.init_args.steps", 20]
    kurtail(places["one"], "fit", "--config", recipe, *steps)
    both = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", 2]
    process = start(places["two"], "fit", "--config", recipe, *steps, *both, "--data.init_args.capture.rows", "all")
    _, messages = process.communicate(timeout=240)
    assert process.returncode == 0, messages
    assert messages.count("shared by 2 processes") == 2  # Capture and GPTQ, each said once.
    one, two = (load_file(place / "runs" / "rotations.safetensors") for place in places.values())
    # Each of 20 steps rounds entries up to one some dozens of times (6e-8 each); other rows would lead 1e-2 away.
    for name in ("residual", "value"):
        assert (one[name] - two[name]).abs().max() < 1e-4
    stores = [sorted((place / "runs" / "store").glob("*.safetensors")) for place in places.values()]
    assert [path.name for path in stores[0]] == [path.name for path in stores[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*stores, strict=True))
    artefacts = [place / "artifacts" / "tied-kurtail-w4a4kv4" for place in places.values()]
    assert (first_codes(artefacts[0]) != first_codes(artefacts[1])).double().mean() < 0.02
    # Two processes print what one finds for what they made.
    results = json.loads((artefacts[1] / "results.json").read_text())["evaluation"]
    spec = TextSpec(results["source"], results["windows"], results["seqlen"])
    alone = perplexity(Checkpoint(artefacts[1]), spec)["perplexity"]
    assert math.log(results["perplexity"]) == pytest.approx(math.log(alone), rel=1e-6)


def first_codes(artefact: Path) -> Tensor:
    """All codes of the first layer.

    It sees no codes before it, so that what rotations 1e-6 apart do to it is bounded: a code in 1e5 falls on the other
    side of an edge and takes at most the rest of its row along, some hundreds of 37 thousand codes. Later layers add
    to it, as the model's noise is far above its signal; other rotations change half of all codes.
    """
    weights = {name: t for path in sorted(artefact.glob("model*.safetensors")) for name, t in load_file(path).items()}
    return torch.cat([t.flatten() for name, t in weights.items() if name.endswith("codes") and ".layers.0." in name])


def test_a_batch_that_cannot_be_shared_is_refused(
    start: Callable[..., subprocess.Popen[str]], recipe: Path, tmp_path: Path
) -> None:
    both = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", 2]
    process = start(tmp_path, "fit", "--config", recipe, "--data.init_args.batch_rows", 63, *both)
    _, messages = process.communicate(timeout=240)
    assert process.returncode == 1
    assert "batch_rows is 63 and 2 processes share each batch" in messages


def test_pooled_moments_are_those_of_all_values() -> None:
    """Kurtosis of two halves through averaged moments against the whole, and its gradient."""
    from kurtail_pl.maths.kurtosis import kurtosis

    values = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    values.requires_grad_()
    halves = torch.stack(values.chunk(2, -1))

    def average(values: torch.Tensor) -> torch.Tensor:
        return values.mean(-1, keepdim=True).mean(0, keepdim=True)

    pooled, whole = kurtosis(halves, average).flatten(), kurtosis(values)
    torch.testing.assert_close(pooled, whole, rtol=1e-12, atol=0)
    assert (kurtosis(halves).mean(0) - whole).abs().min() > 0.01
    gradients = [torch.autograd.grad(k.sum(), values)[0] for k in (pooled, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_two_nodes_that_slurm_started(
    start: Callable[..., subprocess.Popen[str]],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unused_port: int,
) -> None:
    """Each process finds its place in what SLURM's `srun` sets, one process on each of two nodes."""
    variables = {
        "JOB_ID": "1", "JOB_NAME": "kurtail", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NODELIST": "localhost",
        "JOB_NODELIST": "localhost", "LOCALID": "0",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_PORT", str(unused_port))
    nodes = ["--trainer.accelerator", "cpu", "--trainer.devices", 1, "--trainer.num_nodes", 2]
    short = ["--data.init_args.steps", 5]
    processes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        monkeypatch.setenv("SLURM_NODEID", rank)
        processes.append(start(tmp_path, "fit", "--config", recipe, "--trainer.strategy", "ddp", *nodes, *short))
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert said[0].count("shared by 2 processes") == 2
    assert (tmp_path / "artifacts" / "tied-kurtail-w4a4kv4" / "results.json").is_file()
