"""How much an error in a block's input changes the residual stream: what each site may count when R1 is learned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.keys import tokens_sha256
from kurtail_pl.storage.resume import resumable_work
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.architecture import Architecture

TOKENS = 2048
"""Of the text, at most: every layer runs over them three times."""
NOISE = 0.01
"""Energy of the noise in a block's input relative to the input's, about that of four bits."""


def block_effects(
    checkpoint: Checkpoint, windows: Tensor, seed: int, compute: Compute = AUTO, ranks: Ranks = ALONE
) -> Tensor:
    """Energy that noise in each block's input brings into the stream, per relative energy of the noise.

    The noise is that of a rounded, rotated input: alike in all channels of what the norm gives before its weight. Its
    effect is taken where the decoder layer ends, each token's relative to the energy of that token's states.

    Args:
        checkpoint: the vanilla model.
        windows: of tokens, ``[any number, any length]``; the first `TOKENS` are used.
        seed: of the noise.
        compute: device and floating-point type of the layers.
        ranks: the first process measures for all.

    Returns:
        ``[2 layers]`` in the order of `block_sites`, float64 on the CPU.
    """
    found = torch.zeros(2 * checkpoint.config.num_hidden_layers, dtype=torch.float64)
    if ranks.leads:
        found += _measured(checkpoint, windows[: max(1, TOKENS // windows.shape[1]), :TOKENS], seed, compute)
    return ranks.sum(found)


@torch.no_grad()
def _measured(checkpoint: Checkpoint, windows: Tensor, seed: int, compute: Compute) -> Tensor:
    recipe = {"model_sha256": checkpoint.sha256, "tokens_sha256": tokens_sha256(windows), "seed": seed}
    with resumable_work({**recipe, "noise": NOISE, "dtype": compute.dtype}) as work:
        walker = Walker(checkpoint, dtype=compute.torch_dtype, device=compute.torch_device)
        hidden = walker.hidden_states(windows, work)
        effects: list[float] = work.state.setdefault("effects", [])
        for index, layer in walker.layers("effect of each block's input", work):
            generator = torch.Generator().manual_seed(seed * walker.n_layers + index)
            hidden.after.fill(walker.advance(layer, states) for states in hidden.before)
            for name in (walker.architecture.attention_norm, walker.architecture.mlp_norm):
                with _noise(layer.get_submodule(name), walker.architecture, generator):
                    noisy = [walker.advance(layer, states) for states in hidden.before]
                effects.append(_change(noisy, hidden.after) / NOISE)
        return torch.tensor(effects, dtype=torch.float64)


@contextmanager
def _noise(norm: nn.Module, architecture: Architecture, generator: torch.Generator) -> Iterator[None]:
    """Noise in what R1 turns, alike in all its channels: what a norm gives before its weight, or behind it."""

    def add(norm: nn.Module, _: object, output: Tensor) -> Tensor:
        gain = cast(Tensor, norm.weight) + architecture.norm_offset
        if architecture.rigid_residual is not None:
            gain = output.square().mean(-1, keepdim=True).sqrt()
        noise: Tensor = torch.randn(output.shape, generator=generator).to(output) * gain
        return output + math.sqrt(NOISE) * noise

    handle = norm.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _change(noisy: Iterable[Tensor], clean: Iterable[Tensor]) -> float:
    """Mean over the tokens of the change's energy over the states', both ``[1, tokens, hidden]`` a window."""
    pairs = [(a.double(), b.double()) for a, b in zip(noisy, clean, strict=True)]
    ratios = [(a - b).square().sum(-1) / b.square().sum(-1) for a, b in pairs]
    change: float = torch.cat(ratios, 1).mean().item()
    return change
