"""A model of random weights and true shapes through the stages, with seconds and device memory of each."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import lightning as L
from memory import random_model, word_text

from kurtail_pl.lit import ActivationDataModule, KurTailModule
from kurtail_pl.stages.capture.stage import CaptureSpec, capture
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.streaming.compute import Compute

STAGES = ("capture", "learn", "fuse", "quantize")


SMALL = {
    "data.init_args.capture.rows": 64,
    "data.init_args.batch_rows": 16,
    "data.init_args.validation_rows": 16,
}


class Taken(NamedTuple):
    """Wall seconds, and GiB of device memory at the peak."""

    seconds: float
    gib: float


def road(shapes: str, layers: int, windows: int, args: argparse.Namespace, stages: tuple[str, ...]) -> dict[str, Taken]:
    """Take a model through stages; hashing, reading and writing of files are part of the times.

    Without ``learn`` the rotations are random.
    """
    compute = Compute(args.device, args.dtype)
    model, work = args.work / f"{shapes}-{layers}", args.work / "stages"
    shutil.rmtree(work, ignore_errors=True)
    text = TextSpec(str(word_text(args.work / "words.txt", windows * args.seqlen)), windows, args.seqlen)
    folder = random_model("tiny" if args.dry_run else shapes, layers, model, args.device)
    rows = min(9216, windows * args.seqlen)
    spec = CaptureSpec(str(folder), text, rows)
    batch, kept = min(512, rows // 2), rows // 9
    data = ActivationDataModule(spec, str(work / "store"), args.steps, batch, kept, compute)
    module = KurTailModule(data.sizes)

    def learn() -> None:
        # One rank, no files: the trainer is there for the device alone.
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = L.Trainer(
            accelerator="gpu" if compute.on_cuda else "cpu", devices=1, max_epochs=1, limit_val_batches=0,
            logger=False, enable_checkpointing=False, default_root_dir=work, **quiet,
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
        found[stage] = Taken(meter.seconds, meter.device_peak_bytes / 2**30)
        print(f"{shapes}, {layers} layers: {stage} {found[stage].seconds:.1f} s", flush=True)
    shutil.rmtree(work)
    shutil.rmtree(model)
    return found


def foreseen(
    shapes: str, layers: int, windows: int, args: argparse.Namespace, stages: tuple[str, ...]
) -> dict[str, Taken]:
    """What a model of many layers would take, from one and two of them: what the second adds is added again."""
    one, two = (road(shapes, n, windows, args, stages) for n in (1, 2))
    return {
        stage: Taken(*(a + (layers - 1) * max(b - a, 0) for a, b in zip(one[stage], two[stage], strict=True)))
        for stage in stages
    }


def fit(args: argparse.Namespace) -> float:
    """Seconds of `kurtail fit` on random weights of SmolLM2's shapes: KurTail with GPTQ, evaluated."""
    shapes, layers = ("tiny", 2) if args.dry_run else ("smollm2-135m", 30)
    model = random_model(shapes, layers, args.work / "smollm2", args.device)
    windows = 8 if args.dry_run else 64
    text = str(word_text(args.work / "words.txt", 2 * windows * args.seqlen).absolute())
    cut = {"windows": windows, "seqlen": args.seqlen}
    texts = {
        "data.init_args.capture.text": {"source": text, **cut},
        "quantization.text": cut,
        "evaluation.text": {"source": text, "windows": 4, "seqlen": args.seqlen},
    }
    settings = {
        "data.init_args.capture.model": model.absolute(),
        "data.init_args.steps": args.steps,
        **(SMALL if args.dry_run else {}),
        "data.init_args.compute.dtype": args.dtype,
        **{f"{text}.{name}": value for text, cut in texts.items() for name, value in cut.items()},
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    before = time.monotonic()
    subprocess.run([sys.executable, "-m", "kurtail_pl", "fit", *flags], cwd=args.work, check=True)
    return time.monotonic() - before
