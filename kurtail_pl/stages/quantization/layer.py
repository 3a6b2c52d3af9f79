"""Calibration and rounding over a decoder layer: its linears in the order in which data reaches them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from kurtail_pl.methods import Format, Moments, Rounder, WeightTuner
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import Site, Tuning
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.stages.quantization.calibration import centre_inputs, centre_keys, fit_cache, fix_grid, received_by
from kurtail_pl.stages.quantization.float_layer import FloatLayer, post_norm, set_aside
from kurtail_pl.stages.quantization.moments import moments_of
from kurtail_pl.stages.quantization.weights import Notes, WeightSolver
from kurtail_pl.streaming.hidden import HiddenStates, MappedStates
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.experts import routed, written
from kurtail_pl.surgery.linear import QuantizedLinear

log = logging.getLogger(__name__)

Inputs = Callable[[], Iterable[Tensor]]
"""The inputs of linears, window by window, ``[1, tokens, in]``; made anew whenever they are needed."""


class LayerSolver:
    """Turns the weights of decoder layers into codes.

    Each linear sees inputs that went through the linears already quantized. An expert's Hessian and static grids are
    made from the tokens that the router sends to it; one with fewer tokens than its linears have inputs borrows others
    of the block, evenly spaced, so that its Hessian is not singular for want of them.

    Args:
        walker: runs the layers.
        scheme: what is calibrated, which needs inputs, and the side of the weights.
        rounder: turns weights into codes.
        match: matches each weight to its quantized inputs first; None leaves the weights as they are. The walker's
            layers must quantize.
        ranks: the processes that share the windows; each has the hidden states of its own, and all get the same codes.
        by_attention: tokens count in the moments of the linear that makes values by the attention they get.
    """

    def __init__(
        self,
        walker: Walker,
        scheme: Scheme,
        rounder: Rounder,
        match: WeightTuner | None = None,
        ranks: Ranks = ALONE,
        by_attention: bool = False,
    ) -> None:
        self.walker, self.scheme, self.ranks, self.by_attention = walker, scheme, ranks, by_attention
        self._weights: Format | None = None
        self._exact: FloatLayer | None = None
        self._tuning: Tuning | None = None
        self.notes = Notes(errors={}, fallbacks=[], borrowers=[], expert_tokens={})
        self._solver = WeightSolver(rounder, match, scheme.side, self.notes)

    def solve_layer(
        self,
        layer: nn.Module,
        prefix: str,
        hidden: HiddenStates,
        weights: Format | None,
        exact: FloatLayer | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """Quantize a layer's linears in place, and fill `hidden.after` with what the quantized layer writes.

        Args:
            layer: with weights, equipped.
            prefix: its name in the model.
            hidden: states of all windows; none where no inputs are needed.
            weights: format of its weights; None leaves them float.
            exact: the layer in the float model, for a rounder that asks for it; it is taken on with the layer.
            tuning: what a tuner does to the layer on the way.
        """
        self._weights, self._exact, self._tuning = weights, exact, tuning
        architecture = self.walker.architecture
        self._attention(layer, prefix, hidden)
        states, norm = hidden.after, layer.get_submodule(architecture.mlp_norm)
        post = post_norm(layer, architecture.mlp_post_norm)

        def normed() -> Iterator[Tensor]:
            yield from map(norm, states)

        if architecture.has_experts(layer):
            self._experts(layer, prefix, normed)
            block = layer.get_submodule(architecture.mlp)
            states.fill(self.walker.added(h, written(block(norm(h))), post) for h in states)
        else:
            down = layer.get_submodule(f"{architecture.mlp}.{architecture.down}")
            assert isinstance(down, QuantizedLinear)
            inner = hidden.scratch(down.in_features)
            wanted = self._exact.mlp_inputs if self._exact else None
            self._gated_mlp(layer, prefix, architecture.mlp, normed, wanted, inner)
            states.fill(self.walker.added(h, down(x), post) for h, x in zip(states, inner, strict=True))
        if self._exact is not None:
            self._exact.add_mlp()

    def _attention(self, layer: nn.Module, prefix: str, hidden: HiddenStates) -> None:
        architecture = self.walker.architecture
        norm, attention = (layer.get_submodule(n) for n in (architecture.attention_norm, architecture.attention))
        exact = self._exact
        wanted = exact.attention_inputs if exact else None

        def attended(states: Iterable[Tensor]) -> Iterator[Tensor]:
            return (attention(x, **self.walker.positions(layer, x))[0] for x in map(norm, states))

        counts = received_by(attention, attended(hidden.before)) if self.by_attention else None
        self._solve(layer, prefix, architecture.attention_readers, lambda: map(norm, hidden.before), wanted, counts)
        with set_aside(layer, architecture.output) as output:
            assert isinstance(output, QuantizedLinear)
            inner = hidden.scratch(output.in_features)
            if self.scheme.centre_keys:
                centre_keys(attention, attended(hidden.before), self.ranks, self.walker)
            if self.scheme.cache is not None and self.scheme.cache.sample is not None:
                fit_cache(self.scheme.cache, layer, attended(hidden.before), self.ranks, self.walker)
            if self._tuning is not None:
                self._tuning.cache(output, attended, hidden.before)
            inner.fill(attended(hidden.before))
        self._solve(layer, prefix, (architecture.output,), lambda: inner, exact.output_inputs if exact else None)
        post, pairs = post_norm(layer, architecture.attention_post_norm), zip(hidden.before, inner, strict=True)
        hidden.after.fill(self.walker.added(h, output(x), post) for h, x in pairs)
        if exact is not None:
            exact.add_attention()

    def _gated_mlp(
        self,
        layer: nn.Module,
        prefix: str,
        mlp: str,
        inputs: Inputs,
        wanted: Inputs | None,
        inner: MappedStates | None = None,
    ) -> None:
        """Quantize a gated MLP, dense or one expert; keeps in `inner`, when given, what its down projection reads."""
        architecture, exact = self.walker.architecture, self._exact
        down, block = f"{mlp}.{architecture.down}", layer.get_submodule(mlp)
        self._solve(layer, prefix, architecture.gate_and_up(mlp), inputs, wanted)
        with set_aside(layer, down) as linear:
            if inner is not None:
                inner.fill(map(block, inputs()))

            def read_by_down() -> Iterable[Tensor]:
                return inner if inner is not None else map(block, inputs())

            self._calibrate((down,), (linear,), read_by_down)
            exact_inputs = exact.down_inputs(mlp, wanted()) if exact and wanted else None
            moments = self._moments(linear, read_by_down(), exact_inputs)
        solved = _linears(layer, prefix, (down,))
        self._solver.take_side(solved, moments, self._weights)
        self._solver.pack(solved, moments, self._weights)

    def _experts(self, layer: nn.Module, prefix: str, normed: Inputs) -> None:
        """Quantize every expert on the tokens routed to it, and an MLP beside them on all tokens."""
        architecture = self.walker.architecture
        mlps = architecture.routed_mlps(layer)
        index = [routed(layer, architecture, x.flatten(0, 1)) for x in normed()]
        needs_tokens = bool(self._solver.needs) or self.scheme.static
        for number, mlp in enumerate(mlps):
            chosen = [(window == number).any(-1) for window in index]
            if needs_tokens:
                self._borrow(f"{prefix}.{mlp}", layer.get_submodule(f"{mlp}.{architecture.down}"), chosen)

            def rows(of: Inputs, chosen: list[Tensor] = chosen) -> Inputs:
                return lambda: (x[:, mask] for x, mask in zip(of(), chosen, strict=True))

            self._gated_mlp(layer, prefix, mlp, rows(normed), rows(self._exact.mlp_inputs) if self._exact else None)
        for mlp in architecture.common_mlps(layer):
            self._gated_mlp(layer, prefix, mlp, normed, self._exact.mlp_inputs if self._exact else None)
        if needs_tokens:
            counts = [self.notes["expert_tokens"][f"{prefix}.{mlp}"] for mlp in mlps]
            log.info("%s: tokens routed to each expert %s", prefix, counts)

    def _borrow(self, name: str, down: nn.Module, chosen: list[Tensor]) -> None:
        """Note an expert's tokens, and add others to its masks, one for each window, when they are too few."""
        assert isinstance(down, QuantizedLinear)
        # A process may have no windows.
        masks = torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.bool)
        self.notes["expert_tokens"][name] = own = sum(self.ranks.each(int(masks.sum())))
        missing = max(down.in_features, down.out_features) - own
        if missing > 0:
            log.warning("%s borrows %d tokens of the other experts", name, missing)
            self.notes["borrowers"].append(name)
            masks = masks | _evenly(~masks, missing, self.ranks)
            chosen[:] = torch.split(masks, [len(window) for window in chosen])

    def _solve(
        self,
        layer: nn.Module,
        prefix: str,
        names: tuple[str, ...],
        inputs: Inputs,
        wanted: Inputs | None,
        received: Sequence[Tensor] | None = None,
    ) -> None:
        """Quantize linears that read the same inputs, and in the float model the wanted ones.

        For the one that makes values tokens count by the attention that they received, if that is given.
        """
        linears = [layer.get_submodule(name) for name in names]
        self._calibrate(names, linears, inputs)
        apart = () if received is None else (self.walker.architecture.value,)
        together = [name for name in names if name not in apart]
        moments = self._moments(linears[0], inputs(), wanted() if wanted else None)
        self._solver.take_side(_linears(layer, prefix, names), moments, self._weights)
        self._solver.pack(_linears(layer, prefix, together), moments, self._weights)
        if apart:
            del moments  # Which would be the largest thing beside those that follow.
            moments = self._moments(linears[0], inputs(), wanted() if wanted else None, received)
            self._solver.pack(_linears(layer, prefix, apart), moments, self._weights)

    def _calibrate(self, names: Iterable[str], linears: Iterable[nn.Module], inputs: Inputs) -> None:
        """Give linears that read the same inputs what the scheme takes from these."""
        readers = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
        device = self.walker.device
        if self.scheme.centre:
            centre_inputs(readers, inputs(), self.ranks, device)
        if self._tuning is not None:
            site = Site("activations", dict(zip(names, readers, strict=True)))
            self._tuning.inputs(site, readers, inputs)
        if self.scheme.static:
            assert self.scheme.activations is not None
            fix_grid(readers, inputs(), self.scheme.activations, self.ranks, device)

    def _moments(
        self,
        linear: nn.Module,
        inputs: Iterable[Tensor],
        wanted: Iterable[Tensor] | None,
        counts: Sequence[Tensor] | None = None,
    ) -> Moments:
        """Of what the linear's weight multiplies, over all tokens as they count; None where a product has no use."""
        solves, matches = self._weights is not None and bool(self._solver.needs), self._solver.match is not None
        if not solves and not matches:
            return Moments(None, None)
        assert isinstance(linear, QuantizedLinear)
        crossed = matches or wanted is not None
        found = moments_of(linear, inputs, wanted, counts, crossed, self.walker.device)
        return Moments(*(None if part is None else self.ranks.sum(part) for part in found))


def _linears(layer: nn.Module, prefix: str, names: Iterable[str]) -> dict[str, QuantizedLinear]:
    """Linears of a layer, by their names in the model."""
    return {f"{prefix}.{name}": cast(QuantizedLinear, layer.get_submodule(name)) for name in names}


def _evenly(candidates: Tensor, count: int, ranks: Ranks) -> Tensor:
    """A mask of `count` (or all) of the true places of all processes' masks, evenly spaced; this process's part."""
    places = candidates.nonzero().flatten()
    counts = ranks.each(len(places))
    first, total = sum(counts[: ranks.rank]), sum(counts)
    wanted = torch.linspace(0, total - 1, min(count, total), device=places.device).long() - first
    chosen = torch.zeros_like(candidates)
    chosen[places[wanted[(wanted >= 0) & (wanted < len(places))]]] = True
    return chosen
