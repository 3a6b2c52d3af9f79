"""Channel scales as a recipe asks for them: which channels, by which rule, measured on which text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from kurtail_pl.errors import ConfigError, require_seed, shortened
from kurtail_pl.maths.quantizers import Quantizer, require_groups
from kurtail_pl.stages.fusion.rules import AbsMax, Balanced, Rule
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.surgery.families import architecture_of, mlp_widths
from kurtail_pl.surgery.rotations import Rotations, head_dim_of

Part = Literal["values", "mlp_hidden", "keys", "attention_input", "mlp_input"]
Ordered = Literal["values", "mlp_hidden"]


def _short_windows() -> TextSpec:
    return TextSpec(windows=32, seqlen=64)


@dataclass(frozen=True)
class AlphaSearch:
    """The alpha with which the blocks of a model err least once their weights are rounded (SmoothQuant+).

    Args:
        per: ``model`` for one alpha of all blocks, or ``block`` for one of each.
        step: between the alphas that are tried, from 0 to 1.
        rounding: of weights, to nearest; it stands for the scheme, which fusion does not know.

    Raises:
        ConfigError: for another `per`, or a step outside (0, 1].
    """

    per: Literal["model", "block"] = "model"
    step: float = 0.05
    rounding: Quantizer = field(default_factory=lambda: Quantizer(4, symmetric=False))

    def __post_init__(self) -> None:
        if self.per not in ("model", "block"):
            raise ConfigError(f"scales.search.per is {self.per!r}; write model or block")
        if not 0 < self.step <= 1:
            raise ConfigError(f"scales.search.step is {self.step}; give a number above 0, and 1 at most")

    @property
    def alphas(self) -> list[float]:
        """All that are tried."""
        return [round(number * self.step, 9) for number in range(int(1 / self.step + 1e-9) + 1)]


@dataclass(frozen=True)
class ScaleSpec:
    """Which channels are scaled, at no cost later, so that what is quantized errs least.

    Args:
        parts: ``values`` (from `v_proj` into `o_proj`, before R2), ``mlp_hidden`` (from `up_proj` into `down_proj`,
            before R5), ``keys`` (from `q_proj` into `k_proj`, before R3, two channels that RoPE turns together alike),
            ``attention_input`` and ``mlp_input`` (from what reads a norm into the norm's weight, after R1). The last
            three are right for what is centred before it is quantized (`Scheme.centre` and `Scheme.centre_keys`): they
            go by what channels hold about their mean.
        text: its windows go through the original model, in float64, beside the probes; a few thousand tokens do.
        seed: draws the windows.
        rule: ``balanced`` gives each channel the scale with which the output errs least (`balanced_scale`), ``absmax``
            shares the largest magnitudes between inputs and weights, as SmoothQuant and QServe do.
        alpha: of ``absmax``: how much of the range of inputs goes into the weights, from 0 to 1; or a list, one for
            each decoder layer.
        key_alpha: of ``absmax``: how much of the range of keys goes into the queries, from 0 to 1.
        search: of ``absmax``: how `alpha` is found on the text instead; null takes `alpha` as it is.
        magnitudes: of ``absmax``: the ``largest`` of each channel, or their ``mean`` over the tokens that are not
            massive, which alone decide the largest where a model has some.
        reorder: ``values``, ``mlp_hidden`` or both: their channels are sorted by the largest magnitude that they had
            before they were scaled, values within their head, so that those of a group of inputs are alike (QServe).
            No rotation may mix them afterwards: no R2 or R4 for values, no R5 for `mlp_hidden`.

    Raises:
        ConfigError: for no parts and nothing to reorder, or others than these, another rule, an alpha outside [0, 1],
            or a search or means beside the rule ``balanced``.
    """

    parts: list[Part] = field(default_factory=lambda: ["values", "mlp_hidden"])
    text: TextSpec = field(default_factory=_short_windows)
    seed: int = 0
    rule: Literal["balanced", "absmax"] = "balanced"
    alpha: float | list[float] = 0.5
    key_alpha: float = 0.5
    search: AlphaSearch | None = None
    magnitudes: Literal["largest", "mean"] = "largest"
    reorder: list[Ordered] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_seed("scales.seed", self.seed)
        if not (self.parts or self.reorder) or not set(self.parts) <= set(get_args(Part)):
            raise ConfigError(
                f"scales.parts is {self.parts}; name some of {', '.join(get_args(Part))}, or write scales: null"
            )
        if not set(self.reorder) <= set(get_args(Ordered)):
            raise ConfigError(f"scales.reorder is {self.reorder}; name some of {', '.join(get_args(Ordered))}, or none")
        if self.rule not in ("balanced", "absmax"):
            raise ConfigError(f"scales.rule is {self.rule!r}; write balanced or absmax")
        alphas = self.alpha if isinstance(self.alpha, list) else [self.alpha]
        for name, values in {"alpha": alphas, "key_alpha": [self.key_alpha]}.items():
            if not values or not all(0 <= value <= 1 for value in values):
                found = shortened(str(getattr(self, name)), 60)
                raise ConfigError(f"scales.{name} is {found}; give a number from 0 to 1")
        if self.magnitudes not in ("largest", "mean"):
            raise ConfigError(f"scales.magnitudes is {self.magnitudes!r}; write largest or mean")
        if self.rule == "balanced" and (self.search is not None or self.magnitudes == "mean"):
            raise ConfigError(
                "scales.rule is balanced, which has no alpha and goes by squares; write rule: absmax, or search: null "
                "and magnitudes: largest"
            )

    def rule_of(self, layer: int) -> Rule:
        """The rule, with its numbers, of a decoder layer."""
        if self.rule == "balanced":
            return Balanced()
        alpha = self.alpha[layer] if isinstance(self.alpha, list) else self.alpha
        return AbsMax(alpha, self.key_alpha, self.magnitudes == "mean")

    def among(self, parts: Sequence[Part]) -> ScaleSpec | None:
        """The same for some parts alone, in the order that they have; None where it has none of them."""
        kept = [part for part in self.parts if part in parts]
        return replace(self, parts=kept, reorder=[]) if kept else None

    def require_order(self, rotations: Rotations) -> None:
        """Raise ConfigError when channels are to be reordered that a rotation mixes."""
        mixed: list[tuple[Ordered, str, object]] = [
            ("values", "R2", rotations.value),
            ("values", "R4", rotations.attention_output),
            ("mlp_hidden", "R5", rotations.mlp_hidden),
        ]
        for part, number, rotation in mixed:
            if part in self.reorder and rotation is not None:
                raise ConfigError(
                    f"scales.reorder is {self.reorder} and {number} mixes the channels of {part}, whatever their "
                    f"order; leave {part} out of reorder, or the rotation out"
                )


def scale_windows(checkpoint: Checkpoint, scales: ScaleSpec) -> Windows:
    """Windows that channels are measured on.

    Raises:
        ConfigError: when keys are to be scaled that have norms of their own, or channels behind an activation, alphas
            are not as many as layers, or the groups of a search do not divide the widths.
        TextError: when the text is too short.
    """
    config = checkpoint.config
    if isinstance(scales.alpha, list) and len(scales.alpha) != config.num_hidden_layers:
        raise ConfigError(
            f"scales.alpha are {len(scales.alpha)} numbers and this model has {config.num_hidden_layers} layers; give "
            "one for each, or one for all"
        )
    if scales.search is not None:
        inputs = (config.hidden_size, config.num_attention_heads * head_dim_of(config), *mlp_widths(config))
        require_groups("scales.search.rounding", scales.search.rounding.group_size, inputs)
    if "keys" in scales.parts and architecture_of(checkpoint.config).head_norms:
        raise ConfigError(
            f"scales.parts is {scales.parts} and {checkpoint.config.model_type} has norms behind q_proj and k_proj, "
            "which undo the scales of keys; leave keys out"
        )
    rigid = architecture_of(config).rigid_hidden
    if "mlp_hidden" in scales.parts and rigid is not None:
        raise ConfigError(
            f"scales.parts is {scales.parts} and channels between up_proj and down_proj of {config.model_type} cannot "
            f"be scaled: {rigid}; leave mlp_hidden out"
        )
    return cut_windows(checkpoint, scales.text, "calibration", seed=scales.seed)
