"""RTN or GPTQ over one decoder layer: its linears in the order in which data reaches them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from kurtail_pl.maths.gptq import GPTQ, gptq
from kurtail_pl.maths.quantizers import Quantized, Quantizer
from kurtail_pl.maths.weights import round_to_nearest, search_grid
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.experts import routed
from kurtail_pl.surgery.linear import QuantizedLinear

log = logging.getLogger(__name__)


class LayerSolver:
    """Turns the weights of decoder layers into codes.

    Each linear sees inputs that went through the linears already quantized. An expert's Hessian is made from the tokens
    that the router sends to it; one with fewer tokens than its linears have inputs borrows others of the block, evenly
    spaced, so that its Hessian is not singular for want of them.

    Args:
        walker: runs the layers.
        quantizer: of the weights; None leaves them float.
        settings: of GPTQ; None rounds to nearest, and needs no inputs.
    """

    def __init__(self, walker: Walker, quantizer: Quantizer | None, settings: GPTQ | None) -> None:
        self.walker, self.quantizer, self.settings = walker, quantizer, settings
        self.fallbacks: list[str] = []
        """Linears whose Hessian was not positive definite, and which were rounded to nearest."""
        self.expert_tokens: dict[str, int] = {}
        """How many calibration tokens the router sent to each expert."""
        self.borrowers: list[str] = []
        """Experts that borrowed tokens."""

    def solve_layer(self, layer: nn.Module, prefix: str, hidden: list[Tensor]) -> list[Tensor]:
        """Quantize a layer's linears in place.

        Args:
            layer: with weights, equipped.
            prefix: its name in the model.
            hidden: what it reads, a list of ``[1, tokens, hidden]``; empty where no inputs are needed.

        Returns:
            The hidden states after it.
        """
        architecture = self.walker.architecture
        hidden = self._attention(layer, prefix, hidden)
        normed = [layer.get_submodule(architecture.mlp_norm)(h) for h in hidden]
        if architecture.router is not None:
            self._experts(layer, prefix, normed)
            block = layer.get_submodule(architecture.mlp)
            return [h + block(x) for h, x in zip(hidden, normed, strict=True)]
        inner = self._gated_mlp(layer, prefix, architecture.mlp, normed)
        down = layer.get_submodule(f"{architecture.mlp}.{architecture.down}")
        return [h + down(x) for h, x in zip(hidden, inner, strict=True)]

    def _attention(self, layer: nn.Module, prefix: str, hidden: list[Tensor]) -> list[Tensor]:
        architecture = self.walker.architecture
        normed = [layer.get_submodule(architecture.attention_norm)(h) for h in hidden]
        self._solve(layer, prefix, architecture.attention_readers, normed)
        attention = layer.get_submodule(architecture.attention)
        with _set_aside(layer, architecture.output) as output:
            inner = [attention(x, **self.walker.positions(layer, x))[0] for x in normed]
        self._solve(layer, prefix, (architecture.output,), inner)
        return [h + output(x) for h, x in zip(hidden, inner, strict=True)]

    def _gated_mlp(self, layer: nn.Module, prefix: str, mlp: str, inputs: list[Tensor]) -> list[Tensor]:
        """Quantize a gated MLP, dense or one expert; returns what its down projection reads."""
        architecture = self.walker.architecture
        readers = dict.fromkeys((f"{mlp}.{architecture.gate}", f"{mlp}.{architecture.up}"))
        down = f"{mlp}.{architecture.down}"
        self._solve(layer, prefix, tuple(readers), inputs)
        with _set_aside(layer, down):
            inner = [layer.get_submodule(mlp)(x) for x in inputs]
        self._solve(layer, prefix, (down,), inner)
        return inner

    def _experts(self, layer: nn.Module, prefix: str, normed: list[Tensor]) -> None:
        """Quantize every expert on the tokens routed to it."""
        architecture = self.walker.architecture
        assert architecture.router is not None
        mlps = architecture.gated_mlps(layer)
        if not normed:
            for mlp in mlps:
                self._gated_mlp(layer, prefix, mlp, [])
            return
        tokens = torch.cat([x.flatten(0, 1) for x in normed])
        index = routed(layer.get_submodule(architecture.router), tokens)
        counts = [int((index == number).sum()) for number in range(len(mlps))]
        log.info("%s: tokens routed to each expert %s", prefix, counts)
        for number, (mlp, count) in enumerate(zip(mlps, counts, strict=True)):
            chosen = (index == number).any(-1)
            down = layer.get_submodule(f"{mlp}.{architecture.down}")
            assert isinstance(down, QuantizedLinear)
            missing = max(down.in_features, tokens.shape[1]) - count
            if missing > 0:
                log.warning("%s.%s borrows %d tokens of the other experts", prefix, mlp, missing)
                self.borrowers.append(f"{prefix}.{mlp}")
                chosen |= _evenly(~chosen, missing)
            self.expert_tokens[f"{prefix}.{mlp}"] = count
            self._gated_mlp(layer, prefix, mlp, [tokens[chosen].unsqueeze(0)])

    def _solve(self, layer: nn.Module, prefix: str, names: tuple[str, ...], inputs: list[Tensor]) -> None:
        """Quantize linears that read the same inputs, a list of ``[1, tokens, in]``."""
        if self.quantizer is None:
            return
        linears = {name: layer.get_submodule(name) for name in names}
        hessian = None
        for name, linear in linears.items():
            assert isinstance(linear, QuantizedLinear)
            if hessian is None and self.settings is not None:
                hessian = _hessian(linear, inputs)
            assert linear.weight is not None
            linear.pack(self._codes(f"{prefix}.{name}", linear.weight, hessian, self.quantizer), self.quantizer)

    def _codes(self, name: str, weight: Tensor, hessian: Tensor | None, quantizer: Quantizer) -> Quantized:
        grid = search_grid(weight, quantizer)
        if hessian is not None and self.settings is not None:
            try:
                return gptq(weight, hessian, grid, quantizer, self.settings)
            except LinAlgError:
                log.warning("%s: the Hessian is not positive definite; its weight is rounded to nearest", name)
                self.fallbacks.append(name)
        return round_to_nearest(weight, grid, quantizer)


def _evenly(candidates: Tensor, count: int) -> Tensor:
    """A mask of `count` (or all) of the true places of a mask, evenly spaced."""
    places = candidates.nonzero().flatten()
    chosen = torch.zeros_like(candidates)
    chosen[places[torch.linspace(0, len(places) - 1, min(count, len(places))).long()]] = True
    return chosen


@contextmanager
def _set_aside(layer: nn.Module, name: str) -> Iterator[nn.Module]:
    """Put the identity in a linear's place for a while: its block then returns that linear's input."""
    linear = layer.get_submodule(name)
    layer.set_submodule(name, nn.Identity())
    try:
        yield linear
    finally:
        layer.set_submodule(name, linear)


def _hessian(linear: QuantizedLinear, inputs: list[Tensor]) -> Tensor:
    """``X^T X`` over all tokens of what the linear's weight multiplies, ``[in, in]`` float64."""
    total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    for x in inputs:
        rows = linear.prepare(x).flatten(0, -2)
        total += rows.T @ rows
    return total
