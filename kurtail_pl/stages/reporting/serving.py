"""What an artefact takes where it is used: bits that are stored, multiplications beside its own, and runtimes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import cast

from torch import nn

from kurtail_pl.artefact.exporter import Exporter
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import KurtailError
from kurtail_pl.methods.cache import FLOAT_BITS
from kurtail_pl.storage.card import read_card
from kurtail_pl.surgery.attention import KEY_TURNS, QUERY_TURNS
from kurtail_pl.surgery.equip import readers_alike
from kurtail_pl.surgery.linear import QuantizedLinear

OWN_RUNTIME = "torch"
"""`kurtail_pl.load` computes whatever an artefact holds."""
BEFORE_THE_MLPS, IN_AN_MLP = 2, 2
"""Inputs of linears in a layer: of queries, keys and values; of the output; and two in each gated MLP."""


@dataclass(frozen=True)
class Serving:
    """What a model takes where it is used.

    Args:
        weight_bits: of a number of the linears' weights, with all that is stored of them, scales and sides.
        cache_bits: of a number of keys and values, with all that is stored of a token; None where that is not known.
        multiplications: of a token in all decoder layers, by maps that act at run time and by sides.
        own: of a token by the linears themselves; fewer than all weights in a mixture.
        refusals: by the runtimes that exports are for, why one does not take it; None where it does.
    """

    weight_bits: float = FLOAT_BITS
    cache_bits: float | None = FLOAT_BITS
    multiplications: int = 0
    own: int = 0
    refusals: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def runtimes(self) -> list[str]:
        """Those that take it."""
        return [OWN_RUNTIME, *(name for name, reason in self.refusals.items() if reason is None)]


def serving_of(folder: Path, exporters: Mapping[str, Exporter | str]) -> Serving:
    """Look at an artefact; no runtime is needed, and no weight is read but for its hash.

    Args:
        folder: the artefact.
        exporters: by the runtimes that they are for; in place of one that cannot be had, why.

    Raises:
        ArtefactError: when the artefact is damaged.
    """
    source = Source(folder)
    turned, own = zip(*(_multiplications(source, layer) for layer in source.layers), strict=True)
    weight_bits = read_card(folder).get("bits_per_weight")
    return Serving(
        weight_bits=FLOAT_BITS if weight_bits is None else weight_bits,
        cache_bits=_cache_bits(source),
        multiplications=sum(turned),
        own=sum(own),
        refusals={name: _refusal(exporter, source) for name, exporter in exporters.items()},
    )


def _cache_bits(source: Source) -> float | None:
    cache = source.scheme.cache
    if cache is None:
        return FLOAT_BITS
    found = [cache.bits_per_number(part, source.kv_heads, source.head_dim) for part in ("keys", "values")]
    return None if None in found else fmean(cast(list[float], found))


def _refusal(exporter: Exporter | str, source: Source) -> str | None:
    if isinstance(exporter, str):
        return exporter
    try:
        return exporter.refused(source) or exporter.garbage(source)
    except KurtailError as reason:  # A family without a form there, for example.
        return str(reason)


def _multiplications(source: Source, layer: nn.Module) -> tuple[int, int]:
    """Of a token in one layer: what is added to the linears' own, and these."""
    attention, scheme = layer.get_submodule(source.architecture.attention), source.scheme
    extra = source.heads * _of_turns(attention, QUERY_TURNS) + source.kv_heads * _of_turns(attention, KEY_TURNS)
    if scheme.cache is not None:
        extra += scheme.cache.multiplications(source.heads, source.kv_heads, source.head_dim)
    own = 0
    for linears in _met(source, layer):
        rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
        own += rows * columns
        # All of them read what one map gives.
        extra += _of_turns(linears[0], ("rotation", "transform"))
        extra += 0 if scheme.side is None else scheme.side.multiplications(rows, columns)
    return extra, own


def _met(source: Source, layer: nn.Module) -> Iterator[list[QuantizedLinear]]:
    """The linears that a token meets, those together that read the same; of experts, which are alike, the first few."""
    alike = readers_alike(layer, source.architecture)
    common = len(source.architecture.common_mlps(layer))
    mlps = common + (source.config.num_experts_per_tok if source.architecture.has_experts(layer) else 0)
    yield from alike[: BEFORE_THE_MLPS + IN_AN_MLP * mlps]


def _of_turns(module: nn.Module, names: tuple[str, ...]) -> int:
    """Of one row, by a module's maps of these names."""
    turns = (getattr(module, name, None) for name in names)
    return sum(turn.multiplications for turn in turns if turn is not None)
