"""What a recipe says of quantization: methods that check themselves and one another."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from transformers import PretrainedConfig

from kurtail_pl.errors import ConfigError, require_seed
from kurtail_pl.methods import BitTuner, ClipTuner, Needs, Rounder, TransformTuner, WeightTuner, default_rounder
from kurtail_pl.methods.method import Method, plain
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.target import Target
from kurtail_pl.methods.targets import TARGETS, TargetName
from kurtail_pl.stages.fusion.stage import UNROTATED
from kurtail_pl.stages.quantization.prefix import require_tokens
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.streaming.compute import Compute
from kurtail_pl.surgery.equip import require_scheme_fits
from kurtail_pl.surgery.families import architecture_of


@dataclass(frozen=True)
class QuantizeSpec:
    """How weights become codes.

    Args:
        scheme: bits of weights, activations, keys and values.
        rounder: how weights are rounded. One that asks for the float model's inputs runs it beside, layer by layer.
        matching: how weights are changed first, to make up for the rounding of their inputs; null for not at all.
        clips: how each site gets a clip of its own; null leaves those of the scheme.
        transforms: maps, scales of channels and clips that are trained on each decoder layer before its weights are
            rounded; null for none.
        bits: how each decoder layer's weights get bits of their own, by how much their errors hurt on the first of the
            text's windows (`stages.quantization.sensitivity`); null leaves those of the scheme.
        text: calibration text.
        quantized_activations: let the Hessians see activations and KV as quantized as they will be.
        by_attention: where the weight that makes values is matched and solved, let tokens count by the attention they
            get (`maths.received`): an error in the first token's value, which most others read, is else one of many.
        seed: draws the calibration windows.
        target: the runtime that the artefact is made for: it is rounded and evaluated by its rules.

    Raises:
        ConfigError: when a seed is none, methods do not go together, or the target lacks one.
    """

    scheme: Scheme = field(default_factory=Scheme)
    rounder: Rounder = field(default_factory=default_rounder)
    matching: WeightTuner | None = None
    clips: ClipTuner | None = None
    transforms: TransformTuner | None = None
    bits: BitTuner | None = None
    text: TextSpec = field(default_factory=TextSpec)
    quantized_activations: bool = False
    by_attention: bool = False
    seed: int = 0
    target: TargetName = "torch"

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        for tuner in (self.clips, self.transforms, self.bits):
            if tuner is not None:
                tuner.require(self.scheme, self.quantized_activations)
        if self.clips is not None and self.transforms is not None:
            raise ConfigError("clips and transforms are both given, and both decide the clips; write one of them: null")
        if self.matching is not None:
            self.matching.require(self.scheme, self.quantized_activations, self.rounder)
        if self.scheme.cache is not None and self.text.windows is not None:
            self.scheme.cache.require_text(self.text.windows * self.text.seqlen)
        if self.scheme.weights is not None:
            self.rounder.require(self.scheme.weights)
        self.runtime.require(self.scheme, self.clips, self.transforms)

    @property
    def runtime(self) -> Target:
        """The target."""
        return TARGETS[self.target]

    @property
    def scheme_name(self) -> str:
        """Short name of the scheme, with the bits asked for on average while it is open which layers get them."""
        return self.scheme.name if self.bits is None else self.scheme.name_with(self.bits.average)

    def method_name(self, rotations: str) -> str:
        """Name of what a method's rotations and these weights make: without rotations, how the weights are rounded."""
        return self.rounding if rotations == UNROTATED and self.scheme.weights is not None else rotations

    @property
    def rounding(self) -> str:
        """Short name of how weights are rounded, what was trained before, the levels and the side."""
        weights, side = self.scheme.weights, self.scheme.side
        parts = (self.transforms, weights, self.rounder, side)
        labels = ("" if part is None else part.label for part in parts)
        return "-".join(label for label in labels if label)

    @property
    def needs(self) -> Needs:
        """What rounder and side ask for, where they have something to do."""
        if self.scheme.weights is None:
            return Needs.NOTHING
        return self.rounder.needs | (Needs.NOTHING if self.scheme.side is None else self.scheme.side.needs)

    @property
    def needs_float_model(self) -> bool:
        """Whether the calibration windows go through the float model too."""
        return Needs.FLOAT_INPUTS in self.needs

    @property
    def needs_inputs(self) -> bool:
        """Whether the inputs of the linears are used."""
        return bool(self.needs) or self.scheme.calibrated or not (self.matching is None and self.clips is None)

    @property
    def needs_text(self) -> bool:
        """Whether calibration windows are used."""
        return self.needs_inputs or not (self.bits is None and self.transforms is None)

    @property
    def own_windows(self) -> tuple[int, int] | None:
        """Windows, and tokens in each, that clips or transforms are trained on; None where they want none."""
        tuner = self.clips or self.transforms
        return None if tuner is None else tuner.own_windows

    @property
    def methods(self) -> list[Method]:
        """What works on weights, cache and clips."""
        weights = [] if self.scheme.weights is None else [self.scheme.weights, self.rounder]
        others = (self.scheme.side, self.scheme.cache, self.matching, self.clips, self.transforms, self.bits)
        return [*weights, *(method for method in others if method is not None)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, methods by their kinds."""
        return {each.name: plain(getattr(self, each.name)) for each in fields(self)}


def require_fit(config: PretrainedConfig, spec: QuantizeSpec, compute: Compute) -> None:
    """Raise ConfigError when a model's widths, layers, linears or tokens, or the type, are not what a recipe needs."""
    if spec.transforms is not None and compute.dtype != "float32":
        raise ConfigError(
            f"dtype is {compute.dtype} and transforms are trained, whose small steps that does not hold; write "
            "data.init_args.compute.dtype: float32"
        )
    architecture = architecture_of(config)
    if spec.by_attention and architecture.value == architecture.query:
        raise ConfigError(
            f"by_attention is true and {architecture.value} of {architecture.model_type} makes queries and keys too, "
            "for which tokens count alike; write by_attention: false"
        )
    require_scheme_fits(config, spec.scheme)
    if spec.scheme.prefix is not None:
        require_tokens(config, spec.scheme.prefix)


def calibration_windows(checkpoint: Checkpoint, spec: QuantizeSpec) -> Windows | None:
    """Windows that moments are made from, and sensitivities measured on; None where no text is needed."""
    if not spec.needs_text:
        return None
    return cut_windows(checkpoint, spec.text, "calibration", seed=spec.seed)


def tuning_windows(checkpoint: Checkpoint, spec: QuantizeSpec) -> Windows | None:
    """Windows of the same text that tuners train on, drawn by another seed; None where none are asked for."""
    if spec.own_windows is None:
        return None
    windows, seqlen = spec.own_windows
    return cut_windows(
        checkpoint, replace(spec.text, windows=windows, seqlen=seqlen), "calibration", seed=spec.seed + 1
    )
