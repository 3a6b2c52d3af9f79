"""The five rotations of a model, under our names; the paper's numbers are in the docstring of `Rotations`."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kurtail_pl.errors import CheckpointError, ConfigError, require_seed
from kurtail_pl.maths.hadamard import (
    HadamardFactors,
    block_hadamard_factors,
    hadamard_transform,
    random_hadamard,
    random_hadamard_factors,
    widest_block,
)
from kurtail_pl.maths.orthogonal import random_signs
from kurtail_pl.methods.target import ONLINE, Online
from kurtail_pl.surgery.families import architecture_of, mlp_widths

BlockSize = int | Literal["widest"]
"""Channels that R4 and R5 mix with one another: a power of two, or the largest that divides each width."""


@dataclass(frozen=True)
class Rotations:
    """Rotations of one model; None where a rotation is not used. All orthogonal, float64, acting on row vectors.

    Args:
        residual: R1, residual stream, ``[hidden, hidden]``; fused into the weights.
        value: R2, value heads, ``[layers, head_dim, head_dim]`` (or ``[layers, kv_heads, head_dim, head_dim]``); fused.
        query_key: R3, queries and keys after RoPE, size head_dim; online, scores are unchanged.
        attention_output: R4, input of `o_proj`, size heads * head_dim; online, inverse fused.
        mlp_hidden: R5, input of `down_proj` (of every expert), size of the MLP's width; online, inverse fused.
        dense_hidden: the same for the dense layers of a mixture, where they are of another width than its experts.
        block_input: R1 of families whose residual stream cannot be turned: of each block input by itself, in the order
            of the model (attention and MLP of each layer), a stack of size hidden; online, inverse fused.
        origin: how they came about (seed, settings, cost), as plain data for JSON.
    """

    residual: Tensor | None = None
    value: Tensor | None = None
    query_key: HadamardFactors | None = None
    attention_output: HadamardFactors | None = None
    mlp_hidden: HadamardFactors | None = None
    dense_hidden: HadamardFactors | None = None
    block_input: HadamardFactors | None = None
    origin: dict[str, Any] = field(default_factory=dict)

    def hidden(self, width: int) -> HadamardFactors | None:
        """R5 of the gated MLPs of a width.

        Raises:
            CheckpointError: when there is an R5, and none of that width.
        """
        found = [factors for factors in (self.mlp_hidden, self.dense_hidden) if factors is not None]
        fits = next((factors for factors in found if factors.size == width), None)
        if found and fits is None:
            raise CheckpointError(
                f"R5 is of size {' and '.join(str(factors.size) for factors in found)} and an MLP of this model has "
                f"{width} channels; give the rotations of this model"
            )
        return fits

    def keeping(self, online: Collection[Online] | None) -> Rotations:
        """These without the online rotations that are not named, R5 for MLPs of every width; None names them all."""
        if online is None:
            return self
        hidden = "mlp_hidden" in online
        return replace(
            self,
            query_key=self.query_key if "query_key" in online else None,
            attention_output=self.attention_output if "attention_output" in online else None,
            mlp_hidden=self.mlp_hidden if hidden else None,
            dense_hidden=self.dense_hidden if hidden else None,
        )

    @property
    def online(self) -> list[Online]:
        """Those that act at run time."""
        return [name for name in ONLINE if getattr(self, name) is not None]

    @property
    def turns_inputs(self) -> bool:
        """Whether what block inputs' readers read is turned by R1, in the weights or at run time."""
        return self.residual is not None or self.block_input is not None

    def turn_input(self, rows: Tensor, site: int) -> Tensor:
        """Rows ``[..., hidden]`` of one block input, of `block_input`'s order, behind its norm, turned by R1."""
        if self.residual is not None:
            return rows @ self.residual.to(rows)
        return rows if self.block_input is None else hadamard_transform(rows, self.block_input.of(site))

    @property
    def any_online(self) -> bool:
        """Whether one of them acts at run time."""
        hidden = self.mlp_hidden, self.dense_hidden
        return any(r is not None for r in (self.query_key, self.attention_output, *hidden, self.block_input))


def head_dim_of(config: PretrainedConfig) -> int:
    """Size of an attention head; some configurations leave it to be derived."""
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_dim


