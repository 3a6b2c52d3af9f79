"""Which bits go where: how weights, activations, keys and values are kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from kurtail_pl.errors import ConfigError
from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.cache import CacheFormat, bits_name
from kurtail_pl.methods.defaults import default_cache, default_format
from kurtail_pl.methods.format import Format
from kurtail_pl.methods.method import plain, validated
from kurtail_pl.methods.side import Side


def _activations() -> Quantizer:
    return Quantizer(bits=4, symmetric=True, clip=Clip(amount=0.9))


@dataclass(frozen=True)
class Scheme:
    """What is quantized of one model, and how; None leaves that part in floating point.

    Args:
        weights: format of the decoder's linears, per output channel or group; embeddings and `lm_head` stay float.
        activations: quantizer of the inputs of those linears.
        cache: how keys and values are kept.
        attention_output: the scales of the input of `o_proj`: those of `activations` (``token``), or one for each
            head of each token (``head``), as SpinQuant's code has it.
        centre: subtract each channel's mean over the calibration text from those inputs before they are quantized; a
            bias of the linear adds its product with the weight.
        activation_scales: those of `activations`: each token's own, from its values (``token``), or one for all tokens
            that a linear reads, the best for those of the calibration text that are not massive, with `clip` where the
            search begins (``static``).
        prefix: tokens that stand before every text, with keys and values of their own that are never quantized
            (PrefixQuant, arXiv 2410.05265): they take the attention that goes nowhere else, so that no token of the
            text needs massive activations for it; null for none.
        layer_bits: bits of the weights of each decoder layer; null for those of `weights` in all of them.
        side: a part of each weight that stays in floating point and reads inputs that are not quantized.

    Raises:
        ConfigError: when `attention_output` or `activation_scales` has another value, `layer_bits` or a side stands
            beside weights that stay float, or static scales beside what has several for a token.
    """

    weights: Format | None = field(default_factory=default_format)
    activations: Quantizer | None = field(default_factory=_activations)
    cache: CacheFormat | None = field(default_factory=default_cache)
    attention_output: Literal["token", "head"] = "token"
    centre: bool = False
    activation_scales: Literal["token", "static"] = "token"
    prefix: list[int] | None = None
    layer_bits: list[int] | None = None
    side: Side | None = None

    def __post_init__(self) -> None:
        if self.layer_bits is not None:
            self._require_weights_of(self.layer_bits)
        if self.side is not None and self.weights is None:
            raise ConfigError(
                "side is given and weights is null; it stands beside rounded weights: give both, or neither"
            )
        if self.attention_output not in ("token", "head"):
            raise ConfigError(f"attention_output is {self.attention_output!r}; write token or head")
        if self.centre and self.activations is None:
            raise ConfigError("centre is true and activations is null; inputs are centred for their quantizer alone")
        if self.activation_scales not in ("token", "static"):
            raise ConfigError(f"activation_scales is {self.activation_scales!r}; write token or static")
        if self.static:
            self._require_one_scale()

    def _require_weights_of(self, layer_bits: list[int]) -> None:
        """Raise ConfigError when there are no weights that could have these bits."""
        if self.weights is None:
            raise ConfigError("layer_bits are given and weights is null; give weights too, or leave both out")
        if not layer_bits:
            raise ConfigError("layer_bits is empty; give the bits of each layer, or null")
        for bits in layer_bits:
            with_bits(self.weights, bits)

    def _require_one_scale(self) -> None:
        """Raise ConfigError when static activations are asked to have several scales, or none, or no search."""
        if self.activations is None:
            raise ConfigError("activation_scales is static and activations is null; give activations, or write token")
        if self.attention_output == "head":
            raise ConfigError(
                "activation_scales is static and attention_output is head; a static scale is for all channels: write "
                "attention_output: token, or activation_scales: token"
            )
        if self.activations.group_size is not None:
            raise ConfigError(
                f"activation_scales is static and activations.group_size is {self.activations.group_size}; a static "
                "scale is for all channels: write group_size: null, or activation_scales: token"
            )
        if not self.activations.is_plain:
            raise ConfigError(
                f"activation_scales is static and activations are {self.activations}; static grids are searched for "
                "integers: write levels: integer and scales: float32"
            )
        if self.activations.clip.kind != "ratio":
            raise ConfigError(
                f"activation_scales is static and activations.clip is a {self.activations.clip.kind}; static "
                "grids are searched from a ratio: write clip.kind: ratio"
            )

    @property
    def static(self) -> bool:
        """Whether inputs of linears have scales that do not depend on the token."""
        return self.activation_scales == "static"

    @property
    def calibrated(self) -> bool:
        """Whether a calibration text decides a part of it, whatever the method of the weights."""
        return self.centre or self.static or (self.cache is not None and self.cache.calibrated)

    @property
    def centre_keys(self) -> bool:
        """Whether rotated keys are centred before the cache keeps them."""
        return self.cache is not None and self.cache.centre_keys

    def output_activations(self, head_dim: int) -> Quantizer | None:
        """Quantizer of the input of `o_proj`."""
        if self.activations is None or self.attention_output == "token":
            return self.activations
        return replace(self.activations, group_size=head_dim)

    def layer_weights(self, index: int) -> Format | None:
        """Format of the weights of one decoder layer."""
        if self.weights is None or self.layer_bits is None:
            return self.weights
        return with_bits(self.weights, self.layer_bits[index])

    @property
    def name(self) -> str:
        """Short name such as ``w4a4kv4``; ``k4v2`` where keys and values differ, ``w3.5`` where layers' weights do."""
        return self.name_with(None if self.layer_bits is None else fmean(self.layer_bits))

    def name_with(self, average: float | None) -> str:
        """The name, given the average bits of weights; None where all layers have the same."""
        weights = 16 if self.weights is None else self.weights.average_bits
        activations = 16 if self.activations is None else self.activations.bits
        cache = bits_name(None, None) if self.cache is None else self.cache.name
        return f"w{weights if average is None else average:.3g}a{activations}{cache}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = plain(self)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Inverse of `to_dict`; raises ConfigError when it names what this version does not know."""
        return validated(cls, data)


def with_bits(weights: Format, bits: int) -> Format:
    """A format with other bits; raises ConfigError when it does not take them, or has bits of its own."""
    try:
        return replace(weights, bits=bits)  # type: ignore[type-var]
    except TypeError as error:
        kind = type(weights).__name__
        raise ConfigError(f"layers have bits of their own, and {kind} has no setting bits; leave them out") from error


FLOAT = Scheme(weights=None, activations=None, cache=None)
"""Nothing quantized."""
