"""What all layers of a graph share in one forward step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from torch import Tensor

from kurtail_onnx.graph.activations import (
    CODE_TYPES,
    Inputs,
    IntegerRows,
    fake_quantized,
    fake_quantized_on,
    integer_rows,
)
from kurtail_onnx.graph.builder import GraphBuilder
from kurtail_onnx.graph.cache import CachePart
from kurtail_onnx.graph.grids import GridNodes
from kurtail_onnx.graph.kronecker import mapped_inputs
from kurtail_onnx.graph.linear import linear
from kurtail_onnx.graph.weights import float_weight, initializer
from kurtail_onnx.settings import Settings
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer


@dataclass(frozen=True)
class Step:
    """The graph under construction, what it is made from, and its common values.

    Args:
        g: the graph.
        source: the artefact.
        spec: choices of the export.
        cache: how keys and values are kept.
        position_ids: int64 ``[batch, tokens]``, rows of the rotary tables.
        attention_mask: int64 ``[batch, past + tokens]``, 0 for padding.
        rotary: cosines and sines; see `positions.rotary_tables`.
        token_shape: int64 ``[batch, tokens, -1]``, gives flattened rows their shape back.
    """

    g: GraphBuilder
    source: Source
    spec: Settings
    cache: Sequence[CachePart]
    position_ids: ir.Value
    attention_mask: ir.Value
    rotary: tuple[Tensor, Tensor]
    token_shape: ir.Value
    _shared: dict[str, ir.Value] = field(default_factory=dict)

    def shared(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        """A value that several layers use: made, outside of their scopes, when the first one asks."""
        if name not in self._shared:
            with self.g.root_scope("model", name):
                self._shared[name] = make()
        return self._shared[name]

    def read(self, x: ir.Value, reader: str, place: str, some: bool = False) -> Inputs:
        """What the linears at one place multiply, mapped, centred and quantized where the artefact says so.

        Args:
            x: ``[batch, tokens, in]``; what a rotation gives may have the last dimension in two.
            reader: the first of those linears, by its name in the whole model; all have the same map, centre,
                quantizer, grid and `down` of a side.
            place: name of the scope.
            some: x is not all tokens but some of them, as one text.
        """
        g, module = self.g, self.source.linear(reader)
        by_token = module.activations is not None and self.spec.act == "qdq" and not self.source.scheme.static
        with g.scope(place):
            if module.transform is not None:
                x = mapped_inputs(g, self.source, reader, x, module.transform)
            # A quantizer of each token reshapes by itself.
            turned = module.rotation is not None or module.transform is not None
            if turned and not (by_token and module.centre is None and module.side is None):
                x = g.reshape(x, 0, 0, module.in_features)
            if module.centre is not None:
                with g.scope("centre"):
                    x = g.op("Sub", x, float_weight(g, self.source, f"{reader}.centre", (module.in_features,)))
            thin = None if module.side is None else self._thin(x, reader)
            # A bias makes up for the centre: it is subtracted also from inputs that stay float.
            if module.activations is None or self.spec.act == "none":
                return Inputs(x, thin)
            with g.scope("act_q"):
                states = self._quantized(x, reader, module.activations, None if some else self.token_shape)
            return Inputs(states, thin)

    def _thin(self, x: ir.Value, reader: str) -> ir.Value:
        """What `down`, which the first reader holds, makes of inputs that are not quantized."""
        with self.g.scope("side"):
            return self.g.op("MatMul", x, self._of_side(reader, "down"))

    def _of_side(self, linear: str, name: str) -> ir.Value:
        shape = tuple(self.source.linear(linear).side_tensors()[name].shape)
        return float_weight(self.g, self.source, f"{linear}.side_{name}", shape, transposed=True)

    def _quantized(
        self, x: ir.Value, reader: str, quantizer: Quantizer, shape: ir.Value | None
    ) -> ir.Value | IntegerRows:
        """Inputs of a linear as codes or as what these stand for, on its one grid or on one for each token."""
        g, width = self.g, self.source.linear(reader).in_features
        grid = self._static_grid(reader, quantizer) if self.source.scheme.static else None
        if self.spec.weights == "integer":
            return integer_rows(g, x, width, quantizer, shape, grid)
        if grid is not None:
            return fake_quantized_on(g, x, grid, quantizer)
        return fake_quantized(g, x, width, quantizer, shape)

    def _static_grid(self, reader: str, quantizer: Quantizer) -> GridNodes:
        """The one grid of a linear's inputs, constants of the artefact."""
        scale, zero_point = (f"{reader}.{name}" for name in ("input_scale", "input_zero_point"))
        scale_node = initializer(self.g, scale, self.g.dtype, (), lambda: self.source.tensor(scale))
        if quantizer.symmetric:
            return GridNodes(scale_node, None)
        dtype = CODE_TYPES[quantizer.bits, False]
        return GridNodes(scale_node, initializer(self.g, zero_point, dtype, (), lambda: self.source.tensor(zero_point)))

    def linear(self, name: str, read: Inputs) -> ir.Value:
        """Multiply by a linear of the model, by its name in the whole model, and add what its side gives."""
        g, y = self.g, linear(self.g, self.source, name, read.states, self.spec.weights)
        if read.thin is None:
            return y
        with g.scope(name.rsplit(".", 1)[-1]), g.scope("side"):
            return g.op("Add", y, g.op("MatMul", read.thin, self._of_side(name, "up")))
