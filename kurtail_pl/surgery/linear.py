"""The linear layer of a rotated or quantized model: rotate, centre and quantize the input, multiply by the weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.maths.kronecker import Kronecker
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, fake_quantize, quantize
from kurtail_pl.methods import Format, Side
from kurtail_pl.methods.format import Buffer, Tensors
from kurtail_pl.surgery.exact import Exact
from kurtail_pl.surgery.integers import (
    IntegerWeight,
    integer_product,
    integer_weight,
    multiplies,
    processor_multiplies_integers,
)
from kurtail_pl.surgery.online import OnlineHadamard, OnlineKronecker
from kurtail_pl.surgery.readers import Read, Readers


class QuantizedLinear(Exact):
    """``y = Q_a(x H - c) W^T + b`` with an optional online rotation H, activation quantizer Q_a and packed weight W.

    After `put_transform` a learned map P follows the rotation: ``x H P`` stands for ``x H``.

    Beside the weight there may be a side S (`put_side`), which adds ``(x H - c) S^T``.

    The centre c, ``[in]``, is there after `subtract`: the mean of the rotated inputs, whose product with the weight the
    bias holds. After `fix_grid` all tokens share one grid of Q_a, `input_scale` and `input_zero_point`, ``[1]`` both;
    else each has its own.

    The weight is either a float `weight` ``[out, in]`` or the tensors that its format stores. Where integers can be
    multiplied (`surgery.integers`), its codes are, and inputs are never made floats again; elsewhere the weight is
    dequantized when used.

    Args:
        linear: the layer to stand in for; its parameters are shared, not copied.
        rotation: factors of H; the inverse must be fused in the weight.
        activations: quantizer of the input.
    """

    centre: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, linear: nn.Linear, rotation: HadamardFactors | None, activations: Quantizer | None) -> None:
        super().__init__()
        self.exact = ("input_scale",)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rotation = None if rotation is None else OnlineHadamard(rotation)
        self.transform: OnlineKronecker | None = None
        self.activations = activations
        self.weights: Format | None = None
        self.share: Tensor | None = None  # Of each row's range, ``[out, 1]``, that its grid will span, where known.
        self.side: Side | None = None
        self._names: tuple[str, ...] = ()
        # Who holds what linears share, where that is another one; in a tuple, which makes it no part of this module.
        self._lender: tuple[QuantizedLinear, ...] = ()
        self._readers = Readers()
        self.weight: Tensor | None = linear.weight
        self._integers: tuple[list[tuple[Tensor, int]], IntegerWeight] | None = None
        self.bias = linear.bias
        for name in ("centre", "input_scale", "input_zero_point"):
            self.register_buffer(name, None)

    def put_transform(self, kronecker: Kronecker) -> None:
        """Map rotated inputs; the inverse must be fused in the weight."""
        self.transform = OnlineKronecker(kronecker)

    def subtract(self, centre: Tensor) -> None:
        """Subtract a constant ``[in]`` from rotated inputs before they are quantized; the bias makes up for it.

        While the weight is float, the output without quantizers stays what it is.
        """
        assert self.weight is not None
        self.centre = centre.to(self.weight.dtype)
        offset = F.linear(self.centre, self.weight, self.bias)
        self.bias = nn.Parameter(offset, requires_grad=False)

    def fix_grid(self, grid: Grid) -> None:
        """Quantize all inputs on one grid, ``[1]``, whatever the token."""
        # Others may read the same inputs, and a file holds no shared tensors.
        self.input_scale = grid.scale.clone()
        self.input_zero_point = None if grid.zero_point is None else grid.zero_point.to(torch.uint8)

    def pack(self, quantized: Quantized, weights: Format) -> None:
        """Replace the float weight by codes."""
        self._store(weights, weights.pack(quantized))

    def expect_codes(self, weights: Format) -> None:
        """Make room, on the weight's device, for codes that a checkpoint will bring."""
        assert self.weight is not None
        buffers = weights.buffers(self.out_features, self.in_features)
        self._store(weights, {name: self.weight.new_empty(b.shape, dtype=b.dtype) for name, b in buffers.items()})

    def _store(self, weights: Format, tensors: Tensors) -> None:
        self.weights, self.weight, self._integers = weights, None, None
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._names = tuple(tensors)
        self.exact = ("input_scale", *self._names)

    def stored(self) -> Tensors:
        """The tensors that stand for a packed weight."""
        return {name: getattr(self, name) for name in self._names}  # A scale may be one that learns.

    def quantized(self) -> Quantized:
        """Codes and grid of a packed weight."""
        assert self.weights is not None
        return self.weights.unpack(self.stored(), self.in_features)

    def dense_weight(self) -> Tensor:
        """The weight as floats, ``[out, in]``, without its side."""
        weight = self.weight  # Read once: it may be computed from rotations that learn.
        if weight is not None:
            return weight
        assert self.weights is not None
        return self.weights.values(self.quantized())

    def unpack(self) -> None:
        """Replace the codes by the floats they stand for: the same results, faster, for eight times the memory."""
        names = list(self.stored())
        self.weight = nn.Parameter(self.dense_weight(), requires_grad=False)
        self.weights, self._names, self._integers = None, (), None
        for name in names:
            delattr(self, name)

    def prepare(self, x: Tensor) -> Tensor:
        """What the weight multiplies: the input rotated, centred and quantized, ``[..., in]``."""
        return self._quantize(self.turn(x))

    def _quantize(self, x: Tensor) -> Tensor:
        return x if self.activations is None else fake_quantize(x, self.activations, self.input_grid(x.dtype))

    def input_grid(self, dtype: torch.dtype) -> Grid | None:
        """The grid of all inputs, ``[1]``, in their type; None where each token has its own."""
        if self.input_scale is None:
            return None
        zero_point = self.input_zero_point
        return Grid(self.input_scale.to(dtype), None if zero_point is None else zero_point.to(dtype))

    def turn(self, x: Tensor) -> Tensor:
        """The input rotated, mapped and centred, not yet quantized, ``[..., in]``."""
        for turn in (self.rotation, self.transform):
            x = x if turn is None else turn(x)
        return x if self.centre is None else x - self.centre

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` -> ``[..., out]``."""
        weight = self._integer_weight(x)
        integers = weight is not None
        settings = self.activations, integers, self.centre is None, self.input_scale is None
        turned, quantized = self._readers.read(x, settings, lambda: self._read(x, integers))
        if weight is None:
            assert isinstance(quantized, Tensor)
            y = F.linear(quantized, self.dense_weight().to(x.dtype), self.bias)
        else:
            assert self.activations is not None
            assert not isinstance(quantized, Tensor)
            y = integer_product(quantized, self.activations, weight).view(*x.shape[:-1], -1)
            y = (y if self.bias is None else y.add_(self.bias)).to(x.dtype)
        return y if self.side is None else y + self.side.product(turned, self.side_tensors())

    def _read(self, x: Tensor, integers: bool) -> Read:
        """The input turned and quantized, as codes or as what these stand for."""
        turned = self.turn(x)
        if not integers:
            return Read(turned, self._quantize(turned))
        assert self.activations is not None
        return Read(turned, quantize(turned.flatten(0, -2), self.activations, self.input_grid(turned.dtype)))

    @property
    def multiplies_integers(self) -> bool:
        """Whether codes of inputs are multiplied by codes of the weight, which stays packed then."""
        on_cpu = all(tensor.is_cpu for tensor in self.stored().values())
        return on_cpu and processor_multiplies_integers() and multiplies(self.activations, self.weights)

    def _integer_weight(self, x: Tensor) -> IntegerWeight | None:
        """What codes of inputs are multiplied by; None where floats are, as for gradients.

        It is unpacked once, and again when other tensors are stored or those that are stored have changed.
        """
        stored = self.stored().values()
        learns = any(each.requires_grad for each in (x, *stored))
        if learns or self.activations is None or not (self.multiplies_integers and x.is_cpu and x.numel()):
            return None
        made_from = [(each, 0 if each.is_inference() else each._version) for each in stored]
        if self._integers is None or not all(
            then is now and version == same
            for (then, version), (now, same) in zip(self._integers[0], made_from, strict=True)
        ):
            self._integers = made_from, integer_weight(self.quantized(), self.activations)
        return self._integers[1]

    def side_tensors(self) -> Tensors:
        """The tensors of its side: what linears share that read the same inputs is the first one's."""
        assert self.side is not None
        lender, names = (*self._lender, self)[0], self.side.buffers(self.out_features, self.in_features)
        return {name: getattr(lender if name in self.side.shared else self, _in_state(name)) for name in names}


def read_together(linears: Sequence[QuantizedLinear]) -> None:
    """Let linears that read the same inputs, turn and quantize them alike, do so once."""
    readers = Readers(len(linears))
    for linear in linears:
        linear._readers = readers


def side_buffers(linears: Sequence[QuantizedLinear], side: Side) -> dict[str, Buffer]:
    """The tensors of one side for linears that read the same inputs: for their weights, one above the other."""
    return side.buffers(sum(linear.out_features for linear in linears), linears[0].in_features)


def put_side(linears: Sequence[QuantizedLinear], side: Side, tensors: Tensors) -> None:
    """Put a side beside the weights of linears that read the same inputs; what they share the first one holds.

    Args:
        linears: in the order of their rows.
        side: of their weights, one above the other.
        tensors: its own; what is not shared has a row for each output of all linears.
    """
    first, start = linears[0], 0
    for linear in linears:
        linear.side, linear._lender = side, () if linear is first else (first,)
        rows = slice(start, start + linear.out_features)
        for name, tensor in tensors.items():
            if name not in side.shared:
                # A file holds no tensors that share their memory.
                linear.register_buffer(_in_state(name), tensor[rows].clone())
            elif linear is first:
                linear.register_buffer(_in_state(name), tensor)
        start = rows.stop


def _in_state(name: str) -> str:
    """Name of a side's tensor among those of a linear."""
    return f"side_{name}"
