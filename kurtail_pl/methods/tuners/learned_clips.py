"""Learned clips: the ratios of a decoder layer's quantizers, trained together on what the float layer writes.

Windows of a text that the weights were not solved on go through the layer in float and again as it was quantized. Adam
brings the second output near the first, by a clip ratio for each site of activations, for the keys and for the values,
and by one for each scale of the weights, whose codes stay. (Matched and solved weights fit the very roundings of their
own calibration text: there any other clip looks worse than the one they had.) OmniQuant (arXiv 2308.13137, §3.2) learns
the clips of weights block by block before it rounds them. The gradients of one layer are held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import LearnedClip
from kurtail_pl.methods.cost import FLOAT32, KEPT_HIDDEN, KEPT_WIDE, Cost, Sizes
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import Block, ClipTuner, Packed, Site, Tuning, in_float, relative, require_clipped

Learned = Literal["activations", "keys", "values", "weights"]
BATCH = 4
"""Windows in a step."""
OF_SCALES = 0.5
"""How far a scale's ratio goes in one step, where a clip's goes 1: its codes stay."""
SMALLEST = 0.05
"""Of ratios: what is clipped to nothing has no gradient that leads back."""


@dataclass(frozen=True)
class LearnedClips(ClipTuner):
    """Clips learned on the output of each decoder layer in float, and the scales of its weights with them.

    Args:
        parts: ``activations``, ``keys``, ``values``: a ratio for each site, from the scheme's on, and at most 1;
            ``weights``: one for each scale of rounded weights, from 1 on.
        steps: of Adam for each decoder layer, their size falling linearly to nothing.
        lr: size of the first step: so far goes a ratio.
        windows: drawn from the calibration text apart from those that weights are solved on.
        seqlen: tokens in each.

    Raises:
        ConfigError: for no parts or unknown ones, or numbers that are not positive.
    """

    parts: list[Learned] = field(default_factory=lambda: ["activations", "keys", "values"])
    steps: int = 20
    lr: float = 0.01
    windows: int = 16
    seqlen: int = 256

    label = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise ConfigError(
                "clips.parts is empty; name some of activations, keys, values, weights, or write clips: null"
            )
        for name in ("steps", "lr", "windows", "seqlen"):
            value: float = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"clips.{name} is {value}; give a positive number, or write clips: null")

    def sentence(self) -> str:
        """Its parts."""
        return f"learned on each block's float output: {', '.join(self.parts)}"

    def require(self, scheme: Scheme, quantized_activations: bool) -> None:
        """There must be clips to learn, and scales that are plain numbers."""
        require_clipped(scheme, [p for p in self.parts if p != "weights"], quantized_activations, "clips.parts")
        if "weights" in self.parts and scheme.weights is None:
            raise ConfigError("clips.parts names weights and scheme.weights is null; give it, or leave weights out")
        if "weights" in self.parts and scheme.weights is not None and not scheme.weights.learnable:
            raise ConfigError(
                f"clips.parts names weights, and they are {scheme.weights.sentence()}, whose scales are no plain "
                "numbers; leave weights out"
            )

    def cost(self, sizes: Sizes) -> Cost:
        """One layer's training, and its windows' way through the model."""
        batch, tokens = BATCH * self.seqlen, self.windows * self.seqlen
        # A quantizer keeps what it read and how far it was from that; a weight is made of codes and scales.
        kept = 2 * batch * (KEPT_HIDDEN * sizes.hidden + KEPT_WIDE * sizes.widest) + 3 * sizes.layer
        return Cost(
            memory=kept * FLOAT32 + tokens * sizes.hidden * sizes.value,
            states=2 * tokens * sizes.hidden * sizes.value,
            flops=self.steps * 3 * sizes.forward(batch, self.seqlen) + 2 * sizes.forward(tokens, self.seqlen),
            again=True,
        )

    @property
    def own_windows(self) -> tuple[int, int]:
        """Of the calibration text."""
        return self.windows, self.seqlen

    def tuning(self, block: Block) -> Tuning:
        """The training of one layer."""
        return _Training(block, self)


class _Scaled(nn.Module):
    """Scales times ratios that learn."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.ratio = nn.Parameter(torch.ones_like(scale))

    def forward(self, scale: Tensor) -> Tensor:
        """Of one shape, ``[out, groups]``."""
        return scale * self.ratio


