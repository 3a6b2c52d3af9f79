"""Exact changes of a model's weights: norm weights folded away, rotations and scales of channels fused in.

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
from kurtail_pl.surgery.rotations import Rotations


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """A linear of a decoder layer."""
    return cast(nn.Linear, layer.get_submodule(name))


def fold_norm(norm: nn.Module, readers: Iterable[nn.Module], offset: float = 0.0) -> None:
    """Multiply what a norm multiplies by into what reads it, linears or a router; the norm then multiplies by one.

    Args:
        norm: of which it becomes the weight's sum with an offset.
        readers: of the norm.
        offset: that the family's norms add to their weights.
    """
    weight = cast(Tensor, norm.weight)
    for reader in readers:
        cast(Tensor, reader.weight).data *= weight.data + offset
    weight.data = torch.full_like(weight.data, 1 - offset)


def fold_layer_norms(layer: nn.Module, architecture: Architecture) -> None:
    """Fold both norms of a decoder layer."""
    for norm in (architecture.attention_norm, architecture.mlp_norm):
        fold_norm(layer.get_submodule(norm), norm_readers(layer, architecture, norm), architecture.norm_offset)


def norm_readers(layer: nn.Module, architecture: Architecture, norm: str) -> list[nn.Module]:
    """All that reads one of the two norms of a decoder layer, by its name: linears and, in a mixture, the router."""
    attends = norm == architecture.attention_norm
    names = architecture.attention_readers if attends else mlp_norm_readers(layer, architecture)
    return [layer.get_submodule(name) for name in names]


def mlp_norm_readers(layer: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """All that reads the MLP norm: linears and, in a mixture, the router."""
    router = architecture.router_of(layer)
    return (*(() if router is None else (router,)), *architecture.mlp_readers(layer))


def rotate_input(reader: nn.Module, rotation: Tensor) -> None:
    """``W <- W R``: a linear or router reads ``x R`` from now on."""
    weight = cast(Tensor, reader.weight)
    weight.data = weight.data @ rotation


def rotate_output(linear: nn.Linear, rotation: Tensor) -> None:
    """``W <- R^T W``, ``b <- R^T b``: the linear writes ``y R`` from now on."""
    linear.weight.data = rotation.T @ linear.weight.data
    if linear.bias is not None:
        linear.bias.data = rotation.T @ linear.bias.data


def residual_readers(layer: nn.Module, architecture: Architecture) -> tuple[str, ...]:
    """All that reads the residual stream, through either norm: linears and, in a mixture, the router."""
    return (*architecture.attention_readers, *mlp_norm_readers(layer, architecture))


def rotate_residual(layer: nn.Module, architecture: Architecture, rotation: Tensor) -> None:
    """R1 into a decoder layer whose norms are folded: what reads the residual stream, and what writes it."""
    for name in residual_readers(layer, architecture):
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
    per_head = per_kv_head(layer, architecture, rotation)
    value.weight.data = turn_values(value.weight.data, per_head)
    if value.bias is not None:
        value.bias.data = turn_values(value.bias.data.unsqueeze(1), per_head).squeeze(1)
    output.weight.data = turn_heads(output.weight.data, per_head)


def per_kv_head(layer: nn.Module, architecture: Architecture, rotation: Tensor) -> Tensor:
    """R2 of a layer as ``[kv_heads, head_dim, head_dim]``, also where all heads share one."""
    head_dim = rotation.shape[-1]
    value = cast(int, layer.get_submodule(architecture.value).out_features) // head_dim
    heads = cast(int, layer.get_submodule(architecture.output).in_features) // head_dim
    kv_heads = (value - heads) // 2 if architecture.value == architecture.query else value
    return rotation.expand(kv_heads, head_dim, head_dim)


def turn_values(weight: Tensor, per_head: Tensor) -> Tensor:
    """Value heads rotated in what writes them: ``[out, in]``, its last rows by ``[kv_heads, head_dim, head_dim]``.

    Queries and keys stand in the rows before, where one linear makes all three.
    """
    kv_heads, head_dim, _ = per_head.shape
    kept, values = weight[: -kv_heads * head_dim], weight[-kv_heads * head_dim :]
    return torch.cat([kept, (per_head.mT @ values.view(kv_heads, head_dim, -1)).flatten(0, 1)])


def turn_heads(weight: Tensor, per_head: Tensor) -> Tensor:
    """Value heads rotated in what reads them: ``[out, heads * head_dim]``, each query head by its KV head's."""
    kv_heads, head_dim, _ = per_head.shape
    by_head = weight.view(weight.shape[0], -1, head_dim).transpose(0, 1)
    # Heads first: the other way round, matmul makes a copy of the rotations for each row.
    return (by_head @ per_head.repeat_interleave(len(by_head) // kv_heads, 0)).transpose(0, 1).flatten(1)


def scale_values(layer: nn.Module, architecture: Architecture, scale: Tensor) -> None:
    """Multiply channels of the values in `v_proj` and divide them in `o_proj`, for all query heads of a group.

    Args:
        layer: decoder layer, its values not rotated yet.
        architecture: its record.
        scale: ``[kv_heads, head_dim]``.
    """
    value, output = linear_of(layer, architecture.value), linear_of(layer, architecture.output)
    group = output.in_features // scale.numel()
    # Where one linear makes all three, values come after queries and keys.
    _scale_rows(value, value.out_features - scale.numel(), scale.flatten())
    output.weight.data /= scale.repeat_interleave(group, 0).flatten()


def scale_keys(layer: nn.Module, architecture: Architecture, scale: Tensor) -> None:
    """Multiply channels of the keys and divide them in the queries of the group; scores stay what they are.

    Args:
        layer: decoder layer, without norms of single heads.
        architecture: its record.
        scale: ``[kv_heads, head_dim]``, equal for the two channels that RoPE turns together.
    """
    query, key = linear_of(layer, architecture.query), linear_of(layer, architecture.key)
    queries = linear_of(layer, architecture.output).in_features
    _scale_rows(query, 0, 1 / scale.repeat_interleave(queries // scale.numel(), 0).flatten())
    _scale_rows(key, queries if architecture.key == architecture.query else 0, scale.flatten())


def scaled_norm(weight: Tensor, scale: Tensor, architecture: Architecture) -> Tensor:
    """A norm's weight when what it gives is multiplied by a scale, both ``[hidden]``."""
    return (weight + architecture.norm_offset) * scale - architecture.norm_offset


def scale_norm(layer: nn.Module, architecture: Architecture, norm: str, scale: Tensor) -> None:
    """Multiply channels ``[hidden]`` in one of the two norms of a decoder layer and divide them in its readers."""
    weight = cast(Tensor, layer.get_submodule(norm).weight)
    weight.data = scaled_norm(weight.data, scale, architecture)
    for reader in norm_readers(layer, architecture, norm):
        cast(Tensor, reader.weight).data /= scale


def scale_hidden(layer: nn.Module, architecture: Architecture, mlp: str, scale: Tensor) -> None:
    """Multiply channels ``[width]`` of a gated MLP in its up projection and divide them in its down projection."""
    up = linear_of(layer, f"{mlp}.{architecture.up}")
    # Where one linear makes both, up comes after gate.
    _scale_rows(up, up.out_features - len(scale), scale)
    linear_of(layer, f"{mlp}.{architecture.down}").weight.data /= scale


def reorder_values(layer: nn.Module, architecture: Architecture, order: Tensor) -> None:
    """Write channels of the values in another order within their head, and read them so in `o_proj`.

    Args:
        layer: decoder layer, its values not rotated yet.
        architecture: its record.
        order: ``[kv_heads, head_dim]``, of each new place the channel that comes there.
    """
    value, output = linear_of(layer, architecture.value), linear_of(layer, architecture.output)
    group = output.in_features // order.numel()
    # Where one linear makes all three, values come after queries and keys.
    _reorder_rows(value, value.out_features - order.numel(), _in_heads(order))
    output.weight.data = output.weight.data[:, _in_heads(order.repeat_interleave(group, 0))]


def _in_heads(order: Tensor) -> Tensor:
    """Numbers of channels in their heads ``[heads, head_dim]`` as numbers among all, ``[heads * head_dim]``."""
    heads, head_dim = order.shape
    return (order + head_dim * torch.arange(heads, device=order.device).unsqueeze(1)).flatten()


def reorder_hidden(layer: nn.Module, architecture: Architecture, mlp: str, order: Tensor) -> None:
    """Write channels ``[width]`` of a gated MLP in another order, and read them so in its down projection."""
    # Where one linear makes both, up comes after gate.
    up, down = (linear_of(layer, f"{mlp}.{name}") for name in (architecture.up, architecture.down))
    if architecture.gate is not None:
        _reorder_rows(linear_of(layer, f"{mlp}.{architecture.gate}"), 0, order)
    _reorder_rows(up, up.out_features - len(order), order)
    down.weight.data = down.weight.data[:, order]


def flip_hidden(layer: nn.Module, architecture: Architecture, rotations: Rotations) -> bool:
    """Give the channels that R5 turns the signs that it has not itself; returns whether there are any."""
    flipped = False
    for mlp in architecture.gated_mlps(layer):
        down = linear_of(layer, f"{mlp}.{architecture.down}")
        factors = rotations.hidden(down.in_features)
        if factors is not None and factors.signs is not None:
            scale_hidden(layer, architecture, mlp, factors.signs.to(down.weight))
            flipped = True
    return flipped


def _scale_rows(linear: nn.Linear, first: int, scale: Tensor) -> None:
    """Multiply some rows of what a linear writes, the first of which is given."""
    rows = slice(first, first + len(scale))
    linear.weight.data[rows] *= scale.unsqueeze(1)
    if linear.bias is not None:
        linear.bias.data[rows] *= scale


def _reorder_rows(linear: nn.Linear, first: int, order: Tensor) -> None:
    """Reorder some rows of what a linear writes, the first of which is given."""
    rows = slice(first, first + len(order))
    linear.weight.data[rows] = linear.weight.data[rows][order]
    if linear.bias is not None:
        linear.bias.data[rows] = linear.bias.data[rows][order]


def absorb_online(linear: nn.Linear, rotation: HadamardFactors) -> None:
    """Fuse the inverse of an online rotation (R1, R4, R5) into the linear whose input is rotated: ``W <- W H``."""
    linear.weight.data = hadamard_transform(linear.weight.data, rotation)
