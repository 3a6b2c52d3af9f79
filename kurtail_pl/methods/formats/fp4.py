"""Four-bit floating point in small blocks: MXFP4 (OCP Microscaling Formats 1.0) and NVFP4."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kurtail_pl.maths.microscaling import E8M0_BIAS, e4m3_scales, e8m0_scales, whole_scale
from kurtail_pl.maths.quantizers import Grid, Quantized, split_groups
from kurtail_pl.maths.weights import ERROR_NORM
from kurtail_pl.methods.format import Buffer, Format, Tensors, in_scales, levels_in_scales

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of E2M1, by the low three bits of a code; the fourth is the sign."""
LEVELS = torch.tensor([*MAGNITUDES, *(-level for level in MAGNITUDES)], dtype=torch.float64)
"""By their codes; zero has two."""


class _FP4(Format):
    """E2M1 levels and the scales of blocks; of several scales the one with the least error, as `search_grid` has it."""

    bits = 4
    ratios: ClassVar[tuple[float, ...]]
    """Of the scale by which a block's largest magnitude becomes 6, those that are tried."""

    @abstractmethod
    def project(self, scale: Tensor) -> Tensor:
        """Scales ``[out, groups]`` that can be stored, near the given ones."""

    def grid(self, weight: Tensor) -> Grid:
        """By the search over `ratios`."""
        grouped = split_groups(weight if weight.dtype == torch.float64 else weight.float(), self.group_size)
        limit = grouped.abs().amax(-1) / MAGNITUDES[-1]
        best_error, best_scale = torch.full_like(limit, torch.inf), torch.zeros_like(limit)
        for ratio in self.ratios:
            scale = self.project(limit * ratio)
            values = self.on_grid(grouped, scale.unsqueeze(-1), None)[1]
            error = (values - grouped).abs().pow(ERROR_NORM).sum(-1)
            better = error < best_error
            best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
        # What can be stored may hang on the largest scale of all.
        return Grid(self.project(best_scale), None)

    def on_grid(self, x: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ties go to the even mantissa; beyond 6 is 6."""
        relative = in_scales(x, scale)
        levels = torch.tensor(MAGNITUDES, dtype=scale.dtype, device=scale.device)
        borders, size = (levels[1:] + levels[:-1]) / 2, relative.abs()
        below, above = torch.bucketize(size, borders), torch.bucketize(size, borders, right=True)
        code = torch.where(below % 2 == 0, below, above)
        sign = (relative < 0) & (code > 0)
        return code + 8 * sign, torch.where(sign, -levels[code], levels[code]) * scale

    def values(self, quantized: Quantized) -> Tensor:
        """Levels times scales."""
        return levels_in_scales(LEVELS, quantized, self.group_size)

    code_dtype = torch.uint8


@dataclass(frozen=True)
class MXFP4(_FP4):
    """Blocks of 32 inputs with a power of two as their scale: 4.25 bits a weight."""

    group_size = 32
    label = "mxfp4"
    ratios = (1.0, 2.0, 0.5)

    def sentence(self) -> str:
        """In words."""
        return "MXFP4: 4-bit floating point in blocks of 32, their scales powers of two"

    def project(self, scale: Tensor) -> Tensor:
        """By the OCP rule, 2^(floor(log2(largest)) - 2), largest being 6 scale: magnitudes of 6 to 8 become 6."""
        return e8m0_scales(scale * MAGNITUDES[-1], round(MAGNITUDES[-1]))

    def pack(self, quantized: Quantized) -> Tensors:
        """Scales as E8M0: their exponents, 127 added."""
        exponent = torch.log2(quantized.grid.scale).round() + E8M0_BIAS
        return {"codes": self.packed(quantized.codes), "scale": exponent.to(torch.uint8)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Scales in float32."""
        scale = torch.exp2(tensors["scale"].float() - E8M0_BIAS)
        return Quantized(self.unpacked(tensors["codes"], columns), Grid(scale, None))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes and scale."""
        return {
            "codes": self.code_buffer(rows, columns),
            "scale": self.scale_buffer(rows, columns, torch.uint8),
        }


@dataclass(frozen=True)
class NVFP4(_FP4):
    """Blocks of 16 inputs with an E4M3 scale, and one power of two for the whole weight: 4.5 bits a weight."""

    group_size = 16
    label = "nvfp4"
    ratios = tuple(1.5 * 0.94**step for step in range(16))

    def sentence(self) -> str:
        """In words."""
        return "NVFP4: 4-bit floating point in blocks of 16, their scales in E4M3"

    def project(self, scale: Tensor) -> Tensor:
        """To E4M3 times the weight's own scale; a block of zeros has the smallest."""
        return e4m3_scales(scale, whole_scale(scale.amax()))

    def pack(self, quantized: Quantized) -> Tensors:
        """Scales of blocks as bytes, and that of the weight."""
        scale = quantized.grid.scale
        whole = whole_scale(scale.amax())  # From stored scales the same.
        blocks = (scale / whole).to(torch.float8_e4m3fn).view(torch.uint8)
        return {"codes": self.packed(quantized.codes), "blocks": blocks, "tensor_scale": whole.float().reshape(1)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> Quantized:
        """Scales in float32."""
        scale = tensors["blocks"].view(torch.float8_e4m3fn).float() * tensors["tensor_scale"]
        return Quantized(self.unpacked(tensors["codes"], columns), Grid(scale, None))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes, blocks and tensor_scale."""
        return {
            "codes": self.code_buffer(rows, columns),
            "blocks": self.scale_buffer(rows, columns, torch.uint8),
            "tensor_scale": Buffer((1,), torch.float32),
        }
