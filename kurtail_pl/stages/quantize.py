"""Quantize: a fused model's weights to codes, layer by layer, into an artefact folder."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kurtail_pl.artefact.shards import ShardWriter, named
from kurtail_pl.artefact.skeleton import stored_bytes
from kurtail_pl.errors import ArtefactError, ConfigError, require_seed
from kurtail_pl.methods import Needs, Rounder, default_rounder
from kurtail_pl.ranks import ALONE, Ranks
from kurtail_pl.stages.allocation import WIDTHS, allocated_bits, sensitivities
from kurtail_pl.stages.calibration import as_stored
from kurtail_pl.stages.clips import Part
from kurtail_pl.stages.float_layer import FloatLayer
from kurtail_pl.stages.fuse import UNROTATED, copy_companions
from kurtail_pl.stages.learned_clips import BlockTraining, ClipLearning
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.prefix import prefix_states, require_tokens
from kurtail_pl.stages.solver import LayerSolver
from kurtail_pl.stages.text import TextSpec, Windows, cut_windows
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.card import read_card, require_intact, rotations_of, write_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import require_space
from kurtail_pl.storage.keys import folder_sha256, settings_key
from kurtail_pl.storage.mark import write_config
from kurtail_pl.storage.resume import Workplace, resumable_folder
from kurtail_pl.storage.rotation_file import FILE as ROTATIONS
from kurtail_pl.storage.rotation_file import write_rotations
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.attention import put_prefix
from kurtail_pl.surgery.equip import empty_model, equip_model, layers_of, require_scheme_fits
from kurtail_pl.surgery.exact import exact_names
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.layout import checkpoint_state
from kurtail_pl.surgery.rotations import Rotations
from kurtail_pl.surgery.scheme import FLOAT, Scheme

log = logging.getLogger(__name__)

INHERITED = ("source", "tokenizer_sha256", "rotations", "rotations_sha256", "gate")
"""What an artefact's card takes over from the fused model's."""


@dataclass(frozen=True)
class QuantizeSpec:
    """How weights become codes.

    Args:
        scheme: bits of weights, activations, keys and values.
        rounder: how weights are rounded. GPTQ's correction ``gptaq`` runs the float model beside, layer by layer, and
            excludes `match_outputs`, which makes up for the rounding of inputs already; ``foem`` goes with it.
        average_bits: give each decoder layer's weights bits of its own, so many on average, by how much their errors
            hurt on the first of the text's windows (`stages.allocation`); null gives all the same.
        text: calibration text.
        quantized_activations: let the Hessians see activations and KV as quantized as they will be.
        match_outputs: before it is rounded, change each weight by least squares so that its product with the quantized
            inputs is nearest to its own with the float ones; needs `quantized_activations`.
        match_damping: relative to the mean of the Hessian's diagonal, and added to it for that.
        by_attention: where the weight that makes values is matched and solved, let tokens count by the attention they
            get (`maths.received`): an error in the first token's value, which most others read, is else one of many.
        search_clips: parts of the scheme (``activations``, ``keys``, ``values``) whose clip is a ratio of its own at
            each site, that with the least error of what reads it (`stages.clips`); needs `quantized_activations`.
        learn_clips: train clips, and the scales of the weights, on the output of each decoder layer in float
            (`stages.learned_clips`); null does not. It excludes `search_clips`.
        seed: draws the calibration windows.
    """

    scheme: Scheme = field(default_factory=Scheme)
    rounder: Rounder = field(default_factory=default_rounder)
    average_bits: float | None = None
    text: TextSpec = field(default_factory=TextSpec)
    quantized_activations: bool = False
    match_outputs: bool = False
    match_damping: float = 0.01
    by_attention: bool = False
    search_clips: list[Part] = field(default_factory=list)
    learn_clips: ClipLearning | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)
        if self.match_outputs and not (self.quantized_activations and self.scheme.activations):
            raise ConfigError(
                "match_outputs is true; weights are matched to quantized inputs: set quantized_activations: true and "
                "give scheme.activations"
            )
        for part in self.search_clips:
            if not (self.quantized_activations and getattr(self.scheme, part, None)):
                raise ConfigError(
                    f"search_clips names {part}; activations, keys and values can be searched where they are "
                    f"quantized: set quantized_activations: true and give scheme.{part}"
                )
        if "activations" in self.search_clips and self.scheme.static:
            raise ConfigError(
                "search_clips names activations and scheme.activation_scales is static; a static grid is searched by "
                "itself: leave activations out, or write activation_scales: token"
            )
        if self.learn_clips is not None:
            self.learn_clips.require_learnable(self.scheme, self.quantized_activations, self.search_clips)
        if self.match_outputs and Needs.FLOAT_INPUTS in self.rounder.needs:
            raise ConfigError(
                f"match_outputs is true and the weights are {self.rounder.sentence()}; both make up for the same loss: "
                "leave one out"
            )
        if not 0 < self.match_damping < math.inf:
            raise ConfigError(f"match_damping is {self.match_damping}; give a positive number, usually 0.01")
        if self.scheme.weights is not None:
            self.rounder.require(self.scheme.weights)
        if self.average_bits is not None:
            self._require_free_bits(self.average_bits)

    def _require_free_bits(self, average: float) -> None:
        if not min(WIDTHS) <= average <= max(WIDTHS):
            raise ConfigError(f"average_bits is {average}; layers have {min(WIDTHS)} to {max(WIDTHS)} bits")
        weights = self.scheme.weights
        if weights is None or weights.relative_error() is None or self.scheme.layer_bits is not None:
            raise ConfigError(
                f"average_bits is {average}; bits are chosen where the error of a format is known: give scheme.weights "
                "with levels of the normal distribution, and scheme.layer_bits null"
            )

    @property
    def scheme_name(self) -> str:
        """Short name of the scheme, with the bits asked for on average while it is open which layers get them."""
        return self.scheme.name_with(self.average_bits)

    def method_name(self, rotations: str) -> str:
        """Name of what a method's rotations and these weights make: without rotations, how the weights are rounded."""
        return self.rounding if rotations == UNROTATED and self.scheme.weights is not None else rotations

    @property
    def rounding(self) -> str:
        """Short name of how weights are rounded, and to what where that is not integers."""
        weights = self.scheme.weights
        return "-".join(part for part in ("" if weights is None else weights.label, self.rounder.label) if part)

    @property
    def needs(self) -> Needs:
        """What the rounder asks for, where it has something to do."""
        return Needs.NOTHING if self.scheme.weights is None else self.rounder.needs

    @property
    def needs_float_model(self) -> bool:
        """Whether the calibration windows go through the float model too."""
        return Needs.FLOAT_INPUTS in self.needs

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, methods by their kinds."""
        return {**asdict(self), "scheme": self.scheme.to_dict(), "rounder": self.rounder.to_dict()}

    @property
    def needs_text(self) -> bool:
        """Whether calibration windows are used."""
        return self.needs_inputs or self.average_bits is not None

    @property
    def needs_inputs(self) -> bool:
        """Whether the inputs of the linears are used."""
        searches = bool(self.search_clips) or self.learn_clips is not None
        return bool(self.needs) or self.scheme.calibrated or self.match_outputs or searches


def quantize(
    fused: Path,
    spec: QuantizeSpec,
    folder: Path,
    overwrite: bool = False,
    compute: Compute = AUTO,
    ranks: Ranks = ALONE,
) -> Path:
    """Write an artefact folder from a fused model.

    Args:
        fused: folder that `fuse` wrote.
        spec: scheme and method.
        folder: where the artefact goes.
        overwrite: replace the folder if it exists.
        compute: device and floating-point type of the layers that the calibration text goes through.
        ranks: the processes that share the calibration windows; all see the same folders, and the first writes. What
            needs no windows the first does alone, and the others return at once.

    Raises:
        ConfigError: when a group size does not divide the model's widths, or it does not know a token of the prefix.
        ArtefactError: when `fused` is not a fused model or is damaged, or the folder exists.
        TextError: when the calibration text is too short.
        DiskFull: when the artefact does not fit.
    """
    if not spec.needs_inputs:
        if not ranks.leads:
            return folder
        ranks = ALONE
    fused_card = read_card(fused)
    if ranks.leads:
        require_intact(fused)
    if "quantize" in fused_card:
        raise ArtefactError(f"{fused} is quantized already; give the folder that kurtail fuse wrote")
    checkpoint = Checkpoint(fused)
    scheme, rotations = spec.scheme, rotations_of(fused)
    require_fit(checkpoint.config, spec)
    if scheme.prefix is not None:
        require_tokens(checkpoint.config, scheme.prefix)
    model = _equipped(checkpoint, scheme if spec.quantized_activations else FLOAT, rotations)
    float_model = _equipped(checkpoint, FLOAT, rotations) if spec.needs_float_model else None
    walker = Walker(checkpoint, model, compute.torch_dtype, compute.torch_device)
    match = spec.match_damping if spec.match_outputs else None
    solver = LayerSolver(walker, scheme, spec.rounder, match, ranks, spec.search_clips, spec.by_attention)
    text, learning_text = calibration_windows(checkpoint, spec), learning_windows(checkpoint, spec)
    # The weights and the parts that they are joined from.
    require_space(folder, 2 * stored_bytes(model, scheme))
    recipe = {
        "fused_sha256": folder_sha256(fused),
        "quantize": settings_key(spec),
        "dtype": compute.dtype,
        "calibration_text_sha256": None if text is None else text.text_sha256,
    }
    with resumable_folder(folder, overwrite, recipe, ranks) as work:
        with Meter(work.state.get("cost")) as meter:
            if spec.average_bits is not None and text is not None:
                alphas = sensitivities(checkpoint, text.tokens, spec.seed, compute, work, ranks)
                scheme = replace(scheme, layer_bits=allocated_bits(scheme, alphas, spec.average_bits))
            _write_weights(walker, solver, float_model, scheme, text, learning_text, spec, work, meter)
        card: dict[str, Any] = {
            **{key: fused_card.get(key) for key in INHERITED},
            "fuse": fused_card.get("recipe", {}),
            "method": spec.method_name(fused_card["method"]),
            "scheme": scheme.to_dict(),
            "rounding": spec.rounding,
            "quantize": spec.to_dict(),
            "dtype": compute.dtype,
            "calibration_text_sha256": recipe["calibration_text_sha256"],
            "fused_sha256": recipe["fused_sha256"],
            **solver.notes,
            "clips": solver.clips,
            "sensitivities": work.state.get("sensitivities"),
            "cost": {**fused_card["cost"], "quantize": meter.to_dict()},
            "versions": versions(),
        }
        if ranks.leads:
            write_config(work.folder, checkpoint.config, plain=scheme == FLOAT and not rotations.any_online)
            copy_companions(checkpoint, work.folder)
            write_rotations(work.folder / ROTATIONS, rotations)
            write_card(work.folder, card)
    log.info(
        "quantized to %s in %.0f s (%.0f CPU s)%s: %s",
        scheme.name, meter.seconds, meter.cpu_seconds, ranks.shared, folder,
    )  # fmt: skip
    return folder


def _equipped(checkpoint: Checkpoint, scheme: Scheme, rotations: Rotations) -> PreTrainedModel:
    model = empty_model(checkpoint.config)
    equip_model(model, scheme, rotations)
    return model


def require_fit(config: PretrainedConfig, spec: QuantizeSpec) -> None:
    """Raise ConfigError when a model's widths, layers or linears are not what groups, bits or `by_attention` need."""
    architecture = architecture_of(config)
    if spec.by_attention and architecture.value == architecture.query:
        raise ConfigError(
            f"by_attention is true and {architecture.value} of {architecture.model_type} makes queries and keys too, "
            "for which tokens count alike; write by_attention: false"
        )
    require_scheme_fits(config, spec.scheme)


