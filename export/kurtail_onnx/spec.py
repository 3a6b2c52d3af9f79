"""What an export is: precision, cache, form of the weights, and whether activations are quantized."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from kurtail_onnx.forms import integers_of
from kurtail_onnx.graph.activations import CODE_TYPES
from kurtail_onnx.graph.builder import Precision
from kurtail_onnx.graph.linear import KERNEL_BLOCK, WeightForm
from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.scheme import Scheme


@dataclass(frozen=True)
class ExportSpec:
    """Choices of an export that the artefact leaves open.

    Args:
        dtype: precision of everything that is not a code: fp32 (exact on a CPU), fp16 (for CUDA) or fp64 (equal to
            torch over whole texts, slow, on a CPU).
        kv: packed keeps codes in the cache, float the values they stand for (standard names and shapes, no smaller).
        weights: qdq (standard ONNX), matmulnbits (ONNX Runtime's kernel, spelled out) or integer (int8 products).
        act: qdq quantizes what linears read, none leaves it float; a centre is subtracted either way.
    """

    dtype: Precision = "fp32"
    kv: Literal["packed", "float"] = "packed"
    weights: WeightForm = "qdq"
    act: Literal["qdq", "none"] = "qdq"

    def activations(self, scheme: Scheme) -> Quantizer | None:
        """Quantizer of what linears read."""
        return scheme.activations if self.act == "qdq" else None

    def output_activations(self, scheme: Scheme, head_dim: int) -> Quantizer | None:
        """Quantizer of what the output projection reads."""
        return scheme.output_activations(head_dim) if self.act == "qdq" else None

    def require_exportable(self, scheme: Scheme) -> None:
        """Raise ConfigError where a scheme cannot be said in ONNX, naming the quantizer and what can."""
        if scheme.sinks is not None:
            raise ConfigError(
                f"sinks keep the first {scheme.sinks.tokens} tokens in {scheme.sinks.bits} bits; the graph caches all "
                "tokens alike: quantize with sinks: null to export, or use the artefact with kurtail_pl.load"
            )
        weights = None if scheme.weights is None else integers_of(scheme.weights)
        parts = {"weights": weights, "activations": self.activations(scheme)}
        for name, quantizer in {**parts, "keys": scheme.keys, "values": scheme.values}.items():
            if quantizer is not None and (quantizer.bits, quantizer.symmetric) not in CODE_TYPES:
                raise ConfigError(
                    f"{name} have {quantizer.bits} bits; ONNX has integer types of 4 and 8 bits: quantize with those"
                )
        for name, quantizer in {"keys": scheme.keys, "values": scheme.values}.items():
            if quantizer is not None and quantizer.group_size is not None:
                raise ConfigError(f"{name} have groups of {quantizer.group_size}; the cache has one scale a head")
        if self.dtype == "fp64" and self.weights != "qdq":
            raise ConfigError(
                f"the kernel of --weights {self.weights} has no doubles; with --dtype fp64 use --weights qdq"
            )
        if self.weights == "integer":
            _require_integer(weights, self.activations(scheme))
            if scheme.attention_output != "token":
                raise ConfigError(
                    "--weights integer multiplies codes with one scale a row, and the scheme has attention_output "
                    f"{scheme.attention_output!r}; use --weights qdq"
                )
        if self.weights == "matmulnbits" and weights is not None:
            _require_blocks(weights)

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON."""
        return asdict(self)


def _require_integer(weights: Quantizer | None, activations: Quantizer | None) -> None:
    for name, quantizer in {"weights": weights, "activations": activations}.items():
        if quantizer is None or not quantizer.symmetric or quantizer.group_size is not None:
            raise ConfigError(
                f"--weights integer multiplies symmetric codes with one scale a row, and the {name} are {quantizer}; "
                "use --weights qdq"
            )


def _require_blocks(weights: Quantizer) -> None:
    size = weights.group_size
    if size is not None and size % KERNEL_BLOCK and size != 16:
        raise ConfigError(
            f"weights have groups of {size}; the MatMulNBits kernel takes 16 and multiples of {KERNEL_BLOCK}: "
            "use --weights qdq"
        )
