"""The product of 4-bit weights with quantized inputs: by humming-kernels, and in torch as that was read to compute it.

Read in humming-kernels 0.1.19. `include/humming/kernel/process_input/quantization.cuh` quantizes: the scale is the
largest magnitude over 7 in float32, at least 1e-30; codes are the nearest integers, half to even, of the number *times
the inverse* of the scale, from -8 to 7. `include/humming/arith/epilogue_arith.cuh` scales: the integer sum times the
token's scale in float32, rounded to the model's type, times the weight's scale in that type, and rounded again.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-30
DENSE = {"gemm_type": "dense"}


class Product(Protocol):
    """A linear without a bias, of weights with a scale for each output and inputs with one for each token."""

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 ``[tokens, in]`` and float32 scales ``[tokens]``."""

    def whole(self, x: Tensor) -> Tensor:
        """``[tokens, in]`` -> ``[tokens, out]``, each sum in one piece."""

    def split(self, x: Tensor) -> Tensor:
        """The same as a server runs it: where that is faster, parts of a sum are added in the model's type."""

    def chosen(self, tokens: int) -> str:
        """What it runs for so many tokens."""


def read_rule(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of tokens, step by step as the kernel was read to make them."""
    largest = (1 << (bits - 1)) - 1
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / largest).clamp(min=SMALLEST_SCALE)
    codes = (x * scale.reciprocal()).clamp(-largest - 1, largest).round()
    return codes.to(torch.int8), scale.squeeze(-1)


def halves(stored: Tensor) -> Tensor:
    """Signed codes of bytes ``[..., n / 2]``, the even one in the low half, ``[..., n]``."""
    signed = stored.view(torch.int8)
    return torch.stack([signed << 4 >> 4, signed >> 4], dim=-1).flatten(-2)


class Emulated:
    """What the kernels were read to compute, on a CPU.

    Args:
        tensors: of an exported linear.
        bits: of its inputs.
    """

    def __init__(self, tensors: dict[str, Tensor], bits: int) -> None:
        from compressed_tensors.compressors.pack_quantized import unpack_from_int32

        self.bits, self.scale = bits, tensors["weight_scale"]
        shape = torch.Size(tensors["weight_shape"].tolist())
        self.codes = unpack_from_int32(tensors["weight_packed"], 4, shape).double()

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By the rule itself."""
        return read_rule(x, self.bits)

    def whole(self, x: Tensor) -> Tensor:
        """Two roundings to the model's type."""
        codes, scale = self.quantized(x)
        sums = (codes.double() @ self.codes.T).float() * scale.unsqueeze(-1)
        scaled: Tensor = sums.to(self.scale.dtype) * self.scale.T
        return scaled

    def split(self, x: Tensor) -> Tensor:
        """The same."""
        return self.whole(x)

    def chosen(self, tokens: int) -> str:
        """No kernel."""
        return f"int{self.bits} emulated in torch"


class Humming:
    """A layer of humming-kernels from the tensors of an exported linear, as they are.

    Args:
        tensors: ``weight_packed``, ``weight_scale`` ``[out, 1]`` and ``weight_shape``.
        bits: of what it reads, 4 or 8.
        tokens: numbers of tokens that it will be called with; each has a kernel of its own, compiled at the first call.
    """

    def __init__(self, tensors: dict[str, Tensor], bits: int, tokens: tuple[int, ...]) -> None:
        from humming.layer import HummingLayer

        rows, columns = tensors["weight_shape"].tolist()
        common = {"quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "symmetric": True}
        self.bits, self.tokens = bits, sorted(tokens)
        self.layer = HummingLayer(
            rows,
            columns,
            weight_config=common | {"num_bits": 4, "strategy": "channel"},
            input_config=common | {"num_bits": bits, "dynamic": True, "group_size": 0},
            torch_dtype=tensors["weight_scale"].dtype,
        ).cuda()
        self.layer.load_from_tensors({name: tensor.cuda() for name, tensor in tensors.items()})
        self.layer.transform()
        self._plans: dict[bool, str] = {}

    def codes(self, x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
        """Packed codes and scales ``[tokens, 1]``, behind a Hadamard over blocks if a size is given."""
        from humming.forward import may_process_input

        codes, _, scale = may_process_input(self.layer.humming_config, x, hadamard_block_size=block)
        assert scale is not None
        return codes, scale

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Two codes share a byte, the even one low."""
        codes, scale = self.codes(x)
        return (halves(codes) if self.bits == 4 else codes), scale.flatten()

    def multiplied(self, codes: Tensor, scale: Tensor, *, in_one_piece: bool = False) -> Tensor:
        """The product alone."""
        output: Tensor = self.layer(
            codes,
            input_scale=scale,
            compute_config=DENSE | {"use_batch_invariant": in_one_piece},
            tuning_config=self.plan(in_one_piece),
        )
        return output

    def whole(self, x: Tensor) -> Tensor:
        """By its kernels that do not depend on the batch, which split no sum."""
        return self.multiplied(*self.codes(x), in_one_piece=True)

    def split(self, x: Tensor) -> Tensor:
        """By those that it takes by itself."""
        return self.multiplied(*self.codes(x))

    def plan(self, in_one_piece: bool) -> str:
        """Its own choice for each number of tokens, and only those: all that it might need compile for minutes."""
        if in_one_piece not in self._plans:
            starts = [0, *self.tokens[:-1]]
            ends = [*self.tokens[:-1], 1 << 30]
            intervals = [
                [start, end, self._choice(count, in_one_piece)]
                for start, end, count in zip(starts, ends, self.tokens, strict=True)
            ]
            self._plans[in_one_piece] = json.dumps(intervals, default=lambda value: value.value)
        return self._plans[in_one_piece]

    def _choice(self, tokens: int, in_one_piece: bool) -> dict[str, Any]:
        from humming.config.mma import get_default_mma_type
        from humming.tune.sm8x import Sm80Heuristics

        # From 9.0 on the package has no table for int4: asked for one, it stops. The one for 8.0 is right, not tuned.
        config, table = self.layer.humming_config, self._table() if self._has_table() else Sm80Heuristics
        choice: dict[str, Any] = table.get_config(config, tokens, use_batch_invariant=in_one_piece)
        choice.setdefault("mma_type", get_default_mma_type(config).value)
        return choice

    def _table(self) -> Any:
        from humming.tune import get_heuristics_class

        return get_heuristics_class()

    def _has_table(self) -> bool:
        table = self._table()
        return self.layer.humming_config.a_dtype in {4: table.b4_allowed_dtypes, 8: table.b8_allowed_dtypes}[self.bits]

    def chosen(self, tokens: int) -> str:
        """Instruction, tiles, and whether a sum is split."""
        config, choice = self.layer.humming_config, self._choice(tokens, in_one_piece=False)
        table = "its own table" if self._has_table() else "the table for 8.0, as it has none here"
        return (
            f"inputs {config.a_dtype}, weights {config.b_dtype}, {choice['mma_type']}, block {choice['block_shape']}, "
            f"sums {'split' if choice.get('use_stream_k') else 'whole'}, by {table}"
        )
