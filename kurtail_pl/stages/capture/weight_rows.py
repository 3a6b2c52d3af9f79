"""Rows of the weights that read the residual stream: R1 turns them as it turns the stream, and they are rounded too."""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.folding import fold_layer_norms, linear_of


@torch.no_grad()
def weight_rows(checkpoint: Checkpoint, rows: int, seed: int, compute: Compute = AUTO) -> Tensor:
    """Rows, one an output channel, of all linears that read each block input; the norm's weight is folded in.

    Args:
        checkpoint: the vanilla model.
        rows: of each block input, drawn with replacement.
        seed: decides which.
        compute: device that folds; always in float32.

    Returns:
        ``[2 layers, rows, hidden]`` in the order of `block_sites`, float32 on the CPU.
    """
    walker, found = Walker(checkpoint, device=compute.torch_device), []
    generator = torch.Generator().manual_seed(seed)
    for _, layer in walker.layers("weights that read the residual stream"):
        if walker.architecture.rigid_residual is None:
            fold_layer_norms(layer, walker.architecture)
        for readers in (walker.architecture.attention_readers, walker.architecture.mlp_readers(layer)):
            weights = [linear_of(layer, name).weight for name in readers]
            chosen = torch.randint(sum(len(w) for w in weights), (rows,), generator=generator)
            found.append(_rows(weights, chosen.sort().values))
    return torch.stack(found)


def _rows(weights: list[Tensor], numbers: Tensor) -> Tensor:
    """Rows of matrices that stand one below the other, without a copy of all of them; the numbers are sorted."""
    parts, first = [], 0
    for weight in weights:
        own = numbers[(numbers >= first) & (numbers < first + len(weight))] - first
        parts.append(weight[own.to(weight.device)].cpu())
        first += len(weight)
    return torch.cat(parts)
