"""Exact changes of a model's weights: norm weights folded away, rotations fused in.

Rows are activations: a linear is ``y = x W^T`` with ``W [out, in]``, so rotating what it reads is ``W R`` and rotating
what it writes is ``R^T W``. Everything here expects float64 weights; the caller casts once, at the end. The embedding
is never centred: that is right for LayerNorm and changes an RMSNorm model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from kurtail_pl.maths.hadamard import HadamardFactors, hadamard_transform
from kurtail_pl.surgery.architecture import Architecture


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """A linear of a decoder layer."""
    return cast(nn.Linear, layer.get_submodule(name))


def fold_norm(norm: nn.Module, readers: Iterable[nn.Linear]) -> None:
    """Multiply a norm's weight into the linears that read it; the norm's weight becomes one."""
    weight = cast(Tensor, norm.weight)
    for linear in readers:
        linear.weight.data *= weight.data
    weight.data = torch.ones_like(weight.data)


def fold_layer_norms(layer: nn.Module, architecture: Architecture) -> None:
    """Fold both norms of a decoder layer."""
    pairs = (
        (architecture.attention_norm, architecture.attention_readers),
        (architecture.mlp_norm, architecture.mlp_readers),
    )
    for norm, readers in pairs:
        fold_norm(layer.get_submodule(norm), [linear_of(layer, name) for name in readers])


def rotate_input(linear: nn.Linear, rotation: Tensor) -> None:
    """``W <- W R``: the linear reads ``x R`` from now on."""
    linear.weight.data = linear.weight.data @ rotation


def rotate_output(linear: nn.Linear, rotation: Tensor) -> None:
    """``W <- R^T W``, ``b <- R^T b``: the linear writes ``y R`` from now on."""
    linear.weight.data = rotation.T @ linear.weight.data
    if linear.bias is not None:
        linear.bias.data = rotation.T @ linear.bias.data


def rotate_residual(layer: nn.Module, architecture: Architecture, rotation: Tensor) -> None:
    """R1 into a decoder layer whose norms are folded: what reads the residual stream, and what writes it."""
    for name in (*architecture.attention_readers, *architecture.mlp_readers):
        rotate_input(linear_of(layer, name), rotation)
    for name in (architecture.output, architecture.down):
        rotate_output(linear_of(layer, name), rotation)


def rotate_values(layer: nn.Module, architecture: Architecture, rotation: Tensor) -> None:
    """R2 into `v_proj` and, inverted, into `o_proj`; the query heads of a group share their KV head's rotation.

    Args:
        layer: decoder layer.
        architecture: its record.
        rotation: ``[head_dim, head_dim]`` for all heads, or ``[kv_heads, head_dim, head_dim]``.
    """
    value, output = linear_of(layer, architecture.value), linear_of(layer, architecture.output)
    head_dim = rotation.shape[-1]
    kv_heads, heads = value.weight.shape[0] // head_dim, output.weight.shape[1] // head_dim
    per_head = rotation.expand(kv_heads, head_dim, head_dim)
    value.weight.data = (per_head.mT @ value.weight.data.view(kv_heads, head_dim, -1)).flatten(0, 1)
    if value.bias is not None:
        value.bias.data = (per_head.mT @ value.bias.data.view(kv_heads, head_dim, 1)).flatten()
    by_head = output.weight.data.view(-1, heads, 1, head_dim)
    output.weight.data = (by_head @ per_head.repeat_interleave(heads // kv_heads, 0)).flatten(1)


def absorb_online(linear: nn.Linear, rotation: HadamardFactors) -> None:
    """Fuse the inverse of an online rotation (R4, R5) into the linear whose input is rotated: ``W <- W H``."""
    linear.weight.data = hadamard_transform(linear.weight.data, rotation)
