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
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import LearnedClip, Quantizer
from kurtail_pl.methods import Format
from kurtail_pl.ranks import Ranks
from kurtail_pl.stages.clips import relative
from kurtail_pl.streaming.hidden import HiddenStates
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.equip import set_layer_clips
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.scheme import Scheme

Part = Literal["activations", "keys", "values", "weights"]
PARTS = ("activations", "keys", "values", "weights")
BATCH = 4
"""Windows in a step."""
OF_SCALES = 0.5
"""How far a scale's ratio goes in one step, where a clip's goes 1: its codes stay."""
SMALLEST = 0.05
"""Of ratios: what is clipped to nothing has no gradient that leads back."""


@dataclass(frozen=True)
class ClipLearning:
    """How clips are learned, block by block.

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

    parts: list[Part] = field(default_factory=lambda: ["activations", "keys", "values"])
    steps: int = 20
    lr: float = 0.01
    windows: int = 16
    seqlen: int = 256

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ConfigError(
                f"learn_clips.parts is {self.parts}; name some of {', '.join(PARTS)}, or write learn_clips: null"
            )
        for name in ("steps", "lr", "windows", "seqlen"):
            value: float = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"learn_clips.{name} is {value}; give a positive number, or write learn_clips: null")

    def require_learnable(self, scheme: Scheme, quantized_activations: bool, searched: Sequence[str]) -> None:
        """Raise ConfigError where a part of this scheme has no clip to learn, or others are searched."""
        if searched:
            raise ConfigError(
                f"learn_clips is given and search_clips names {', '.join(searched)}; one of the two decides: write "
                "search_clips: [] or learn_clips: null"
            )
        for part in self.parts:
            quantizer: Quantizer | Format | None = getattr(scheme, part)
            if quantizer is None or not (part == "weights" or quantized_activations):
                raise ConfigError(
                    f"learn_clips.parts names {part}; only what is quantized has a clip: give scheme.{part}, and for "
                    "all but weights set quantized_activations: true"
                )
            if isinstance(quantizer, Format):
                if not quantizer.learnable:
                    raise ConfigError(
                        f"learn_clips.parts names weights, and they are {quantizer.sentence()}, whose scales are no "
                        "plain numbers; leave weights out"
                    )
            elif quantizer.clip.kind != "ratio":
                raise ConfigError(
                    f"learn_clips.parts names {part} and scheme.{part}.clip is a {quantizer.clip.kind}; learning "
                    "starts from a ratio: write clip.kind: ratio"
                )
        if "activations" in self.parts and scheme.static:
            raise ConfigError(
                "learn_clips.parts names activations and scheme.activation_scales is static; a static grid is searched "
                "by itself: leave activations out, or write activation_scales: token"
            )


Site = tuple[str, ...]
"""The quantizers that share a clip, by their places in the layer."""


class _Scaled(nn.Module):
    """Scales times ratios that learn."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.ratio = nn.Parameter(torch.ones_like(scale))

    def forward(self, scale: Tensor) -> Tensor:
        """Of one shape, ``[out, groups]``."""
        return scale * self.ratio


