"""Which bits go where: the quantizers of weights, activations, keys and values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.quantizers import Quantizer


def _activations() -> Quantizer:
    return Quantizer(bits=4, symmetric=True, clip="ratio:0.9")


def _cache() -> Quantizer:
    return Quantizer(bits=4, symmetric=False, clip="ratio:0.95")


@dataclass(frozen=True)
class Scheme:
    """Quantizers of one model; None leaves that part in floating point.

    Args:
        weights: of the decoder's linears, per output channel or group; embeddings and `lm_head` stay float.
        activations: of the inputs of those linears, per token, dynamic.
        keys: of the cached keys after RoPE and rotation, per token and head.
        values: of the cached values, per token and head.

    Raises:
        ConfigError: when the weights' clip is not a ratio.
    """

    weights: Quantizer | None = field(default_factory=Quantizer)
    activations: Quantizer | None = field(default_factory=_activations)
    keys: Quantizer | None = field(default_factory=_cache)
    values: Quantizer | None = field(default_factory=_cache)

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights.clip_kind != "ratio":
            raise ConfigError(
                f"weights.clip is {self.weights.clip!r}; weight grids are searched from a ratio: write ratio:1.0"
            )

    @property
    def name(self) -> str:
        """Short name such as ``w4a4kv4``; ``k4v2`` where keys and values differ."""
        weights, activations, keys, values = (
            16 if q is None else q.bits for q in (self.weights, self.activations, self.keys, self.values)
        )
        cache = f"kv{keys}" if keys == values else f"k{keys}v{values}"
        return f"w{weights}a{activations}{cache}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Inverse of `to_dict`."""
        return cls(**{part: None if spec is None else Quantizer(**spec) for part, spec in data.items()})


FLOAT = Scheme(weights=None, activations=None, keys=None, values=None)
"""Nothing quantized."""
