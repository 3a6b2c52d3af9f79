"""What is trained of a decoder layer's maps, scales and clips, and the layer as it then computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from kurtail_pl.maths.clip import Clip, LearnedClip
from kurtail_pl.maths.kronecker import Kronecker
from kurtail_pl.maths.quantizers import Quantizer, dynamic_grid, split_groups
from kurtail_pl.maths.trained_quantizer import TrainedQuantizer
from kurtail_pl.methods import Format
from kurtail_pl.methods.tuner import Site
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.invertible import Pair, mapped_weights, maps_state, put_maps
from kurtail_pl.surgery.linear import QuantizedLinear

LARGEST_START = 0.982
"""A ratio of 1 has no logit; sigmoid(4) is where FlatQuant starts."""


class Factor(nn.Module):
    """An invertible matrix ``U diag(d) V^T``, float64, whose inverse is as well known as itself.

    Args:
        start: orthogonal, ``[n, n]``.
        orthogonal: keep d at 1.
    """

    def __init__(self, start: Tensor, orthogonal: bool) -> None:
        super().__init__()
        self.u, self.v = _orthogonal(start), _orthogonal(torch.eye(len(start)).to(start))
        self.log_d = nn.Parameter(start.new_zeros(len(start)).double(), requires_grad=not orthogonal)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The matrix, and the inverse of its transpose."""
        d = self.log_d.exp()
        u, v = (cast(Tensor, each.weight) for each in (self.u, self.v))
        return (u * d) @ v.T, (u / d) @ v.T


class _Square(nn.Module):
    """A weight, for torch to parametrize."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def _orthogonal(start: Tensor) -> nn.Module:
    """A module whose weight stays orthogonal, from a start on, by Cayley's transform."""
    square = _Square(start.double())
    parametrizations.orthogonal(square, orthogonal_map="cayley")
    square.weight = start.double()  # type: ignore[assignment]
    return square


class Fixed(nn.Module):
    """The identity in a factor's place."""

    eye: Tensor

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("eye", torch.eye(size, dtype=torch.float64, device=device))

    def forward(self) -> tuple[Tensor, Tensor]:
        """It is its own inverse."""
        return self.eye, self.eye


class TrainedMap(nn.Module):
    """A Kronecker map that learns."""

    def __init__(self, left: Factor | Fixed, right: Factor | Fixed) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self) -> Pair:
        """As it is now."""
        (left, left_back), (right, right_back) = self.left(), self.right()
        return Pair(Kronecker(left, right), Kronecker(left_back, right_back))


