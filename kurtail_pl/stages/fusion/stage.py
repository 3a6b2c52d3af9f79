"""Fuse: fold the norms and rotate the weights, layer by layer in float64, with a gate after each fold."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kurtail_pl.errors import CheckpointError
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.stages.fusion.alphas import alpha_errors, note, with_alphas
from kurtail_pl.stages.fusion.passes import Fuser
from kurtail_pl.stages.fusion.scales import ScaleSpec, scale_windows
from kurtail_pl.stages.fusion.signs import SignSpec, sign_errors, sign_windows, with_signs
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.text import Windows
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.card import is_ours, read_card, require_intact, write_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import require_space, sha256_of
from kurtail_pl.storage.joining import room_for
from kurtail_pl.storage.keys import companions_sha256, require_learned_on, settings_key
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.mark import write_config
from kurtail_pl.storage.model_config import GENERATION, read_generation_config
from kurtail_pl.storage.resume import Workplace, resumable_folder
from kurtail_pl.storage.rotation_file import FILE as ROTATIONS
from kurtail_pl.storage.rotation_file import hash_of, require_rotations_of, write_rotations
from kurtail_pl.storage.statement import origin_of
from kurtail_pl.streaming.compute import Compute, Device
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.equip import layers_of
from kurtail_pl.surgery.rotations import Rotations

log = logging.getLogger(__name__)

PROBE_TOKENS = 64
UNROTATED = "none"
"""Method name of a model that is only copied."""


def fuse(
    checkpoint: Checkpoint,
    rotations: Rotations,
    method: str,
    folder: Path,
    overwrite: bool = False,
    device: Device = "auto",
    scales: ScaleSpec | None = None,
    signs: SignSpec | None = None,
) -> Path:
    """Write a float32 model with rotations fused in, whose output is the original's.

    A probe of 64 tokens goes through the original and the rotated layers together, in float64: after each fold of each
    layer the outputs are compared, and at the end the logits, in float64 and as written in float32.

    Args:
        checkpoint: a plain model; its norms and head are left alone when there is no residual rotation.
        rotations: what to fuse.
        method: name that goes into `kurtail.json`.
        folder: where the model goes; one that was fused from the same is reused.
        overwrite: replace the folder if it exists.
        device: where the products are computed, ``cpu``, ``cuda`` or ``auto``; in float64 on either.
        scales: channels to scale; None for none.
        signs: of R4 and R5, chosen among several draws; None takes them as they are.

    Raises:
        CheckpointError: when the rotations are not of the model's sizes.
        ConfigError: when channels are to be scaled that this family cannot scale, or reordered that a rotation mixes,
            or the rotations are another model's.
        GateError: when a fold changes the output; nothing is kept.
        TextError: when the text of the scales or signs is too short.
        ArtefactError, DiskFull: when the folder exists, or the model does not fit.
        UnsupportedArchitecture: when the family is unknown.
    """
    require_rotations_of(checkpoint.config, rotations, "the rotations")
    require_learned_on(rotations, checkpoint.sha256, checkpoint.folder)
    if scales is not None:
        scales.require_order(rotations)
    chosen = _Chosen.of(checkpoint, scales, signs)
    recipe = _recipe(checkpoint, rotations, method, chosen)
    compute = Compute(device)
    with alone_with(folder):
        if is_ours(folder) and read_card(folder).get("recipe") == recipe:
            require_intact(folder)
            log.info("reusing the fused model %s", folder)
            return folder
        walker = Walker(checkpoint, dtype=torch.float64, device=compute.torch_device)
        # The weights and the parts that they are joined from.
        require_space(folder, room_for(_float32_parts(walker)))
        with resumable_folder(folder, overwrite, recipe) as work:
            with Meter(work.state.get("cost")) as meter:
                chosen, rotations = chosen.searched(checkpoint, rotations, work, compute)
                rotations = chosen.signed(checkpoint, rotations, work, compute)
                gate = Fuser(walker, rotations, work, chosen.scales, chosen.tokens).run(meter)
            _write_rest(checkpoint, rotations, work.folder, {"method": method, "gate": gate, "recipe": recipe}, meter)
    log.info(
        "fused into %s in %.0f s; logits changed by %.1e (float64) and %.1e (float32) relative",
        folder, meter.seconds, gate["float64"], gate["float32"],
    )  # fmt: skip
    return folder


@dataclass(frozen=True)
class _Chosen:
    """What texts decide about a fusion: scales of channels, signs of R4 and R5."""

    scales: ScaleSpec | None
    signs: SignSpec | None
    scale_text: Windows | None
    sign_text: Windows | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, scales: ScaleSpec | None, signs: SignSpec | None) -> _Chosen:
        """With their windows."""
        return cls(
            scales,
            signs,
            None if scales is None else scale_windows(checkpoint, scales),
            None if signs is None else sign_windows(checkpoint, signs),
        )

    @property
    def key(self) -> dict[str, Any]:
        """All of it that decides the result."""
        texts = {"scales": (self.scales, self.scale_text), "signs": (self.signs, self.sign_text)}
        return {
            name: value
            for part, (spec, text) in texts.items()
            if spec is not None and text is not None
            for name, value in ((part, settings_key(spec)), (f"{part}_text_sha256", text.text_sha256))
        }

    @property
    def tokens(self) -> Tensor:
        """Windows that their scales are measured on."""
        nothing = torch.empty(0, PROBE_TOKENS, dtype=torch.long)
        return nothing if self.scale_text is None else self.scale_text.tokens

    def searched(
        self, checkpoint: Checkpoint, rotations: Rotations, work: Workplace, compute: Compute
    ) -> tuple[_Chosen, Rotations]:
        """With the alphas that err least, which the rotations' origin says; as `signed` where work is taken up."""
        scales = self.scales
        if scales is None or scales.search is None:
            return self, rotations
        if "alphas" not in work.state:
            work.state["alphas"] = alpha_errors(checkpoint, rotations, scales, scales.search, self.tokens, compute)
        scales = with_alphas(scales, scales.search, work.state["alphas"])
        origin = {**rotations.origin, "scales": note(scales, work.state["alphas"])}
        return replace(self, scales=scales), replace(rotations, origin=origin)

    def signed(self, checkpoint: Checkpoint, rotations: Rotations, work: Workplace, compute: Compute) -> Rotations:
        """Rotations with the signs that err least; work that is taken up again has their errors in its state."""
        if self.signs is None or self.sign_text is None:
            return rotations
        if "signs" not in work.state:
            tokens = self.sign_text.tokens
            work.state["signs"] = sign_errors(checkpoint, rotations, self.signs, tokens, self.scales, compute)
        return with_signs(rotations, self.signs, work.state["signs"])


