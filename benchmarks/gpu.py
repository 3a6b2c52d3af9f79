"""What a GPU must reach, in the order of its worth, in the minutes that there are; JSON after each line.

    python benchmarks/gpu.py --minutes 9 --out gpu.json            # about 60 GB of disk under --work
    python benchmarks/gpu.py --dry-run                             # anywhere, on tiny shapes

Made for a machine without a network, beside a torch with CUDA. Wheels to carry along where an environment has no more
than torch and transformers: this project, lightning, jsonargparse, docstring-parser, typeshed-client, filelock, gguf,
pydantic, pydantic-core, annotated-types, typing-inspection, torchmetrics and accelerate; pytest for the tests. With
fast-hadamard-transform online rotations are compared with its kernel. Weights are random and drawn on the device, the
shapes true. docs/results/gpu.md has what an H200 gave.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_stages
import gpu_steps
import torch
from gpu_kernels import machine

ROOT = Path(__file__).resolve().parents[1]


class Line(NamedTuple):
    """A row of the table: what was measured, in which unit, and what is asked, if anything is."""

    check: str
    measured: float
    unit: str
    asked: float | None = None

    def __str__(self) -> str:
        asked = "" if self.asked is None else f"{self.asked:g} {self.unit}"
        met = "" if self.asked is None else "yes" if self.measured <= self.asked else "no"
        return f"| {self.check:<52} | {self.measured:>9.4g} {self.unit:<7} | {asked:>9} | {met:<3} |"


def tests(args: argparse.Namespace) -> Iterator[Line]:
    """The tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout[-3000:])
    yield Line("tests: exit code", done.returncode, "", 0)


def cayley(args: argparse.Namespace) -> Iterator[Line]:
    """A step of Cayley Adam, and how orthogonal its matrix still is after it."""
    width = 256 if args.dry_run else 8192
    seconds, error = gpu_steps.cayley(width, args.device)
    yield Line(f"Cayley Adam, a step at {width}", seconds, "s", 0.1)
    yield Line("largest entry of R^T R - I after 12 steps", error, "", 1e-5)


def hadamard(args: argparse.Namespace) -> Iterator[Line]:
    """Online rotations of 2048 tokens against copying them, and against fast-hadamard-transform."""
    for width in (64, 96) if args.dry_run else (4096, 14336, 8192, 28672):
        for what, milliseconds in gpu_steps.hadamard(width, args.device).items():
            yield Line(f"Hadamard of {width}: {what}", milliseconds, "ms")


def llama_8b(args: argparse.Namespace) -> Iterator[Line]:
    """Llama-3-8B whole: capture of 128 windows, learning, fusion."""
    layers, windows = (2, 2) if args.dry_run else (32, 128)
    found = gpu_stages.road("llama-3-8b", layers, windows, args, ("capture", "learn", "fuse"))
    yield from _of_stages("8B", found)
    yield Line("8B: capture, learn, fuse", sum(t.seconds for t in found.values()), "s", 180)
    yield Line("8B: device memory", max(t.gib for t in found.values()), "GiB", 12)


def llama_8b_gptq(args: argparse.Namespace) -> Iterator[Line]:
    """GPTQ of Llama-3-8B, foreseen from one and two layers."""
    windows = 2 if args.dry_run else 128
    found = gpu_stages.foreseen("llama-3-8b", 32, windows, args, ("capture", "fuse", "quantize"))
    yield Line("8B, foreseen: GPTQ", found["quantize"].seconds, "s")
    yield Line("8B, foreseen: device memory of GPTQ", found["quantize"].gib, "GiB")


def llama_70b(args: argparse.Namespace) -> Iterator[Line]:
    """Llama-3-70B, foreseen from one and two of its layers: what the second adds is added 79 times."""
    windows = 2 if args.dry_run else 256
    found = gpu_stages.foreseen("llama-3-70b", 80, windows, args, gpu_stages.STAGES)
    yield from _of_stages("70B, foreseen", found)
    gptq = found.pop("quantize")
    yield Line("70B, foreseen: capture, learn, fuse", sum(t.seconds for t in found.values()), "s", 600)
    yield Line("70B, foreseen: device memory", max(t.gib for t in found.values()), "GiB", 20)
    yield Line("70B, foreseen: GPTQ", gptq.seconds, "s", 1800)
    yield Line("70B, foreseen: device memory of GPTQ", gptq.gib, "GiB", 24)


def whole(args: argparse.Namespace) -> Iterator[Line]:
    """`kurtail fit` at SmolLM2's shapes, evaluation included."""
    yield Line("SmolLM2's shapes: kurtail fit", gpu_stages.fit(args), "s")


def _of_stages(name: str, found: dict[str, gpu_stages.Taken]) -> Iterator[Line]:
    for stage, taken in found.items():
        yield Line(f"{name}: {stage}", taken.seconds, "s")
        yield Line(f"{name}: {stage}, device memory", taken.gib, "GiB")


Check = Callable[[argparse.Namespace], Iterator[Line]]
CHECKS: dict[str, tuple[Check, float]] = {
    "cayley": (cayley, 20),
    "hadamard": (hadamard, 20),
    "tests": (tests, 60),
    "8b": (llama_8b, 180),
    "70b": (llama_70b, 240),
    "8b-gptq": (llama_8b_gptq, 120),
    "fit": (whole, 60),
}
"""Each with the seconds that it takes at least on an H100: it is not begun when fewer are left."""


def main() -> None:
    """Measure what there is time for, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="begins nothing that takes longer than is left")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=[*CHECKS])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the model's passes")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="where models and results go meanwhile")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() or not args.dry_run else "cpu"
    args.seqlen, args.steps = (32, 2) if args.dry_run else (2048, 100)
    warnings.filterwarnings("ignore", module="lightning")
    end = time.monotonic() + 60 * args.minutes
    report: dict[str, Any] = {"machine": machine(), "lines": [], "not run": {}}
    for name in args.checks:
        check, least = CHECKS[name]
        if not args.dry_run and end - time.monotonic() < least:
            report["not run"][name] = "no time left"
            continue
        try:
            for line in check(args):
                print(line, flush=True)
                report["lines"].append(line._asdict())
                args.out.write_text(json.dumps(report, indent=2), encoding="utf-8")
        except Exception as error:  # The others go on.
            report["not run"][name] = f"{type(error).__name__}: {str(error)[:300]}"
    args.out.write_text(json.dumps(report, indent=2), encoding="utf-8")
    for name, why in {**report["machine"], **report["not run"]}.items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    main()
