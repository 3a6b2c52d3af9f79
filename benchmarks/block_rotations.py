"""What small blocks lose: inputs of decoder layers by how R1 was made, and weights by their format.

    kurtail capture --spec.model smollm2-135m --spec.text.seqlen 64 --spec.text.windows 512 --out runs/store
    python benchmarks/block_rotations.py --store runs/store --format mxfp4
    python benchmarks/block_rotations.py --fused runs/smollm2-135m/quarot/fused

Blocks of R1 are as wide as the format's groups, start from Hadamards, and take 100 steps of Cayley Adam on 512 rows of
every fourth block input; errors are of rows that nothing was learned from. It needs one processor for a minute or two.
Weights are those of every tenth layer of a fused model, rounded to nearest.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.maths.kurtosis import kurtosis, rms_norm
from kurtail_pl.maths.objectives import objective_of, rounding_error
from kurtail_pl.maths.orthogonal import diagonal_blocks
from kurtail_pl.maths.quantizers import Quantizer, split_groups
from kurtail_pl.methods import MXFP4, NVFP4, NVINT4, Format, MXFP4Plus, Uniform
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.storage.activations import ActivationStore, block_sites

FORMATS = {
    "mxfp4": Quantizer(group_size=32, levels="e2m1", scales="e8m0"),
    "nvfp4": Quantizer(group_size=16, levels="e2m1", scales="e4m3"),
    "nvint4": Quantizer(group_size=16, scales="e4m3"),
}
WEIGHTS: tuple[Format, ...] = (MXFP4(), MXFP4Plus(), NVFP4(), NVINT4(), Uniform(group_size=32))
ROWS, HELD_OUT, BATCH, STEPS = 4096, 1024, 512, 100
TARGETS = {"kurtosis": (1.8, 3.0), "group_kurtosis": (1.8, 2.2, 2.8, 3.56, 4.2)}
EPS = 1e-5


def turned(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows ``[..., n]`` in groups ``[..., c, k]``, each times its block ``[c, k, k]``."""
    return torch.einsum("...ci,cij->...cj", split_groups(rows, blocks.shape[-1]), blocks)


def learned(sites: list[Tensor], start: Tensor, objective: Callable[[Tensor, Callable[..., Tensor]], Tensor]) -> Tensor:
    """Blocks after so many steps."""
    blocks = start.clone().requires_grad_()
    optimizer = CayleyAdam([blocks])
    for step in range(STEPS):
        first = step * BATCH % ROWS
        losses = [objective(turned(rows[first : first + BATCH], blocks), Tensor.mean) for rows in sites]
        (blocks.grad,) = torch.autograd.grad(torch.stack(losses).mean(), blocks)
        optimizer.step()
    return blocks.detach()


def line(name: str, blocks: Tensor, sites: list[Tensor], quantizer: Quantizer) -> str:
    """The mean error of held-out rows, in percent of their energy, and the mean kurtosis of their groups."""
    held_out = [turned(rows[-HELD_OUT:], blocks) for rows in sites]
    errors = [rounding_error(rows.flatten(-2), Tensor.mean, quantizer).item() for rows in held_out]
    kurtoses = [kurtosis(rows).mean().item() for rows in held_out]
    return f"| {name} | {100 * sum(errors) / len(errors):.3f} | {sum(kurtoses) / len(kurtoses):.2f} |"


def of_weights(fused: Path) -> None:
    """Print a line for each format: the error over the energy, in percent, mean over the linears."""
    tensors = {name: t for path in fused.glob("model*.safetensors") for name, t in load_file(path).items()}
    linears = [t.float() for name, t in tensors.items() if re.search(r"layers\.\d?0\..*proj\.weight$", name)]
    for weights in WEIGHTS:
        lost = [((weights.values(weights.nearest(w)) - w).square().sum() / w.square().sum()).item() for w in linears]
        print(f"| {weights.sentence()} | {100 * sum(lost) / len(lost):.3f} |", flush=True)


def of_inputs(folder: Path, name: str, seed: int) -> None:
    """Print a line for each way to turn."""
    store, quantizer = ActivationStore(folder), FORMATS[name]
    names = block_sites(store.shape.layers)[::4]
    sites = [rms_norm(store.read(site, 0, ROWS + HELD_OUT).float(), EPS) for site in names]
    width, size = sites[0].shape[-1], quantizer.group_size or 1
    draw = torch.Generator().manual_seed(seed)
    whole = random_hadamard(width, draw).float()[None]
    hadamard = diagonal_blocks(random_hadamard(width, draw, size), size).float()
    held = [rows @ whole[0] for rows in sites]
    nothing = torch.eye(size).expand(width // size, size, size)
    print(line("no rotation", nothing, sites, quantizer), flush=True)
    print(line("a Hadamard of all channels", nothing, held, quantizer), flush=True)
    print(line("Hadamards of blocks", hadamard, sites, quantizer), flush=True)
    for kind, targets in TARGETS.items():
        for target in targets:
            blocks = learned(sites, hadamard, objective_of(kind, target))
            print(line(f"learned, {kind} {target}", blocks, sites, quantizer), flush=True)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--format", choices=FORMATS, default="mxfp4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fused", type=Path)
    given = parser.parse_args()
    if given.fused is not None:
        of_weights(given.fused)
    if given.store is not None:
        of_inputs(given.store, given.format, given.seed)


if __name__ == "__main__":
    main()
