"""The exporter to ONNX: what it refuses, and where its writing and its check are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from kurtail_onnx.card import notes
from kurtail_onnx.forms import CacheIntegers, cache_integers_of, is_thin, weight_integers_of
from kurtail_onnx.graph.activations import CODE_TYPES
from kurtail_onnx.graph.linear import KERNEL_BLOCK
from kurtail_onnx.settings import Settings
from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.scheme import Scheme

QDQ = "--to.weights qdq"


class ONNX(Settings):
    """A graph for ONNX Runtime that says everything that the torch simulation does."""

    maps = True

    def sentence(self) -> str:
        """What is written."""
        return (
            f"an ONNX graph for ONNX Runtime: {self.dtype}, {self.kv} cache, weights {self.weights}, "
            f"activations {self.act}, head {self.head}"
        )

    def refuses(self, source: Source) -> str | None:
        """Where a scheme cannot be said in ONNX: the quantizer, and what can."""
        reasons = chain(self._reasons(source.scheme), self._of_the_head(source.config.hidden_size))
        return next(reasons, None)

    # What writes and compares needs the runtime, which help and refusals do without.

    def write(self, source: Source, folder: Path) -> dict[str, Any]:
        """Write ``model.onnx``, ``model.onnx.data``, the configuration and the tokenizer.

        Raises:
            ConfigError: when float16 does not hold a value.
            DiskFull: when the weights do not fit.
            UnsupportedArchitecture: when the family, or a part of it, has no graph.
        """
        from kurtail_onnx.write import write

        return write(source, self, folder)

    def check(self, source: Source, folder: Path) -> dict[str, Any]:
        """Prove the export equal to the artefact; see `verify.check`."""
        from kurtail_onnx.verify.check import check

        return check(folder, source, self)

    def notes(self, description: Mapping[str, Any], checks: Mapping[str, Any] | None) -> list[str]:
        """Quantizers, proof, and how the folder is run."""
        return notes(description, checks)

    def _of_the_head(self, width: int) -> Iterator[str]:
        if self.head == "int8" and self.dtype == "fp64":
            yield "the kernel of --to.head int8 has no doubles; with --to.dtype fp64 use --to.head float"
        if self.head == "int8" and width % KERNEL_BLOCK:
            yield f"the head has rows of {width} and int8 blocks of {KERNEL_BLOCK}; export with --to.head float"

    def _reasons(self, scheme: Scheme) -> Iterator[str]:
        weights = weight_integers_of(scheme.weights)
        cache = cache_integers_of(scheme.cache)
        parts = {"weights": weights, "activations": self.activations(scheme)}
        yield from _not_in_a_graph(scheme, weights, cache)
        yield from _no_codes({**parts, **({} if cache is None else cache._asdict())})
        if self.dtype == "fp64" and self.weights != "qdq":
            yield f"the kernel of --to.weights {self.weights} has no doubles; with --to.dtype fp64 use {QDQ}"
        if self.weights == "integer":
            yield from _no_integers(parts, scheme.attention_output)
        size = None if weights is None else weights.group_size
        if self.weights == "matmulnbits" and size is not None and size % KERNEL_BLOCK and size != 16:
            yield (
                f"weights have groups of {size}; the MatMulNBits kernel takes 16 and multiples of {KERNEL_BLOCK}: "
                f"use {QDQ}"
            )


def _not_in_a_graph(scheme: Scheme, weights: Quantizer | None, cache: CacheIntegers | None) -> Iterator[str]:
    """What there are no nodes for."""
    if scheme.cache is not None and cache is None:
        yield (
            f"the cache keeps {scheme.cache.sentence()}, and a graph keeps all tokens alike, in integers with a scale "
            "for each token and head: quantize to those (sinks: null) to export, or use the artefact with "
            "kurtail_pl.load"
        )
    if scheme.side is not None and not is_thin(scheme.side):
        yield (
            f"beside the weights is {scheme.side.sentence()}, and a graph has thin matrices alone there: quantize with "
            "side: null, or use the artefact with kurtail_pl.load"
        )
    if scheme.weights is not None and weights is None:
        yield (
            f"the weights are {scheme.weights.sentence()}, and ONNX dequantizes evenly spaced integers with "
            "integer zero points alone: quantize to those to export, or use the artefact with kurtail_pl.load"
        )


def _no_codes(parts: Mapping[str, Quantizer | None]) -> Iterator[str]:
    """What has no type of integers, or no scales in the cache."""
    for name, quantizer in parts.items():
        if quantizer is not None and not quantizer.is_plain:
            yield (
                f"{name} are {quantizer}, and a graph rounds to integers with float scales alone: quantize with "
                "levels: integer and scales: float32 to export, or use the artefact with kurtail_pl.load"
            )
        if quantizer is not None and (quantizer.bits, quantizer.symmetric) not in CODE_TYPES:
            yield f"{name} have {quantizer.bits} bits; ONNX has integer types of 4 and 8 bits: quantize with those"
    for name in ("keys", "values"):
        quantizer = parts.get(name)
        if quantizer is not None and quantizer.group_size is not None:
            yield f"{name} have groups of {quantizer.group_size}; the cache has one scale a head"


def _no_integers(parts: Mapping[str, Quantizer | None], attention_output: str) -> Iterator[str]:
    """Why products of int8 cannot be had."""
    for name, quantizer in parts.items():
        if quantizer is None or not quantizer.symmetric or quantizer.group_size is not None:
            yield (
                f"--to.weights integer multiplies symmetric codes with one scale a row, and the {name} are "
                f"{quantizer}; use {QDQ}"
            )
    if attention_output != "token":
        yield (
            "--to.weights integer multiplies codes with one scale a row, and the scheme has attention_output "
            f"{attention_output!r}; use {QDQ}"
        )
