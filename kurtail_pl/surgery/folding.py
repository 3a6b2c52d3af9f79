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


def fold_norm(norm: nn.Module, readers: Iterable[nn.Module]) -> None:
    """Multiply a norm's weight into what reads it, linears or a router; the norm's weight becomes one."""
    weight = cast(Tensor, norm.weight)
    for reader in readers:
        cast(Tensor, reader.weight).data *= weight.data
    weight.data = torch.ones_like(weight.data)


def fold_layer_norms(layer: nn.Module, architecture: Architecture) -> None:
    """Fold both norms of a decoder layer."""
    pairs = (
        (architecture.attention_norm, architecture.attention_readers),
        (architecture.mlp_norm, mlp_norm_readers(layer, architecture)),
    )
    for norm, readers in pairs:
        fold_norm(layer.get_submodule(norm), [layer.get_submodule(name) for name in readers])


def mlp_norm_readers(layer: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """All that reads the MLP norm: linears and, in a mixture, the router."""
    router = () if architecture.router is None else (architecture.router,)
    return (*router, *architecture.mlp_readers(layer))


def rotate_input(reader: nn.Module, rotation: Tensor) -> None:
    """``W <- W R``: a linear or router reads ``x R`` from now on."""
    weight = cast(Tensor, reader.weight)
    weight.data = weight.data @ rotation


def rotate_output(linear: nn.Linear, rotation: Tensor) -> None:
    """``W <- R^T W``, ``b <- R^T b``: the linear writes ``y R`` from now on."""
    linear.weight.data = rotation.T @ linear.weight.data
    if linear.bias is not None:
        linear.bias.data = rotation.T @ linear.bias.data


def rotate_residual(layer: nn.Module, architecture: Architecture, rotation: Tensor) -> None:
    """R1 into a decoder layer whose norms are folded: what reads the residual stream, and what writes it."""
    for name in (*architecture.attention_readers, *mlp_norm_readers(layer, architecture)):
        rotate_input(layer.get_submodule(name), rotation)
    for name in (architecture.output, *architecture.mlp_writers(layer)):
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
    projected, heads = value.weight.shape[0] // head_dim, output.weight.shape[1] // head_dim
    fused = architecture.value == architecture.query
    kv_heads = (projected - heads) // 2 if fused else projected
    per_head = rotation.expand(kv_heads, head_dim, head_dim)
    # In place, on the values' rows: the last ones where queries and keys stand in the same weight.
    weight = value.weight.data[-kv_heads * head_dim :]
    weight.copy_((per_head.mT @ weight.view(kv_heads, head_dim, -1)).flatten(0, 1))
    if value.bias is not None:
        bias = value.bias.data[-kv_heads * head_dim :]
        bias.copy_((per_head.mT @ bias.view(kv_heads, head_dim, 1)).flatten())
    by_head = output.weight.data.view(-1, heads, 1, head_dim)
    output.weight.data = (by_head @ per_head.repeat_interleave(heads // kv_heads, 0)).flatten(1)


def absorb_online(linear: nn.Linear, rotation: HadamardFactors) -> None:
    """Fuse the inverse of an online rotation (R4, R5) into the linear whose input is rotated: ``W <- W H``."""
    linear.weight.data = hadamard_transform(linear.weight.data, rotation)
