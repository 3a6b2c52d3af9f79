"""Weights to sides and codes: what is done to linears once the moments of their inputs are there."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from kurtail_pl.maths.quantizers import Quantized
from kurtail_pl.maths.relative_error import relative_errors
from kurtail_pl.methods import Format, Moments, Needs, Rounder, Side, WeightTuner
from kurtail_pl.surgery.linear import QuantizedLinear, put_side

log = logging.getLogger(__name__)


class Notes(TypedDict):
    """What rounding did, and what was not as usual.

    `errors` are those of each linear (`maths.relative_error`). `fallbacks` are linears rounded to nearest, not matched,
    or with a side fitted to their weight alone, because their Hessian was not positive definite, `expert_tokens` how
    many calibration tokens the router sent to each expert, and `borrowers` experts that borrowed tokens of others.
    """

    errors: dict[str, dict[str, float]]
    fallbacks: list[str]
    expert_tokens: dict[str, int]
    borrowers: list[str]


class WeightSolver:
    """Takes a side from weights, matches the rest to its inputs, and rounds it.

    Args:
        rounder: turns weights into codes.
        match: matches each weight to its quantized inputs first; None leaves the weights as they are.
        side: of the weights; None for none.
        notes: where fallbacks are noted.
    """

    def __init__(self, rounder: Rounder, match: WeightTuner | None, side: Side | None, notes: Notes) -> None:
        self.rounder, self.match, self.side, self.notes = rounder, match, side, notes

    @property
    def needs(self) -> Needs:
        """What rounder and side ask for."""
        return self.rounder.needs | (Needs.NOTHING if self.side is None else self.side.needs)

    def take_side(self, linears: Mapping[str, QuantizedLinear], moments: Moments, weights: Format | None) -> None:
        """Put a side beside the weights of linears that read the same inputs, and leave them the rest.

        Args:
            linears: by their names in the model.
            moments: of these inputs.
            weights: format that the rest will have; None leaves the weights whole.
        """
        if self.side is None or weights is None:
            return
        name, several = next(iter(linears)), list(linears.values())
        whole = torch.cat([linear.dense_weight() for linear in several])

        def lost(rest: Tensor) -> Tensor:
            matched = self._matched(name, rest.to(whole.dtype), moments)
            return matched - weights.values(self._codes(name, matched, moments, weights))

        try:
            tensors = self.side.fitted(whole, moments, lost)
        except LinAlgError:
            log.warning("%s: the Hessian is not positive definite; its side is fitted to the weight alone", name)
            self._note_fallback(name)
            tensors = self.side.fitted(whole, Moments(None, None), lost)
        put_side(several, self.side, tensors)
        rest = whole.double() - self.side.dense(tensors, whole.shape[1])
        rows = [linear.out_features for linear in several]
        for linear, part in zip(several, torch.split(rest, rows), strict=True):
            linear.weight = nn.Parameter(part.to(whole.dtype), requires_grad=False)

    def pack(self, linears: Mapping[str, QuantizedLinear], moments: Moments, weights: Format | None) -> None:
        """Match the weights of linears that read the same inputs to these, and round them to a format, if any."""
        for name, linear in linears.items():
            assert linear.weight is not None
            weight = self._matched(name, linear.weight, moments)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if weights is not None:
                own = weights if linear.share is None else weights.spanning(linear.share)
                codes = self._codes(name, weight, moments, own)
                self.notes["errors"][name] = relative_errors(weight, weights.values(codes), moments.hessian)
                linear.pack(codes, weights)

    def _matched(self, name: str, weight: Tensor, moments: Moments) -> Tensor:
        if self.match is not None and moments.hessian is not None and moments.cross is not None:
            try:
                return self.match.tuned(weight, moments)
            except LinAlgError:
                log.warning("%s: the Hessian is not positive definite; its weight is not matched", name)
                self._note_fallback(name)
        return weight

    def _codes(self, name: str, weight: Tensor, moments: Moments, weights: Format) -> Quantized:
        weights = weights.fitted(weight, moments.hessian)
        try:
            return self.rounder.codes(weight, weights, moments)
        except LinAlgError:
            log.warning("%s: the Hessian is not positive definite; its weight is rounded to nearest", name)
            self._note_fallback(name)
            return weights.nearest(weight)

    def _note_fallback(self, name: str) -> None:
        if name not in self.notes["fallbacks"]:
            self.notes["fallbacks"].append(name)