def _float32_parts(walker: Walker) -> list[int]:
    """Bytes of the parts that a fused model is written in: embedding, layers, final norm with head."""
    model, architecture = walker.model, walker.architecture
    ends = [[architecture.embedding], [architecture.final_norm, architecture.head]]
    parts = [[model.get_submodule(name) for name in end] for end in ends]
    parts += [[layer] for layer in layers_of(model, architecture)]
    return [4 * sum(p.numel() for module in part for p in module.parameters()) for part in parts]


def _recipe(checkpoint: Checkpoint, rotations: Rotations, method: str, chosen: _Chosen) -> dict[str, Any]:
    """All that decides the fused model."""
    return {
        "model_sha256": checkpoint.sha256,
        "companions_sha256": companions_sha256(checkpoint),
        "method": method,
        "rotations_sha256": hash_of(rotations),
        "versions": versions(),
        **chosen.key,
    }


def _write_rest(
    checkpoint: Checkpoint, rotations: Rotations, folder: Path, found: Mapping[str, Any], meter: Meter
) -> None:
    """Write what stands beside the weights: configuration, tokenizer, generation settings, rotations, card."""
    config = copy.deepcopy(checkpoint.config)
    config.tie_word_embeddings, config.dtype = False, torch.float32
    write_config(folder, config, plain=not rotations.any_online)
    copy_companions(checkpoint, folder)
    write_rotations(folder / ROTATIONS, rotations)
    card = {
        **found,
        "scheme": FLOAT.to_dict(),
        "source": {"sha256": checkpoint.sha256, **origin_of(checkpoint.folder)},
        "tokenizer_sha256": checkpoint.tokenizer_sha256(),
        "rotations": rotations.origin,
        "rotations_sha256": sha256_of(folder / ROTATIONS),
        "cost": {"fuse": meter.to_dict()},
        "versions": versions(),
    }
    write_card(folder, card)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Save tokenizer and generation settings beside new weights; settings that nobody can read are left out."""
    checkpoint.tokenizer().save_pretrained(folder)
    try:
        if read_generation_config(checkpoint.folder) is not None:
            (folder / GENERATION).write_bytes((checkpoint.folder / GENERATION).read_bytes())
    except CheckpointError as error:
        log.warning("left out: %s", error)
