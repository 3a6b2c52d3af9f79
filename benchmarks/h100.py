"""What an H100 must reach: Llama-3-8B whole, a Llama-3-70B layer through every stage, a step of Cayley Adam at 8192.

    python benchmarks/h100.py                                        # needs about 110 GB of disk under --work
    python benchmarks/h100.py --shapes tiny --device cpu --windows 2 --seqlen 64    # anywhere, to see that it works

Weights are random and the shapes true. A model of 80 layers is foreseen from two of one and two layers: what the second
layer adds is added 79 times. Hashing, reading and writing of files are part of the times. docs/results/gpu.md has what
an H200 gave.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from memory import random_model

from kurtail_pl.lit import ActivationDataModule, KurTailModule
from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.streaming.compute import Compute

GIB = 2**30
STAGES = ("capture", "learn", "fuse", "quantize")


class Taken(NamedTuple):
    """Wall seconds, and bytes of device memory at the peak."""

    seconds: float
    device: float


def road(model: Path, layers: int, args: argparse.Namespace, windows: int, stages: tuple[str, ...]) -> dict[str, Taken]:
    """Take a model of random weights through the stages, and say what each took."""
    compute, work = Compute(args.device, args.dtype), model.with_name("work")
    text = TextSpec(str(text_file(args.work, windows * args.seqlen)), windows, args.seqlen)
    rows = min(9216, windows * args.seqlen)
    spec = CaptureSpec(str(random_model(args.shapes or model.name, layers, model)), text, rows)
    data = ActivationDataModule(
        spec,
        str(work / "store"),
        args.steps,
        batch_rows=min(512, rows // 2),
        validation_rows=rows // 9,
        compute=compute,
    )
    module = KurTailModule(data.sizes)

    def learn() -> None:
        accelerator = "gpu" if compute.on_cuda else "cpu"
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        # One rank, no files: the trainer is there for the device alone.
        trainer = L.Trainer(
            accelerator=accelerator, devices=1, max_epochs=1, limit_val_batches=0, logger=False,
            enable_checkpointing=False, default_root_dir=work, **quiet,
        )  # fmt: skip
        trainer.fit(module, data)

    def fused() -> None:
        rotations = module.rotations(data.checkpoint.config)
        fuse(data.checkpoint, rotations, "kurtail", work / "fused", device=compute.device)

    verbs = {
        "capture": lambda: capture(spec, work / "store", compute=compute),
        "learn": learn,
        "fuse": fused,
        "quantize": lambda: quantize(work / "fused", QuantizeSpec(text=text), work / "artefact", compute=compute),
    }
    found = {}
    for stage in stages:
        with Meter() as meter:
            verbs[stage]()
        found[stage] = Taken(meter.seconds, meter.device_peak_bytes)
        print(f"{model.name}, {layers} layers: {stage} {found[stage].seconds:.1f} s", flush=True)
    shutil.rmtree(work)
    shutil.rmtree(model)
    return found


def text_file(folder: Path, tokens: int) -> Path:
    """Random words, at least so many tokens of them."""
    folder.mkdir(parents=True, exist_ok=True)
    path, draw = folder / "words.txt", random.Random(0)
    words = ("river", "castle", "bread", "apple", "walked", "found", "under", "silver", "heavy", "bright")
    # A file's last part is kept for evaluation.
    path.write_text("\n".join(" ".join(draw.choices(words, k=20)) + "." for _ in range(max(200, tokens // 8))))
    return path


def whole(one: dict[str, Taken], two: dict[str, Taken], layers: int) -> dict[str, Taken]:
    """What a model of so many layers would take."""
    return {
        stage: Taken(*(a + (layers - 1) * max(b - a, 0) for a, b in zip(one[stage], two[stage], strict=True)))
        for stage in one
    }


def cayley(width: int, device: str, steps: int = 10) -> float:
    """Seconds of a step of Cayley Adam on one matrix."""
    x = torch.nn.Parameter(random_hadamard(width, torch.Generator().manual_seed(0)).float().to(device))
    optimizer = CayleyAdam([x])
    x.grad = torch.randn_like(x)

    def run(count: int) -> float:
        before = time.perf_counter()
        for _ in range(count):
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - before) / count

    run(2)
    return run(steps)


def line(check: str, measured: float, asked: float, unit: str) -> str:
    """A row of the table."""
    verdict = "yes" if measured <= asked else "no"
    return f"| {check:<44} | {measured:>9.3g} {unit:<3} | {asked:>6g} {unit:<3} | {verdict:<3} |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=["tiny"], help="in place of the true ones")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--checks", nargs="+", choices=("8b", "70b", "cayley"), default=["8b", "70b", "cayley"])
    parser.add_argument("--windows", type=int, help="128 for 8B and 256 for 70B")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/h100"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    tiny, table = args.shapes is not None, []
    if "8b" in args.checks:
        took = road(args.work / "llama-3-8b", 2 if tiny else 32, args, args.windows or 128, STAGES[:3])
        table.append(line("8B: capture, learn, fuse", sum(t.seconds for t in took.values()), 180, "s"))
        table.append(line("8B: device memory", max(t.device for t in took.values()) / GIB, 12, "GiB"))
    if "70b" in args.checks:
        one, two = (road(args.work / "llama-3-70b", n, args, args.windows or 256, STAGES) for n in (1, 2))
        took = whole(one, two, 80)
        gptq = took.pop("quantize")
        table.append(line("70B, foreseen: capture, learn, fuse", sum(t.seconds for t in took.values()), 600, "s"))
        table.append(line("70B, foreseen: device memory", max(t.device for t in took.values()) / GIB, 20, "GiB"))
        table.append(line("70B, foreseen: GPTQ", gptq.seconds, 1800, "s"))
        table.append(line("70B, foreseen: device memory of GPTQ", gptq.device / GIB, 24, "GiB"))
    if "cayley" in args.checks:
        width = 256 if tiny else 8192
        table.append(line(f"Cayley Adam, a step at d = {width}", cayley(width, args.device), 0.1, "s"))
    print("| check                                        |      measured |      asked | met |")
    print("| -------------------------------------------- | ------------- | ---------- | --- |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
