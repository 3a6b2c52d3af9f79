"""What a family's record allows: which rotations are fused, which act online, and what is not allowed, and why."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Literal, NamedTuple

from kurtail_pl.surgery.architecture import Architecture

How = Literal["fused", "online", "exact", "not allowed"]


class Allowance(NamedTuple):
    """Of one change of a model: how it is made, and why not otherwise, in words."""

    change: str
    how: How
    reason: str | None = None


def allowances(record: Architecture) -> tuple[Allowance, ...]:
    """Of every change that families differ in, and of all rotations."""
    fixed, rigid = record.rigid_residual, record.rigid_hidden
    return (
        Allowance("R1", "fused" if fixed is None else "online", fixed),
        Allowance("R2", "fused"),
        *(Allowance(name, "online") for name in ("R3", "R4", "R5")),
        _unless("signs of R5", rigid),
        _unless("scales of `mlp_hidden`", rigid),
        _unless("scales of `keys`", "norms of query and key heads undo them" if record.head_norms else None),
        _unless("a prefix", "norms behind RoPE know more of positions" if record.norms_after_rope else None),
    )


def _unless(change: str, reason: str | None) -> Allowance:
    return Allowance(change, "exact" if reason is None else "not allowed", reason)


def sentence(record: Architecture) -> str:
    """How the rotations of a family's models are made, in one line."""
    rotations = [each for each in allowances(record) if each.how in ("fused", "online")]
    parts = []
    for (how, reason), group in groupby(rotations, lambda each: (each.how, each.reason)):
        because = "" if reason is None else f" (not fused: {reason})"
        parts.append(f"{', '.join(each.change for each in group)} {how}{because}")
    return f"rotations of a {record.model_type}: {'; '.join(parts)}"


def allowance_table(records: Iterable[Architecture]) -> list[tuple[str, ...]]:
    """Rows for a table: families that are alike, and how each change is made; the first row names the columns."""
    alike: dict[tuple[str, ...], list[str]] = {}
    columns: tuple[str, ...] = ()
    for record in records:
        found = allowances(record)
        columns = tuple(each.change for each in found)
        alike.setdefault(tuple(each.how for each in found), []).append(f"`{record.model_type}`")
    return [("family", *columns), *((", ".join(names), *hows) for hows, names in alike.items())]
