"""The tensors of a GGUF file, planned from an artefact: names, types, shapes, and bytes, made when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType, quantize
from gguf.quants import quant_shape_to_byte_shape
from numpy.typing import NDArray

from kurtail_gguf.families import KEYS, QUERIES, Family, Part, linears_of, norms_of
from kurtail_gguf.forms import Form, float_form, form_of
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError

Dense = Literal["f16", "q8_0"]
KINDS: dict[Dense, Kind] = {"f16": Kind.F16, "q8_0": Kind.Q8_0}
EMBEDDING, FINAL_NORM, HEAD = "token_embd.weight", "output_norm.weight", "output.weight"


@dataclass(frozen=True)
class Planned:
    """A tensor of the file.

    Args:
        name: with its ending.
        kind: of its numbers.
        shape: in torch's order, of numbers.
        make: its content: floats of that shape, or bytes ``[..., bytes of a row]``.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of what `make` gives."""
        return self.shape if self.is_float else quant_shape_to_byte_shape(self.shape, self.kind)

    @property
    def is_float(self) -> bool:
        """Whether numbers stand for themselves."""
        return self.kind in (Kind.F32, Kind.F16)


def planned(source: Source, family: Family, embedding: Dense, head: Dense) -> Iterator[Planned]:
    """All tensors of an artefact but those of RoPE.

    Raises:
        ConfigError: when one of them has no place in the file.
    """
    record = source.architecture
    yield _dense(source, f"{record.embedding}.weight", EMBEDDING, KINDS[embedding])
    yield _float(source, f"{record.final_norm}.weight", FINAL_NORM)
    # An artefact's head is its own: the last norm is in it.
    yield _dense(source, f"{record.head}.weight", HEAD, KINDS[head])
    for index, layer in enumerate(source.layers):
        for norm in norms_of(source, index):
            yield _float(source, f"{norm.modules[0]}.weight", f"{norm.name}.weight")
        if router := record.router_of(layer):
            yield _float(source, f"{source.layer_name(index)}.{router}.weight", f"blk.{index}.ffn_gate_inp.weight")
        for part in linears_of(source, index):
            yield from _linear(source, family, part, layer_form(source, index))


def layer_form(source: Source, index: int) -> Form:
    """How a layer's weights are stored.

    Raises:
        ConfigError: when their format has no form in a GGUF file.
    """
    weights = source.scheme.layer_weights(index)
    form = float_form() if weights is None else form_of(weights)
    if isinstance(form, str):
        raise ConfigError(form)
    return form


def file_type(source: Source) -> LlamaFileType:
    """What most of the weights are: the first layer's."""
    return layer_form(source, 0).file_type


def rows_of(source: Source, family: Family, name: str, rows: int) -> NDArray[np.int64]:
    """The artefact's row for each row of a tensor in the file.

    Where RoPE turns neighbours, a head of queries or keys has the two halves of its rows turn by turn.
    """
    part, order = name.split(".")[-1], np.arange(rows)
    heads = {QUERIES: source.heads, KEYS: source.kv_heads}.get(part)
    if not family.neighbours or heads is None:
        return order
    return order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _linear(source: Source, family: Family, part: Part, form: Form) -> Iterator[Planned]:
    linears = [source.linear(module) for module in part.modules]
    rows, columns = linears[0].out_features, linears[0].in_features
    order = rows_of(source, family, part.name, rows)
    if columns % form.block:
        raise ConfigError(
            f"{part.modules[0]} reads {columns} channels and GGUF's {form.kind.name} has blocks of {form.block}; "
            "leave the weights float (scheme.weights: null) to export"
        )
    stack = (len(linears),) if part.stacked else ()

    def stored(module: str) -> NDArray[Any]:
        linear = source.linear(module)
        names = ["weight"] if linear.weights is None else linear.weights.buffers(rows, columns)
        packed = form.pack({name: source.tensor(f"{module}.{name}") for name in names}, columns)
        return (packed.view(np.float16) if form.kind == Kind.F16 else packed)[order]

    def content() -> NDArray[Any]:
        found = [stored(module) for module in part.modules]
        return np.stack(found) if part.stacked else found[0]

    yield Planned(f"{part.name}.weight", form.kind, (*stack, rows, columns), content)
    if form.scale is not None:
        yield _scales(source, family, part, form.scale)
    if linears[0].bias is not None:
        yield _bias(source, family, part, order)


def _scales(source: Source, family: Family, part: Part, name: str) -> Planned:
    """The scale of each whole weight."""
    if not family.weight_scales:
        raise ConfigError(
            f"the weights have one more scale for each whole weight, which llama.cpp's {family.name} leaves out in its "
            "MLPs; quantize with scheme.weights.class_path: kurtail_pl.methods.MXFP4 or Uniform"
        )

    def content() -> NDArray[Any]:
        return torch.cat([source.tensor(f"{module}.{name}") for module in part.modules]).numpy()

    return Planned(f"{part.name}.scale", Kind.F32, (len(part.modules),), content)


def _bias(source: Source, family: Family, part: Part, order: NDArray[np.int64]) -> Planned:
    """A bias; a centre that nothing subtracts is in it: ``W (x - c) + b = W x + (b - W c)``."""
    layer_part = part.name.split(".")[-1]
    if layer_part not in family.biases:
        why = "quantize with scheme.centre: false" if source.scheme.centre else "use another exporter"
        raise ConfigError(f"{part.modules[0]} has a bias, which llama.cpp's {family.name} has no place for; {why}")
    (module,) = part.modules

    def content() -> NDArray[Any]:
        linear, bias = source.linear(module), source.tensor(f"{module}.bias").double()
        if source.scheme.centre:
            bias = bias - weight_of(source, module).double() @ source.tensor(f"{module}.centre").double()
        assert linear.out_features == len(bias)
        return bias.float().numpy()[order]

    return Planned(f"{part.name}.bias", Kind.F32, (len(order),), content)


def weight_of(source: Source, module: str) -> torch.Tensor:
    """What a linear's codes stand for, ``[out, in]`` float32."""
    linear = source.linear(module)
    if linear.weights is None:
        return source.tensor(f"{module}.weight").float()
    names = linear.weights.buffers(linear.out_features, linear.in_features)
    stored = {name: source.tensor(f"{module}.{name}") for name in names}
    return linear.weights.values(linear.weights.unpack(stored, linear.in_features)).float()


def _float(source: Source, ours: str, name: str) -> Planned:
    """A tensor in float32."""
    shape = tuple(source.model.get_parameter(ours).shape)
    return Planned(name, Kind.F32, shape, lambda: source.tensor(ours).float().numpy())


def _dense(source: Source, ours: str, name: str, kind: Kind) -> Planned:
    """The embedding or the head, rounded to what was chosen for it."""
    shape = tuple(source.model.get_parameter(ours).shape)
    if kind != Kind.F16 and shape[-1] % 32:
        raise ConfigError(
            f"{ours} has rows of {shape[-1]} and q8_0 blocks of 32; export with --to.embedding f16 --to.head f16"
        )
    return Planned(name, kind, shape, lambda: quantize(source.tensor(ours).float().numpy(), kind))
