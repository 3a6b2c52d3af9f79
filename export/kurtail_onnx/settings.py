"""What an export to ONNX can be asked for; the graph, its check and its description are built by these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.scheme import Scheme

Precision = Literal["fp32", "fp16", "fp64"]
WeightForm = Literal["qdq", "matmulnbits", "integer"]
Head = Literal["float", "int8"]


@dataclass(frozen=True)
class Settings(Exporter):
    """What an export to ONNX can be asked for.

    Args:
        dtype: precision of everything that is not a code: fp32 (exact on a CPU), fp16 (for CUDA) or fp64 (equal to
            torch over whole texts, slow, on a CPU).
        kv: packed keeps codes in the cache, float the values they stand for (standard names and shapes, no smaller).
        weights: qdq (standard ONNX), matmulnbits (ONNX Runtime's kernel, spelled out) or integer (int8 products).
        act: qdq quantizes what linears read, none leaves it float; a centre is subtracted either way.
        head: float, as in the artefact, or int8: 8 bits in blocks of 32, rounded here, and so is what it reads.
    """

    dtype: Precision = "fp32"
    kv: Literal["packed", "float"] = "packed"
    weights: WeightForm = "qdq"
    act: Literal["qdq", "none"] = "qdq"
    head: Head = "float"

    def activations(self, scheme: Scheme) -> Quantizer | None:
        """Quantizer of what linears read."""
        return scheme.activations if self.act == "qdq" else None

    def output_activations(self, scheme: Scheme, head_dim: int) -> Quantizer | None:
        """Quantizer of what the output projection reads."""
        return scheme.output_activations(head_dim) if self.act == "qdq" else None
