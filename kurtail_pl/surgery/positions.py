"""How long a text may be, and where longer ones are turned by other angles."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from kurtail_pl.errors import ConfigError

LONGROPE = "longrope"
"""Rotary type whose angles, those of the first tokens too, are others in texts longer than the original positions."""


def positions_of(config: PretrainedConfig) -> int:
    """The longest text that a model is made for; scaled rotary embeddings count as they extend it.

    Beyond it those of the type dynamic would depend on the texts before.
    """
    positions: int = config.max_position_embeddings
    return positions


def require_positions(seqlen: int, positions: int) -> None:
    """Raise ConfigError when windows of so many tokens are longer than a model's positions."""
    require_lengths({"seqlen": seqlen}, positions)


def require_lengths(lengths: Mapping[str, int], positions: int) -> None:
    """Raise ConfigError when any windows, by the names of their settings, are longer than a model's positions."""
    if long := [f"{name} is {seqlen}" for name, seqlen in lengths.items() if seqlen > positions]:
        raise ConfigError(
            f"{', '.join(long)} and the model has {positions} positions (max_position_embeddings), beyond which "
            "its numbers mean nothing; ask for shorter windows"
        )


def rotary_border(config: PretrainedConfig) -> int | None:
    """Longest text with the angles of short ones; None where all texts have the same angles.

    A cache of keys that a short text was given does not belong to a longer one.
    """
    rope = config.rope_parameters or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == LONGROPE else None


def steady_positions(config: PretrainedConfig) -> int:
    """Longest text whose tokens have the same angles fed at once and one by one."""
    border = rotary_border(config)
    return positions_of(config) if border is None else border
