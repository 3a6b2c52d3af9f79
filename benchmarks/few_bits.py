"""What weights in 2 and 3 bits lose in their linears' outputs, beside the bits of all that is stored of them.

    python benchmarks/few_bits.py --model jittered.gguf --calibration wiki.train.raw --evaluation wiki.valid.raw

The linears of three layers of a float model, each by itself: GPTQ sees their inputs on one text, and the error is that
on another, ``tr(E H E^T) / tr(W H W^T)``, its geometric mean over the linears. One processor takes about four minutes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.methods import GPTQ, RTN, Format, Mixed, Moments, Normal, Rounder, Side, Skim, Sparse, Uniform
from kurtail_pl.methods.format import Buffer
from kurtail_pl.stages.text import TextSpec, cut_windows
from kurtail_pl.storage.sources import open_model

LAYERS = (1, 14, 27)
CALIBRATION, EVALUATION, TOKENS = 8, 4, 512
"""Windows of both texts, and tokens in each."""
ROWS: dict[str, tuple[Format, Rounder, Side | None]] = {
    "2 bits, groups of 64": (Uniform(2, False, 64), GPTQ(), None),
    "2 bits, groups of 32": (Uniform(2, False, 32), GPTQ(), None),
    "2 bits, groups of 32, a sparse side": (Uniform(2, False, 32), GPTQ(), Sparse(0.005)),
    "mixed, all in 2 bits": (Mixed(2.0), GPTQ(), None),
    "mixed, 2.2": (Mixed(2.2), GPTQ(), None),
    "mixed, 2.2, a sparse side": (Mixed(2.2), GPTQ(), Sparse(0.005)),
    "mixed, 2.4": (Mixed(2.4), GPTQ(), None),
    "mixed, 2.6": (Mixed(2.6), GPTQ(), None),
    "skim, 2": (Skim(2.0), GPTQ(), None),
    "skim, 2.5": (Skim(2.5), GPTQ(), None),
    "3 bits, rows": (Uniform(3, False), GPTQ(), None),
    "3 bits, rows, a sparse side": (Uniform(3, False), GPTQ(), Sparse(0.005)),
    "3 bits, groups of 64": (Uniform(3, False, 64), GPTQ(), None),
    "3 bits, normal levels, rows": (Normal(3), GPTQ(), None),
    "skim, 3": (Skim(3.0), GPTQ(), None),
    "skim, 3, a sparse side": (Skim(3.0), GPTQ(), Sparse(0.005)),
    "skim, 3, rounded to nearest": (Skim(3.0), RTN(), None),
}


@torch.no_grad()
def inputs_of(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """``X^T X`` of what each linear of those layers reads, ``[in, in]``, by its name."""
    found: dict[str, Tensor] = {}
    for name, module in linears_of(model).items():

        def add(module: nn.Module, read: tuple[Tensor, ...], name: str = name) -> None:
            x = read[0].flatten(0, 1).double()
            found[name] = found.get(name, 0) + x.T @ x

        module.register_forward_pre_hook(add)
    for ids in windows:
        model(input_ids=ids[None])
    for module in linears_of(model).values():
        module._forward_pre_hooks.clear()
    return found


def linears_of(model: nn.Module) -> dict[str, nn.Module]:
    """The linears of those layers."""
    places = tuple(f"model.layers.{layer}." for layer in LAYERS)
    return {name: module for name, module in model.named_modules() if name.startswith(places) and name.endswith("proj")}


def bytes_of(buffers: Mapping[str, Buffer]) -> int:
    """Of all tensors."""
    return sum(prod(buffer.shape) * buffer.dtype.itemsize for buffer in buffers.values())


@torch.no_grad()
def line(
    row: str, weights: Mapping[str, Tensor], calibration: Mapping[str, Tensor], evaluation: Mapping[str, Tensor]
) -> str:
    """Name, bits and error in percent."""
    form, rounder, side = ROWS[row]
    logs, stored = [], 0
    for name, weight in weights.items():
        hessian, seen, beside = calibration[name], evaluation[name], torch.zeros(()).double()
        if side is not None:
            beside = side.dense(side.fitted(weight, Moments(hessian, None), torch.zeros_like), weight.shape[1])
            stored += bytes_of(side.buffers(*weight.shape))
        rest = (weight.double() - beside).float()
        own = form.fitted(rest, hessian)
        lost = own.values(rounder.codes(rest, own, Moments(hessian, None))).double() + beside - weight.double()
        stored += bytes_of(form.buffers(*weight.shape))
        whole = weight.double()
        logs.append(float((((lost @ seen) * lost).sum() / ((whole @ seen) * whole).sum()).log()))
    bits = 8 * stored / sum(weight.numel() for weight in weights.values())
    return f"| {row} | {bits:.2f} | {100 * math.exp(sum(logs) / len(logs)):.2f} |"


def main() -> None:
    """Print a line of a table for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="draws the calibration windows")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    given = parser.parse_args()
    checkpoint = open_model(given.model)
    model = whole_model(checkpoint)
    texts = [
        cut_windows(checkpoint, TextSpec(str(path), count, TOKENS), role, seed=given.seed).tokens
        for path, count, role in (
            (given.calibration, CALIBRATION, "calibration"),
            (given.evaluation, EVALUATION, "evaluation"),
        )
    ]
    calibration, evaluation = (inputs_of(model, windows) for windows in texts)
    weights = {name: module.get_parameter("weight").detach() for name, module in linears_of(model).items()}
    print("| weights | bits | error in % |\n| --- | --- | --- |")
    for row in given.rows:
        print(line(row, weights, calibration, evaluation), flush=True)


if __name__ == "__main__":
    main()
