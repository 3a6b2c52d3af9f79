"""How much the errors of each decoder layer's weights hurt, measured.

Noise of a known size in one layer at a time gives the ``alpha_l`` of the linearity theorem (HIGGS, arXiv 2411.17525,
Theorem 1), by which `methods.tuners.sensitive_bits` spends an average of bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kurtail_pl.artefact.skeleton import skeleton
from kurtail_pl.methods.cost import Cost, Sizes
from kurtail_pl.metrics import Perplexity
from kurtail_pl.progress import track
from kurtail_pl.ranks import Ranks
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.keys import model_key, tokens_sha256
from kurtail_pl.storage.resume import Workplace, resumable_work
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.hidden import MappedStates
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.linear import QuantizedLinear

log = logging.getLogger(__name__)

WINDOWS, TOKENS = 4, 256
"""Of the calibration text, at most: a layer's noise is felt in all that follow, which costs half a forward of the model
for each of the layers."""
NOISE = 0.01
"""Relative square size of the noise, about that of four bits."""


def cost(sizes: Sizes) -> Cost:
    """Of measuring: the windows with each layer's noise and its negative, on average through half the layers."""
    copies, tokens = 1 + 2 * sizes.layers, WINDOWS * TOKENS
    states = 2 * copies * tokens * sizes.hidden * sizes.value
    return Cost(
        before=states + 2 * sizes.layer * sizes.value,
        states=states,
        flops=copies * (sizes.forward(tokens, TOKENS) / 2 + 2.0 * tokens * sizes.embedding),
    )


def sensitivities(
    checkpoint: Checkpoint, windows: Tensor, seed: int, compute: Compute, work: Workplace, ranks: Ranks
) -> list[float]:
    """`measured_sensitivities`, by the first process for all; work that is taken up again has them in its state."""
    if "sensitivities" not in work.state:
        found = torch.zeros(checkpoint.config.num_hidden_layers, dtype=torch.float64)
        if ranks.leads:
            found += torch.tensor(measured_sensitivities(checkpoint, windows, seed, compute), dtype=torch.float64)
        work.state["sensitivities"] = ranks.sum(found).tolist()
    remembered: list[float] = work.state["sensitivities"]
    return remembered


@torch.no_grad()
def measured_sensitivities(checkpoint: Checkpoint, windows: Tensor, seed: int, compute: Compute = AUTO) -> list[float]:
    """Each layer's ``alpha_l``: growth of the mean negative log-likelihood per relative square error of its weights.

    All the layer's linears get normal noise at once, and then its negative: the mean of both has no term of first
    order. All copies of the hidden states go through the model together, so that it is read once.

    Args:
        checkpoint: a fused model.
        windows: of tokens, ``[any number, any length]``; the first `WINDOWS` and `TOKENS` are used.
        seed: of the noise.
        compute: device and floating-point type of the layers.

    Returns:
        ``alpha_l`` of every layer; below zero where noise helped.
    """
    windows = windows[:WINDOWS, :TOKENS]
    recipe = {**model_key(checkpoint), "tokens_sha256": tokens_sha256(windows), "noise": NOISE, "seed": seed}
    with resumable_work({**recipe, "dtype": compute.dtype}) as work:
        walker = Walker(checkpoint, skeleton(checkpoint), compute.torch_dtype, compute.torch_device)
        # The windows as they are, then twice for every layer: with its noise, and with the negative of it.
        copies, count = 1 + 2 * walker.n_layers, len(windows)
        hidden = walker.hidden_states(windows.repeat(copies, 1), work)
        for index, layer in walker.layers("sensitivity of layers", work):
            hidden.after.fill(_advanced(walker, layer, index, hidden.before, count, seed))
        norm, head = walker.head()

        def loss(copy: int) -> float:
            metric = Perplexity(sync_on_compute=False).to(walker.device)
            for number, ids in enumerate(windows):
                states = hidden.before[copy * count + number]
                metric.update(walker.logits(norm, head, states), ids.unsqueeze(0).to(walker.device))
            return metric.compute().log().item()

        plain, *noisy = [loss(copy) for copy in track(range(copies), "loss with each layer's noise")]
    return [((up + down) / 2 - plain) / NOISE for up, down in zip(noisy[::2], noisy[1::2], strict=True)]


def _advanced(
    walker: Walker, layer: nn.Module, index: int, before: MappedStates, count: int, seed: int
) -> Iterator[Tensor]:
    """States after a layer: of all copies that noise has reached, and of two more, whose noise is in this layer."""
    for number in range(count * (1 + 2 * index)):
        yield walker.advance(layer, before[number])
    linears = [module for module in layer.modules() if isinstance(module, QuantizedLinear)]
    weights = [linear.dense_weight() for linear in linears]
    for sign in (1, -1):
        generator = torch.Generator().manual_seed(seed * walker.n_layers + index)
        for linear, weight in zip(linears, weights, strict=True):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            size = sign * (NOISE**0.5) * weight.norm() / noise.norm()
            linear.weight = nn.Parameter(weight + size * noise, requires_grad=False)
        for number in range(count):
            yield walker.advance(layer, before[number])
