"""What formats of small blocks share: scales of eight bits, and the search for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from kurtail_pl.maths.microscaling import E8M0_BIAS, e4m3_scales, e8m0_scales, whole_scale
from kurtail_pl.maths.quantizers import Grid, Quantized, split_groups
from kurtail_pl.maths.weights import ERROR_NORM
from kurtail_pl.methods.format import Buffer, Format, Tensors


class Blocks(Format):
    """Levels in blocks whose scales have eight bits; of several scales the one with the least error is taken."""

    bits = 4
    top: ClassVar[int]
    """The largest level."""
    ratios: ClassVar[tuple[float, ...]]
    """Of the scale by which a block's largest magnitude becomes the largest level, those that are tried."""

    @abstractmethod
    def project(self, scale: Tensor) -> Tensor:
        """Scales ``[out, groups]`` that can be stored, near the given ones."""

    def marks(self, grouped: Tensor) -> Tensor | None:
        """What a grid has beside the scales of blocks ``[out, groups, group_size]``, ``[out, groups]``; here nothing.

        It stands where others have zero points.
        """
        return None

    def grid(self, weight: Tensor) -> Grid:
        """By the search over `ratios`, by the error that `maths.weights.search_grid` takes."""
        grouped = split_groups(weight if weight.dtype == torch.float64 else weight.float(), self.group_size)
        marks = self.marks(grouped)
        beside = None if marks is None else marks.unsqueeze(-1)
        limit = grouped.abs().amax(-1) / self.top
        best_error, best_scale = torch.full_like(limit, torch.inf), torch.zeros_like(limit)
        for ratio in self.ratios:
            scale = self.project(limit * ratio)
            values = self.on_grid(grouped, scale.unsqueeze(-1), beside)[1]
            error = (values - grouped).abs().pow(ERROR_NORM).sum(-1)
            better = error < best_error
            best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
        # What can be stored may hang on the largest scale of all.
        return Grid(self.project(best_scale), marks)


class InE8M0(Blocks):
    """Blocks of 32 with a power of two as their scale."""

    group_size = 32
    ratios = (1.0, 2.0, 0.5)

    def project(self, scale: Tensor) -> Tensor:
        """By the OCP rule: magnitudes above the largest level become that."""
        return e8m0_scales(scale * self.top, self.top)

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


class InE4M3(Blocks):
    """Blocks of 16 with an E4M3 scale, and one power of two for the whole weight."""

    group_size = 16
    ratios = tuple(1.5 * 0.94**step for step in range(16))

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
        return Quantized(self.unpacked(tensors["codes"], columns), Grid(in_float(**tensors), None))

    def buffers(self, rows: int, columns: int) -> dict[str, Buffer]:
        """Codes, blocks and tensor_scale."""
        return {
            "codes": self.code_buffer(rows, columns),
            "blocks": self.scale_buffer(rows, columns, torch.uint8),
            "tensor_scale": Buffer((1,), torch.float32),
        }


def in_float(blocks: Tensor, tensor_scale: Tensor, **others: Tensor) -> Tensor:
    """Stored scales of E4M3 in float32, ``[out, groups]``."""
    return blocks.view(torch.float8_e4m3fn).float() * tensor_scale
