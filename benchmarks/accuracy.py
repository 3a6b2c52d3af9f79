"""Perplexity of KurTail against QuaRot, over seeds of the random Hadamard, at one or more step sizes.

    python benchmarks/accuracy.py --calibration wiki.train.raw --evaluation wiki.test.raw --seeds 0 1 2

Appends one JSON line for each model measured to the output file and skips what stands there already, so that an
interrupted run goes on. `summary` prints the mean ratios.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import lightning as L

from kurtail_pl.lit import ActivationDataModule, KurTailModule
from kurtail_pl.methods import GPTQ, RTN, Rounder
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.stages.capture.stage import CaptureSpec
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.evaluation.results import block_kurtosis
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.rotations import Rotations, random_rotations

ROUNDED: dict[str, tuple[Scheme, Rounder]] = {
    "rtn": (Scheme(), RTN()),
    "w16": (Scheme(weights=None), RTN()),
    "gptq": (Scheme(), GPTQ()),
}


def learn(data: ActivationDataModule, seed: int, lr: float, log: dict[str, float]) -> Rotations:
    """Learned R1 and R2; what it cost and the final kurtosis go into the log."""
    module = KurTailModule(data.sizes, rotation_seed=seed, optimizer=partial(CayleyAdam, lr=lr, q=0.15))
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, num_sanity_val_steps=0
    )
    with Meter() as meter:
        trainer.fit(module, data)
    log.update(learn_seconds=meter.seconds, learn_cpu_seconds=meter.cpu_seconds)
    residual, value = module.learned()
    return replace(random_rotations(data.checkpoint.config, seed), residual=residual, value=value)


def measure(args: argparse.Namespace, data: ActivationDataModule, method: str, seed: int, lr: float) -> None:
    """All weight settings of one set of rotations."""
    done = {(r["method"], r["seed"], r["lr"], r["weights"]) for r in read(args.output)}
    wanted = [w for w in args.weights if (method, seed, lr, w) not in done]
    if not wanted:
        return
    log: dict[str, float] = {}
    checkpoint = data.checkpoint
    rotations = random_rotations(checkpoint.config, seed) if method == "quarot" else learn(data, seed, lr, log)
    rows = data.store.origin.rows
    kurtosis = block_kurtosis(data.store, rotations, rows - data.validation_rows, rows, data.rms_norm_eps)
    fused = fuse(checkpoint, rotations, method, args.work / "fused", overwrite=True)
    for weights in wanted:
        scheme, rounder = ROUNDED[weights]
        spec = QuantizeSpec(
            scheme=scheme,
            rounder=rounder,
            text=TextSpec(args.calibration, 16, 1024),
            quantized_activations=args.quantized_activations,
            seed=seed,
        )
        with Meter() as meter:
            folder = quantize(fused, spec, args.work / "artefact", overwrite=True)
        value = perplexity(Checkpoint(folder), TextSpec(args.evaluation, args.windows, args.seqlen))["perplexity"]
        line = {"method": method, "seed": seed, "lr": lr, "weights": weights, "perplexity": value,
                "kurtosis": kurtosis.mean().item(), "kurtosis_max": kurtosis.max().item(),
                "quantize_cpu_seconds": meter.cpu_seconds, **log}  # fmt: skip
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
    shutil.rmtree(args.work / "artefact")


def read(path: Path) -> list[dict[str, float]]:
    """Lines measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def summary(path: Path) -> None:
    """Mean perplexity over seeds, and KurTail's over QuaRot's."""
    lines = read(path)
    for weights in ROUNDED:
        reference = [r["perplexity"] for r in lines if r["method"] == "quarot" and r["weights"] == weights]
        for lr in sorted({r["lr"] for r in lines if r["method"] == "kurtail"}):
            own = [r for r in lines if r["method"] == "kurtail" and r["weights"] == weights and r["lr"] == lr]
            if own and reference:
                value = mean(r["perplexity"] for r in own)
                print(
                    f"{weights}: QuaRot {mean(reference):.2f} ({len(reference)} seeds), KurTail lr {lr} {value:.2f} "
                    f"({len(own)} seeds), ratio {value / mean(reference):.3f}, kurtosis {own[0]['kurtosis']:.3f}"
                )


def main() -> None:
    """Measure what is missing, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--evaluation", default="pydoc")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", default=[5.0])
    parser.add_argument("--weights", nargs="+", choices=ROUNDED, default=list(ROUNDED))
    parser.add_argument("--quantized-activations", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy/results.jsonl"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    capture = CaptureSpec(args.model, TextSpec(args.calibration, 512, 64), rows=9216)
    data = ActivationDataModule(capture, str(args.work / "store"))
    data.setup("fit")
    for seed in args.seeds:
        measure(args, data, "quarot", seed, 0.0)
        for lr in args.lr:
            measure(args, data, "kurtail", seed, lr)
    summary(args.output)


if __name__ == "__main__":
    main()