class _Training(Tuning):
    """Training of one decoder layer on what it writes while its weights are float and nothing else is quantized."""

    def __init__(self, block: Block, settings: LearnedClips) -> None:
        super().__init__(block)
        self.settings = settings
        with in_float(block.sites):
            self._wanted = [block.run(block.before[window]) for window in range(len(block.before))]

    def solved(self) -> None:
        """Learn the clips and scales of the quantized layer, in place, and take the tuner's windows past it."""
        sites = self._learning_sites()
        clips = [self._learning_clip(site) for site in sites]
        scaled = self._learning_scales() if "weights" in self.settings.parts else {}
        self._train(clips, [module.ratio for module in scaled.values()])
        for module in scaled:
            scale = module.scale
            parametrize.remove_parametrizations(module, "scale", leave_parametrized=False)
            module.scale = scale
            packed = cast(Packed, module)
            assert packed.weights is not None
            packed.scale = packed.weights.storable(packed.quantized().grid).scale
        for site, clip in zip(sites, clips, strict=True):
            self.ratios |= site.clip(clip.item())
        self.block.after.fill(self.block.run(self.block.before[window]) for window in range(len(self.block.before)))

    def _learning_sites(self) -> list[Site]:
        return [site for site in self.block.sites if site.part in self.settings.parts and site.quantizer is not None]

    def _learning_clip(self, site: Site) -> Tensor:
        """Let a site's clip learn; returns its ratio."""
        assert site.quantizer is not None
        ratio = torch.tensor(site.quantizer.clip.amount, device=self.block.device, requires_grad=True)
        site.quantizer = replace(site.quantizer, clip=LearnedClip(amount=ratio))
        return ratio

    def _learning_scales(self) -> dict[nn.Module, _Scaled]:
        """Let the scales of all weights learn."""
        scaled = {module: _Scaled(module.get_buffer("scale")) for module in self.block.packed()}
        for module, ratios in scaled.items():
            parametrize.register_parametrization(module, "scale", ratios)
        return scaled

    def _train(self, clips: list[Tensor], scales: list[Tensor]) -> None:
        """Bring what a layer writes near what is wanted, relative to each token's size, by Adam over the ratios."""
        lr, ratios, ranks = self.settings.lr, [*clips, *scales], self.block.ranks
        counts = ranks.each(len(self._wanted))
        first, windows = sum(counts[: ranks.rank]), sum(counts)
        groups: list[dict[str, Any]] = [{"params": clips}, {"params": scales, "lr": lr * OF_SCALES}]
        adam = torch.optim.Adam(groups, lr)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, self.settings.steps)
        for step in range(self.settings.steps):
            numbers = [(step * BATCH + i) % windows - first for i in range(min(BATCH, windows))]
            adam.zero_grad()
            self._backward([number for number in numbers if 0 <= number < len(self._wanted)])
            for ratio in ratios:
                # No token may have come to it here.
                ratio.grad = ranks.sum(torch.zeros_like(ratio) if ratio.grad is None else ratio.grad)
            adam.step()
            schedule.step()
            for ratio in clips:
                ratio.detach().clamp_(SMALLEST, 1)
            for ratio in scales:
                ratio.detach().clamp_(SMALLEST)

    @torch.enable_grad()
    def _backward(self, numbers: Sequence[int]) -> None:
        """Gradients of the error in some of this process's windows."""
        if numbers:
            x = torch.cat([self.block.before[number] for number in numbers])
            wanted = torch.cat([self._wanted[number] for number in numbers])
            error = relative(self.block.run(x) - wanted, wanted)
            error.backward()  # type: ignore[no-untyped-call]
