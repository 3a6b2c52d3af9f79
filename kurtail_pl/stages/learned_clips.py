"""Learned clips: the ratios of a decoder layer's quantizers, trained together on what the float layer writes.

The first tokens of every calibration window go through the layer as it is in float, and again as it is quantized, and
Adam brings the second output near the first: before the layer's weights are changed, by a clip ratio for each site of
activations, for its keys and for its values; after they are rounded, by a ratio for the scale of each row (and group),
whose codes stay. OmniQuant (arXiv 2308.13137, §3.2) learns the clips of rows block by block before it rounds. The
gradients of one layer are held at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import LearnedClip, Quantizer
from kurtail_pl.ranks import Ranks
from kurtail_pl.stages.calibration import KeyMean, centre_inputs, sum_inputs
from kurtail_pl.stages.clips import relative
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import watched_keys
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.scheme import Scheme

Part = Literal["activations", "keys", "values", "weights"]
PARTS = ("activations", "keys", "values", "weights")
TOKENS, BATCH = 256, 4
"""The first tokens of a window that are learned from, and windows in a step."""
SMALLEST = 0.05
"""Of ratios: what is clipped to nothing has no gradient that leads back."""


@dataclass(frozen=True)
class ClipLearning:
    """How clips are learned, block by block.

    Args:
        parts: ``activations``, ``keys``, ``values``: a ratio for each site, from the scheme's on, and at most 1;
            ``weights``: one for each scale of rounded weights, from 1 on.
        steps: of Adam for each decoder layer and both times, their size falling linearly to nothing.
        lr: size of the first step: so far goes a ratio.

    Raises:
        ConfigError: for no parts or unknown ones, or numbers that are not positive.
    """

    parts: list[Part] = field(default_factory=lambda: ["activations", "keys", "values"])
    steps: int = 20
    lr: float = 0.02

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ConfigError(
                f"learn_clips.parts is {self.parts}; name some of {', '.join(PARTS)}, or write learn_clips: null"
            )
        for name, value in (("steps", self.steps), ("lr", self.lr)):
            if value <= 0:
                raise ConfigError(f"learn_clips.{name} is {value}; give a positive number, or write learn_clips: null")

    def require_learnable(self, scheme: Scheme, quantized_activations: bool) -> None:
        """Raise ConfigError where a part of this scheme has no clip to learn."""
        for part in self.parts:
            quantizer: Quantizer | None = getattr(scheme, part)
            if quantizer is None or not (part == "weights" or quantized_activations):
                raise ConfigError(
                    f"learn_clips.parts names {part}; only what is quantized has a clip: give scheme.{part}, and for "
                    "all but weights set quantized_activations: true"
                )
            if quantizer.clip_kind != "ratio":
                raise ConfigError(
                    f"learn_clips.parts names {part} and scheme.{part}.clip is {quantizer.clip!r}; learning starts "
                    "from a ratio: write ratio:1.0"
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
    """Training of one decoder layer on what it writes while it is float.

    Args:
        walker: runs it.
        layer: equipped, with float weights and no centres yet.
        scheme: what is done to inputs and keys before they are quantized.
        learning: what is learned and how.
        states: what the layer reads in the windows of this process, ``[1, tokens, hidden]`` each.
        ranks: the processes that share the windows; their gradients are added, and all get the same ratios.
    """

    def __init__(
        self,
        walker: Walker,
        layer: nn.Module,
        scheme: Scheme,
        learning: ClipLearning,
        states: Iterable[Tensor],
        ranks: Ranks,
    ) -> None:
        self.walker, self.learning, self.ranks = walker, learning, ranks
        self.states = [x[:, :TOKENS] for x in states]
        # With modules of its own, which are changed, and the layer's weights, which are not.
        self._model = copy.deepcopy(layer, {id(weight): weight for weight in layer.parameters()})
        self._sites = _sites(layer, walker.architecture)
        self._quantizers = [_replaced(self._model, site, None) for site in self._sites]
        self._wanted = self._float_outputs(scheme)

    def clips(self) -> dict[str, float]:
        """Learn the clips of all but weights; returns the ratio of each quantizer, by its place in the layer."""
        ratios: dict[Site, Tensor] = {}
        for site, quantizer in zip(self._sites, self._quantizers, strict=True):
            if quantizer is not None and site[0].rpartition(".")[2] in self.learning.parts:
                ratio = torch.tensor(quantizer.clip_amount, device=self.walker.device, requires_grad=True)
                quantizer = LearnedClip(quantizer.bits, quantizer.symmetric, "ratio:1.0", quantizer.group_size, ratio)
                ratios[site] = ratio
            _replaced(self._model, site, quantizer)
        self._train(self._model, list(ratios.values()), largest=1)
        del self._model  # It would hold on to the float weights.
        return {place: ratio.item() for site, ratio in ratios.items() for place in site}

    def scales(self, layer: nn.Module) -> None:
        """Learn the scales of the rounded weights of the layer, in place."""
        linears = [module for module in layer.modules() if isinstance(module, QuantizedLinear)]
        scaled = [_Scaled(linear.scale) for linear in linears]
        for linear, module in zip(linears, scaled, strict=True):
            parametrize.register_parametrization(linear, "scale", module)
        self._train(layer, [module.ratio for module in scaled])
        for linear in linears:
            scale = linear.scale.detach()
            parametrize.remove_parametrizations(linear, "scale", leave_parametrized=False)
            linear.scale = scale

    def _float_outputs(self, scheme: Scheme) -> list[Tensor]:
        """What the layer without quantizers writes; afterwards it subtracts the centres that the scheme asks for."""
        linears = [m for m in self._model.modules() if isinstance(m, QuantizedLinear)] if scheme.centre else []
        sums = [torch.zeros(m.in_features + 1, dtype=torch.float64, device=self.walker.device) for m in linears]
        keys, attention = KeyMean(self.walker), self._model.get_submodule(self.walker.architecture.attention)
        with ExitStack() as watching:
            for linear, total in zip(linears, sums, strict=True):

                def see(module: nn.Module, arguments: tuple[Tensor], total: Tensor = total) -> None:
                    assert isinstance(module, QuantizedLinear)
                    total += sum_inputs(module, arguments[0])

                watching.enter_context(linear.register_forward_pre_hook(see))
            if scheme.centre_keys:
                watching.enter_context(watched_keys(attention, keys.add))
            wanted = [self.walker.advance(self._model, x) for x in self.states]
        for linear, total in zip(linears, sums, strict=True):
            centre_inputs([linear], self.ranks.sum(total))
        if scheme.centre_keys:
            keys.subtract(attention, self.ranks)
        return wanted

    def _train(self, layer: nn.Module, ratios: list[Tensor], largest: float | None = None) -> None:
        """Bring what a layer writes near what is wanted, relative to each token's size, by Adam over some ratios."""
        if not ratios:
            return
        counts = self.ranks.each(len(self.states))
        first, windows = sum(counts[: self.ranks.rank]), sum(counts)
        adam = torch.optim.Adam(ratios, self.learning.lr)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1, 0, self.learning.steps)
        for step in range(self.learning.steps):
            numbers = [(step * BATCH + i) % windows - first for i in range(min(BATCH, windows))]
            adam.zero_grad()
            self._backward(layer, [number for number in numbers if 0 <= number < len(self.states)])
            for ratio in ratios:
                # No token may have come to it here.
                ratio.grad = self.ranks.sum(torch.zeros_like(ratio) if ratio.grad is None else ratio.grad)
            adam.step()
            schedule.step()
            for ratio in ratios:
                ratio.detach().clamp_(SMALLEST, largest)

    @torch.enable_grad()
    def _backward(self, layer: nn.Module, numbers: list[int]) -> None:
        """Gradients of the error in some of this process's windows."""
        if numbers:
            x, wanted = (torch.cat([of[number] for number in numbers]) for of in (self.states, self._wanted))
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