def random_rotations(
    config: PretrainedConfig, seed: int, block_size: BlockSize | None = None, block: int | None = None
) -> Rotations:
    """Random Hadamards everywhere: QuaRot's rotations, and the start of KurTail's learned ones.

    The online ones (R3, R4, R5) are shared by all layers and depend on the seed alone, so that a learned and a random
    R1 with the same seed are compared with the same online rotations.

    Args:
        config: of the model.
        seed: decides all signs.
        block_size: of R4 and R5 in blocks, whose signs are fused: R5's into what it turns, if that can be multiplied,
            R4's are R2's.
        block: of R1 and R2 in blocks, see `random_fused`.

    Raises:
        ConfigError: when the model's widths are no multiples of the blocks.
    """
    heads, head_dim = config.num_attention_heads, head_dim_of(config)
    width, *dense = mlp_widths(config)
    require_seed("the rotations' seed", seed)
    online = torch.Generator().manual_seed(seed)
    blocks, sizes = block_size is not None, {"block_size": block_size, "block": block}
    residual, value = random_fused(
        config.num_hidden_layers, config.hidden_size, head_dim, seed, turned_back=blocks, block=block
    )
    rigid = architecture_of(config).rigid_residual is not None
    query_key = random_hadamard_factors(head_dim, online)

    def drawn(name: str, n: int, signs: bool) -> HadamardFactors:
        if block_size is None:
            return random_hadamard_factors(n, online)
        factors = _blocks_of(name, n, block_size)
        return replace(factors, signs=random_signs(n, online)) if signs else factors

    # Signs are fused where the channels are written, and there must be such a place.
    signs = architecture_of(config).rigid_hidden is None
    return Rotations(
        residual=None if rigid else residual,
        value=value,
        query_key=query_key,
        attention_output=drawn("R4", heads * head_dim, signs=False),
        mlp_hidden=drawn("R5", width, signs),
        dense_hidden=drawn("R5", dense[0], signs) if dense else None,
        block_input=random_inputs(config.num_hidden_layers, config.hidden_size, seed, block) if rigid else None,
        origin={"seed": seed} | {name: size for name, size in sizes.items() if size is not None},
    )


def random_inputs(layers: int, hidden_size: int, seed: int, block: int | None = None) -> HadamardFactors:
    """Random Hadamards that R1 of each block input is, or starts from: a stack ``[2 layers]``.

    Args:
        layers: of the model.
        hidden_size: of the residual stream.
        seed: decides the signs.
        block: neighbouring channels that are mixed, a power of two that divides the stream; None mixes all.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    drawn = [random_hadamard_factors(hidden_size, generator, block) for _ in range(2 * layers)]
    left, right = (torch.stack([getattr(each, side) for each in drawn]) for side in ("left", "right"))
    return replace(drawn[0], left=left, right=right)


def require_blocks(config: PretrainedConfig, block_size: BlockSize) -> None:
    """Raise ConfigError when a model has no R4 or R5 in such blocks."""
    _blocks_of("R4", config.num_attention_heads * head_dim_of(config), block_size)
    for width in mlp_widths(config):
        _blocks_of("R5", width, block_size)


def require_aligned(block: int, groups: Mapping[str, int | None]) -> None:
    """Raise ConfigError, naming the setting, unless groups of inputs hold whole blocks of R1, or blocks whole groups.

    Args:
        block: of R1.
        groups: of what R1 turns, the size of each by the setting that holds it; None shares a scale among all inputs.
    """
    for name, size in groups.items():
        if size is not None and size % block and block % size:
            raise ConfigError(
                f"block is {block} and {name} has groups of {size} inputs, whose borders lie inside of blocks; give a "
                "block that divides the groups, or is a multiple of them"
            )


def _blocks_of(name: str, n: int, block_size: BlockSize, setting: str = "block_size") -> HadamardFactors:
    """A rotation in blocks of a model's width."""
    block = widest_block(n) if block_size == "widest" else block_size
    if block < 2 or block & (block - 1) or n % block:
        widest = ", widest" if setting == "block_size" else ""
        raise ConfigError(
            f"{setting} is {block_size}, and {name} turns {n} channels in blocks of a power of two that divides "
            f"them; give one from 2 to {widest_block(n)}{widest}, or null for one of all channels"
        )
    return block_hadamard_factors(n, block)


def random_fused(
    layers: int,
    hidden_size: int,
    head_dim: int,
    seed: int,
    kv_heads: int | None = None,
    turned_back: bool = False,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Random Hadamards that R1 and R2 are, or start from.

    Args:
        layers: of the model.
        hidden_size: of the residual stream.
        head_dim: of a head.
        seed: decides the signs.
        kv_heads: their number, where each has an R2.
        turned_back: whether an R4 without signs follows, which alone would undo R2's Hadamard: channels of R2 have
            random signs then.
        block: neighbouring channels that R1 mixes, a power of two; R2 mixes those of a head that lie in one block of
            what `o_proj` reads. None mixes all.

    Returns:
        R1 ``[hidden, hidden]`` and every layer's R2 ``[layers, head_dim, head_dim]``, or one for each KV head when
        their number is given, ``[layers, kv_heads, head_dim, head_dim]``; float64.

    Raises:
        ConfigError: when the block is no power of two that divides the residual stream.
    """
    require_seed("the rotations' seed", seed)
    generator = torch.Generator().manual_seed(seed + 1)
    in_head = None
    if block is not None:
        _blocks_of("R1", hidden_size, block, "block")
        in_head = math.gcd(block, head_dim)
    residual = random_hadamard(hidden_size, generator, block)
    value = torch.stack([random_hadamard(head_dim, generator, in_head) for _ in range(layers * (kv_heads or 1))])
    if turned_back:
        value = value * random_signs(head_dim, generator)
    return residual, value if kv_heads is None else value.view(layers, kv_heads, head_dim, head_dim)