class TrainedLayer(nn.Module):
    """A decoder layer whose maps, scales and clips learn; its own weights stay as they are until `finish`.

    Args:
        layer: equipped, with float weights; the modules of its maps are put into it.
        architecture: its record.
        sites: quantizers of inputs, keys and values.
        maps: that learn, by their places (`surgery.invertible`).
        scaled: of what channels scales learn, by what writes them, and how many these are.
        weights: integers that the weights will be; None for float.
    """

    def __init__(
        self,
        layer: nn.Module,
        architecture: Architecture,
        sites: Sequence[Site],
        maps: Mapping[str, TrainedMap],
        scaled: Mapping[str, int],
        weights: Format | None,
    ) -> None:
        super().__init__()
        # In a tuple, which makes it no part of this module.
        self._layer, self.architecture = (layer,), architecture
        device = next(layer.parameters()).device
        self._places, self.maps = list(maps), nn.ModuleList(maps.values())
        self._written, self.scales = (
            list(scaled),
            nn.ParameterList(torch.zeros(n, device=device) for n in scaled.values()),
        )
        self._sites = [(site, site.quantizer) for site in sites if site.quantizer is not None]
        self.clips = nn.ParameterList(_logit(torch.tensor(q.clip.amount, device=device)) for _, q in self._sites)
        self._integers = None if weights is None else weights.integers
        self._names = architecture.linears(layer) if weights is not None else ()
        put_maps(layer, architecture, self._pairs())
        with torch.no_grad():
            start = self._mapped(self._pairs(), torch.float32)
            self.shares = nn.ParameterList(
                _logit(_searched(start[f"{name}.weight"], weights)) for name in self._names if weights is not None
            )

    def run(self, states: Tensor, arguments: dict[str, object]) -> Tensor:
        """What the layer writes when all of it is quantized; differentiable in what learns."""
        for (site, quantizer), logit in zip(self._sites, self.clips, strict=True):
            clip = LearnedClip(amount=logit.sigmoid()) if logit.requires_grad else quantizer.clip
            site.quantizer = _trained(quantizer, clip)
        pairs = self._pairs()
        tensors = {**self._mapped(pairs, states.dtype), **maps_state(self._layer[0], self.architecture, pairs)}
        for name, logit in zip(self._names, self.shares, strict=True):
            assert self._integers is not None
            quantizer = _trained(self._integers, LearnedClip(amount=logit.sigmoid()))
            tensors[f"{name}.weight"] = quantizer.fake(tensors[f"{name}.weight"], None)
        output: Tensor = functional_call(self._layer[0], tensors, (states,), arguments)
        return output

    @torch.no_grad()
    def finish(self) -> dict[str, float]:
        """Put maps and scales into the layer, its weights computed in float64; returns the maps' condition numbers.

        The inverse is that of the factors as they are stored. The quantizers are as they were.
        """
        for site, quantizer in self._sites:
            site.quantizer = quantizer
        layer, stored = self._layer[0], {place: pair.forward.stored() for place, pair in self._pairs().items()}
        pairs = {place: Pair(each, each.inverse_transposed()) for place, each in stored.items()}
        for name, tensor in self._mapped(pairs, torch.float64).items():
            parameter = layer.get_parameter(name)
            parameter.data = tensor.to(parameter.dtype)
        put_maps(layer, self.architecture, pairs)
        return {place: each.condition() for place, each in stored.items()}

    @torch.no_grad()
    def give_shares(self) -> None:
        """Tell the linears which share of each row's range their grids will span."""
        for name, logit in zip(self._names, self.shares, strict=True):
            cast(QuantizedLinear, self._layer[0].get_submodule(name)).share = logit.sigmoid()

    @torch.no_grad()
    def clip(self) -> dict[str, float]:
        """Give the sites their ratios; returns these by the quantizers' places in the layer."""
        found: dict[str, float] = {}
        for (site, _), logit in zip(self._sites, self.clips, strict=True):
            found |= site.clip(logit.sigmoid().item())
        return found

    def _pairs(self) -> dict[str, Pair]:
        return {place: cast(Pair, each()) for place, each in zip(self._places, self.maps, strict=True)}

    def _mapped(self, pairs: Mapping[str, Pair], dtype: torch.dtype) -> dict[str, Tensor]:
        scales = {name: logarithm.exp() for name, logarithm in zip(self._written, self.scales, strict=True)}
        return mapped_weights(self._layer[0], self.architecture, scales, pairs, dtype)


def _logit(ratio: Tensor) -> Tensor:
    """What sigmoid makes a ratio of."""
    return torch.logit(ratio.clamp(max=LARGEST_START))


def _trained(quantizer: Quantizer, clip: Clip) -> TrainedQuantizer:
    """The same while what it reads learns, and its clip where that is learned."""
    return TrainedQuantizer(quantizer.bits, quantizer.symmetric, clip, quantizer.group_size)


def _searched(weight: Tensor, weights: Format) -> Tensor:
    """Ratio of each row's grid, as the format seeks it, to the row's range, ``[out, 1]``; the mean over groups."""
    assert weights.integers is not None
    whole = dynamic_grid(split_groups(weight, weights.group_size), replace(weights.integers, clip=Clip()))
    return (weights.grid(weight).scale / whole.scale).mean(-1, keepdim=True)