def calibration_windows(checkpoint: Checkpoint, spec: QuantizeSpec) -> Windows | None:
    """Windows that GPTQ's Hessians are made from, and sensitivities measured on; None where no text is needed."""
    if not spec.needs_text:
        return None
    return cut_windows(checkpoint, spec.text, "calibration", seed=spec.seed)


def learning_windows(checkpoint: Checkpoint, spec: QuantizeSpec) -> Windows | None:
    """Windows of the same text that clips are learned on, drawn by another seed; None where none are learned."""
    if spec.learn_clips is None:
        return None
    text = replace(spec.text, windows=spec.learn_clips.windows, seqlen=spec.learn_clips.seqlen)
    return cut_windows(checkpoint, text, "calibration", seed=spec.seed + 1)


@torch.no_grad()
def _write_weights(
    walker: Walker,
    solver: LayerSolver,
    float_model: PreTrainedModel | None,
    scheme: Scheme,
    text: Windows | None,
    learning_text: Windows | None,
    spec: QuantizeSpec,
    work: Workplace,
    meter: Meter,
) -> None:
    architecture, layers, ranks = walker.architecture, walker.architecture.layers, solver.ranks
    shards = ShardWriter(work.folder, work.scratch, parts=walker.n_layers + 2)

    def state(prefix: str, module: nn.Module) -> dict[str, Tensor]:
        tensors = checkpoint_state(module.state_dict(), architecture)
        # Scales stay as they are: there is one for thousands of weights.
        exact = exact_names(module)
        return named(prefix, {k: v if k.rpartition(".")[2] in exact else as_stored(v) for k, v in tensors.items()})

    solver.notes.update(work.state.get("notes", {}))
    solver.clips.extend(work.state.get("clips", []))
    if work.done is None and ranks.leads:
        embedding = walker.embedding(torch.float32)
        shards.write(0, state(architecture.embedding, embedding))
        embedding.to("meta")
    windows = text.tokens if text is not None and spec.needs_inputs else torch.empty(0, 0, dtype=torch.long)

    def share(windows: Tensor) -> Tensor:
        mine = ranks.share(len(windows))
        return windows[mine.start : mine.stop]

    hidden = walker.hidden_states(share(windows), work)
    learning = None if learning_text is None else walker.hidden_states(share(learning_text.tokens), work, "learning")
    exact = None if float_model is None else (layers_of(float_model, architecture), hidden.beside("exact"))
    prefix = list(prefix_states(walker.checkpoint, scheme.prefix, walker.dtype, walker.device)) if scheme.prefix else []
    for index, layer in walker.layers(f"{spec.rounder.label} layers", work):
        if prefix:
            for each in (layer,) if exact is None else (layer, exact[0][index]):
                put_prefix(each.get_submodule(architecture.attention), *prefix[index])
        beside = None if exact is None else FloatLayer(walker, exact[0][index], layer, exact[1])
        training = None
        if spec.learn_clips is not None and learning is not None:
            training = BlockTraining(walker, layer, spec.learn_clips, learning, ranks)
        solver.solve_layer(layer, f"{layers}.{index}", hidden, scheme.layer_weights(index), beside)
        if training is not None:
            solver.clips.append(training.learn(layer))
            hidden.after.fill(walker.advance(layer, states) for states in hidden.before)
        if ranks.leads:
            shards.write(index + 1, state(f"{layers}.{index}", layer))
        work.state.update(notes=solver.notes, clips=solver.clips, cost=meter.to_dict())
    if not ranks.leads:
        return
    norm, head = walker.head(torch.float32)
    shards.write(walker.n_layers + 1, {**state(architecture.final_norm, norm), **state(architecture.head, head)})
    shards.close()