class BlockTraining:
    """Training of one decoder layer on what it writes while its weights are float and nothing else is quantized.

    Args:
        walker: runs it.
        layer: equipped, with float weights.
        learning: what is learned and how.
        states: what the layer reads in the windows of this process.
        ranks: the processes that share the windows; their gradients are added, and all get the same ratios.
    """

    def __init__(
        self, walker: Walker, layer: nn.Module, learning: ClipLearning, states: HiddenStates, ranks: Ranks
    ) -> None:
        self.walker, self.learning, self.states, self.ranks = walker, learning, states, ranks
        sites = _sites(layer, walker.architecture)
        quantizers = [_replaced(layer, site, None) for site in sites]
        self._wanted = [walker.advance(layer, x) for x in states.before]
        for site, quantizer in zip(sites, quantizers, strict=True):
            _replaced(layer, site, quantizer)

    def learn(self, layer: nn.Module) -> dict[str, float]:
        """Learn the clips and scales of the quantized layer, in place, and take the states past it.

        Returns:
            Ratio of each quantizer, by its place in the layer.
        """
        clips = self._learning_clips(layer)
        scaled = self._learning_scales(layer) if "weights" in self.learning.parts else {}
        self._train(layer, [ratio for ratio, _ in clips.values()], [module.ratio for module in scaled.values()])
        for linear in scaled:
            scale = linear.scale
            parametrize.remove_parametrizations(linear, "scale", leave_parametrized=False)
            linear.scale = scale
        ratios = {place: ratio.item() for site, (ratio, _) in clips.items() for place in site}
        for site, (_, quantizer) in clips.items():
            _replaced(layer, site, quantizer)
        set_layer_clips(layer, ratios)
        self.states.after.fill(self.walker.advance(layer, x) for x in self.states.before)
        return ratios

    def _learning_clips(self, layer: nn.Module) -> dict[Site, tuple[Tensor, Quantizer]]:
        """Let clips learn; returns the ratio of each site, and the quantizer that was there."""
        clips = {}
        for site in _sites(layer, self.walker.architecture):
            quantizer = _replaced(layer, site, None)
            if quantizer is not None and site[0].rpartition(".")[2] in self.learning.parts:
                ratio = torch.tensor(quantizer.clip.amount, device=self.walker.device, requires_grad=True)
                clips[site] = ratio, quantizer
                quantizer = replace(quantizer, clip=LearnedClip(amount=ratio))
            _replaced(layer, site, quantizer)
        return clips

    def _learning_scales(self, layer: nn.Module) -> dict[QuantizedLinear, _Scaled]:
        """Let the scales of all weights learn."""
        scaled = {m: _Scaled(m.get_buffer("scale")) for m in layer.modules() if isinstance(m, QuantizedLinear)}
        for linear, module in scaled.items():
            parametrize.register_parametrization(linear, "scale", module)
        return scaled

    def _train(self, layer: nn.Module, clips: list[Tensor], scales: list[Tensor]) -> None:
        """Bring what a layer writes near what is wanted, relative to each token's size, by Adam over the ratios."""
        lr, ratios = self.learning.lr, [*clips, *scales]
        counts = self.ranks.each(len(self._wanted))
        first, windows = sum(counts[: self.ranks.rank]), sum(counts)
        groups: list[dict[str, Any]] = [{"params": clips}, {"params": scales, "lr": lr * OF_SCALES}]
        adam = torch.optim.Adam(groups, lr)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, self.learning.steps)
        for step in range(self.learning.steps):
            numbers = [(step * BATCH + i) % windows - first for i in range(min(BATCH, windows))]
            adam.zero_grad()
            self._backward(layer, [number for number in numbers if 0 <= number < len(self._wanted)])
            for ratio in ratios:
                # No token may have come to it here.
                ratio.grad = self.ranks.sum(torch.zeros_like(ratio) if ratio.grad is None else ratio.grad)
            adam.step()
            schedule.step()
            for ratio in clips:
                ratio.detach().clamp_(SMALLEST, 1)
            for ratio in scales:
                ratio.detach().clamp_(SMALLEST)

    @torch.enable_grad()
    def _backward(self, layer: nn.Module, numbers: list[int]) -> None:
        """Gradients of the error in some of this process's windows."""
        if numbers:
            x, wanted = (torch.cat([of[number] for number in numbers]) for of in (self.states.before, self._wanted))
            error = relative(layer(x, **self.walker.positions(layer, x)) - wanted, wanted)
            error.backward()  # type: ignore[no-untyped-call]


def _sites(layer: nn.Module, architecture: Architecture) -> list[Site]:
    """What has one clip in a decoder layer: linears that read the same inputs, its keys, its values."""
    readers = [architecture.attention_readers, (architecture.output,)]
    for mlp in architecture.gated_mlps(layer):
        readers += [architecture.gate_and_up(mlp), (f"{mlp}.{architecture.down}",)]
    inputs = [tuple(f"{name}.activations" for name in names) for names in readers]
    return [*inputs, (f"{architecture.attention}.keys",), (f"{architecture.attention}.values",)]


def _replaced(layer: nn.Module, site: Site, quantizer: Quantizer | None) -> Quantizer | None:
    """Give a site this quantizer; returns the one it had."""
    for place in site:
        name, _, part = place.rpartition(".")
        module = layer.get_submodule(name)
        before: Quantizer | None = getattr(module, part)
        setattr(module, part, quantizer)
    return before
