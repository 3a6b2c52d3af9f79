"""A GGUF file read back by the `gguf` package's own reader and dequantizers, and compared with the artefact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, dequantize
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from kurtail_gguf.families import KEYS, QUERIES, Family, Part, linears_of, norms_of
from kurtail_gguf.tensors import EMBEDDING, FINAL_NORM, HEAD, weight_of
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed

Array = NDArray[np.float32]
AGAIN = "export it again, and report it with its kurtail.json if that does not help"


class Written:
    """The tensors of a file in transformers' order of rows.

    Args:
        path: the file.
        source: the artefact.
        family: its architecture.

    Raises:
        CheckFailed: when the package cannot read it.
    """

    def __init__(self, path: Path, source: Source, family: Family) -> None:
        try:
            tensors = GGUFReader(path).tensors
        except (ValueError, KeyError, IndexError) as error:
            raise CheckFailed(f"the package gguf does not read {path.name} ({error}); {AGAIN}") from error
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in tensors}
        self.left = set(self.tensors)
        self.family, self.heads = family, {QUERIES: source.heads, KEYS: source.kv_heads}

    def kind(self, name: str) -> Kind:
        """Type of a tensor."""
        found: Kind = self.tensors[name].tensor_type
        return found

    def values(self, name: str) -> Array:
        """Numbers of a tensor, in torch's shape.

        Raises:
            CheckFailed: when there is none of that name.
        """
        if name not in self.tensors:
            raise CheckFailed(f"the file has no tensor {name}; {AGAIN}")
        self.left.discard(name)
        tensor = self.tensors[name]
        found: Array = dequantize(tensor.data, tensor.tensor_type)
        values = found.reshape([int(size) for size in reversed(tensor.shape)])
        if f"{name.removesuffix('weight')}scale" in self.tensors:
            scale = self.values(f"{name.removesuffix('weight')}scale")
            values = values * scale.reshape(-1, *[1] * (values.ndim - 1)) if values.ndim > 2 else values * scale
        return self._turned(name, values)

    def minima(self, name: str) -> Array:
        """The second float16 number of each block of a Q4_1 tensor, its smallest value, ``[..., out, blocks]``."""
        data: NDArray[np.uint8] = np.asarray(self.tensors[name].data)
        blocks = data.reshape(*data.shape[:-1], -1, GGML_QUANT_SIZES[Kind.Q4_1][1])
        return self._turned(name, np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0].astype(np.float32))

    def _turned(self, name: str, values: Array) -> Array:
        """Rows that RoPE pairs half a head apart, where the file has them beside each other."""
        heads = self.heads.get(name.split(".")[-2])
        if heads is None or not self.family.neighbours:
            return values
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return np.swapaxes(pairs, 1, 2).reshape(values.shape)


def compare(source: Source, written: Written) -> dict[str, Any]:
    """Compare every tensor of a file with the artefact.

    Returns:
        How many weights of linears and other tensors are equal, and what embedding and head lost in their types.

    Raises:
        CheckFailed: naming a tensor that is missing, has other numbers, or that nobody asked for.
    """
    weights = others = 0
    for index, layer in enumerate(source.layers):
        for part in linears_of(source, index):
            _require_equal(f"{part.name}.weight", written, _weights(source, part))
            weights += len(part.modules)
            if source.linear(part.modules[0]).bias is not None:
                _require_bias(source, part, written)
                others += 1
        for norm in _plain(source, index, layer):
            _require_equal(f"{norm.name}.weight", written, source.tensor(f"{norm.modules[0]}.weight").float().numpy())
            others += 1
    record = source.architecture
    _require_equal(FINAL_NORM, written, source.tensor(f"{record.final_norm}.weight").float().numpy())
    lost = {
        name: _require_near(name, written, source.tensor(f"{module}.weight").float().numpy())
        for name, module in ((EMBEDDING, record.embedding), (HEAD, record.head))
    }
    unknown = sorted(name for name in written.left if not name.startswith("rope_"))
    if unknown:
        raise CheckFailed(f"the file has a tensor {unknown[0]} that the artefact has not; {AGAIN}")
    return {"equal_weights": weights, "equal_others": others + 1, "largest_errors": lost}


def _plain(source: Source, index: int, layer: torch.nn.Module) -> Iterator[Part]:
    """Norms and the router of a layer."""
    yield from norms_of(source, index)
    if router := source.architecture.router_of(layer):
        yield Part(f"blk.{index}.ffn_gate_inp", (f"{source.layer_name(index)}.{router}",))


def _weights(source: Source, part: Part) -> Array:
    found = [weight_of(source, module) for module in part.modules]
    # Float weights have no codes, and are rounded once.
    floats = source.linear(part.modules[0]).weights is None
    together = torch.stack(found) if part.stacked else found[0]
    values: Array = (together.half().float() if floats else together).numpy()
    return values


def _require_equal(name: str, written: Written, expected: Array) -> None:
    found = written.values(name)
    if not np.array_equal(found, expected):
        raise CheckFailed(f"{name} of the file is not what the artefact holds; {AGAIN}")


def _require_bias(source: Source, part: Part, written: Written) -> None:
    """A bias, less what its weight makes of a centre: sums in double may differ in the last place of float32."""
    (module,) = part.modules
    expected = source.tensor(f"{module}.bias").double()
    if source.scheme.centre:
        expected = expected - (weight_of(source, module).double() * source.tensor(f"{module}.centre").double()).sum(1)
    found = written.values(f"{part.name}.bias")
    if not np.allclose(found, expected.float().numpy(), rtol=2**-22, atol=2**-22 * float(expected.abs().max())):
        raise CheckFailed(f"{part.name}.bias of the file is not what the artefact holds; {AGAIN}")


def _require_near(name: str, written: Written, expected: Array) -> float:
    """Largest error of a tensor that was rounded to its type, relative to the largest number.

    Half a step at most: of float16, or of 127 steps up to a block's largest number, whose size is a float16 itself.
    """
    found = written.values(name)
    if written.kind(name) == Kind.F16:
        bound = np.maximum(np.abs(expected) * 2.0**-11, 2.0**-25)
    else:
        largest = np.abs(expected.reshape(len(expected), -1, 32)).max(-1, keepdims=True)
        bound = np.broadcast_to(largest * (0.5 / 127 + 2.0**-11), (*largest.shape[:2], 32)).reshape(expected.shape)
    error = np.abs(found - expected)
    if not (error <= bound * (1 + 1e-6)).all():
        kind = written.kind(name).name
        raise CheckFailed(f"{name} of the file is further from the artefact than {kind} rounds; {AGAIN}")
    return float(error.max() / np.abs(expected).max())
