"""Fuse: fold the norms and rotate the weights, layer by layer in float64, with a gate after each fold."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kurtail_pl.artefact.shards import ShardWriter, named
from kurtail_pl.errors import CheckpointError
from kurtail_pl.stages.channels import Channels
from kurtail_pl.stages.meter import Meter
from kurtail_pl.stages.scales import Part, ScaleSpec, channel_scales, scale_windows
from kurtail_pl.stages.signs import SignSpec, sign_errors, sign_windows, with_signs
from kurtail_pl.stages.versions import versions
from kurtail_pl.storage.card import is_ours, read_card, require_intact, write_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import require_space, sha256_of
from kurtail_pl.storage.keys import companions_sha256, require_learned_on, settings_key
from kurtail_pl.storage.lock import alone_with
from kurtail_pl.storage.mark import write_config
from kurtail_pl.storage.model_config import GENERATION, read_generation_config
from kurtail_pl.storage.resume import Workplace, resumable_folder
from kurtail_pl.storage.rotation_file import FILE as ROTATIONS
from kurtail_pl.storage.rotation_file import hash_of, require_rotations_of, write_rotations
from kurtail_pl.storage.statement import origin_of
from kurtail_pl.streaming.compute import Compute, Device
from kurtail_pl.streaming.hidden import HiddenStates
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.attention import ATTENTION
from kurtail_pl.surgery.equip import equip_layer, online_rotations
from kurtail_pl.surgery.gate import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    LargestChange,
    check,
    require,
    use_exact_layer,
)
from kurtail_pl.surgery.layout import checkpoint_state
from kurtail_pl.surgery.rotations import Rotations
from kurtail_pl.surgery.scheme import FLOAT

log = logging.getLogger(__name__)

PROBE_TOKENS = 64
ROWS = 4096
"""Of embedding and head, folded at a time: all of them in float64 would be the largest thing in memory."""
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
        ConfigError: when channels are to be scaled that this family cannot scale, or the rotations are another model's.
        GateError: when a fold changes the output; nothing is kept.
        TextError: when the text of the scales or signs is too short.
        ArtefactError: when the folder exists.
        DiskFull: when the model does not fit.
        UnsupportedArchitecture: when the family is unknown.
    """
    require_rotations_of(checkpoint.config, rotations, "the rotations")
    require_learned_on(rotations, checkpoint.sha256, checkpoint.folder)
    recipe = {
        "model_sha256": checkpoint.sha256,
        "companions_sha256": companions_sha256(checkpoint),
        "method": method,
        "rotations_sha256": hash_of(rotations),
        "versions": versions(),
    }
    tokens = torch.empty(0, PROBE_TOKENS, dtype=torch.long)
    if scales is not None:
        windows = scale_windows(checkpoint, scales)
        tokens = windows.tokens
        recipe |= {"scales": settings_key(scales), "scales_text_sha256": windows.text_sha256}
    if signs is not None:
        held_out = sign_windows(checkpoint, signs)
        recipe |= {"signs": settings_key(signs), "signs_text_sha256": held_out.text_sha256}
    compute, parts = Compute(device), scales.parts if scales else ()
    with alone_with(folder):
        if is_ours(folder) and read_card(folder).get("recipe") == recipe:
            require_intact(folder)
            log.info("reusing the fused model %s", folder)
            return folder
        walker = Walker(checkpoint, dtype=torch.float64, device=compute.torch_device)
        # The weights and the parts that they are joined from.
        require_space(folder, 2 * 4 * sum(p.numel() for p in walker.model.parameters()))
        with resumable_folder(folder, overwrite, recipe) as work:
            with Meter(work.state.get("cost")) as meter:
                if signs is not None:
                    if "signs" not in work.state:
                        errors = sign_errors(checkpoint, rotations, signs, held_out.tokens, parts, compute)
                        work.state["signs"] = errors
                    rotations = with_signs(rotations, signs, work.state["signs"])
                gate = _Fuser(walker, rotations, work, parts, tokens).run(meter)
            _write_companions(checkpoint, rotations, work.folder)
            card: dict[str, Any] = {
                "method": method,
                "scheme": FLOAT.to_dict(),
                "source": {"sha256": checkpoint.sha256, **origin_of(checkpoint.folder)},
                "tokenizer_sha256": checkpoint.tokenizer_sha256(),
                "rotations": rotations.origin,
                "rotations_sha256": sha256_of(work.folder / ROTATIONS),
                "gate": gate,
                "recipe": recipe,
                "cost": {"fuse": meter.to_dict()},
                "versions": versions(),
            }
            write_card(work.folder, card)
    log.info(
        "fused into %s in %.0f s; logits changed by %.1e (float64) and %.1e (float32) relative",
        folder, meter.seconds, gate["float64"], gate["float32"],
    )  # fmt: skip
    return folder


def _write_companions(checkpoint: Checkpoint, rotations: Rotations, folder: Path) -> None:
    """Write what stands beside the weights: configuration, tokenizer, generation settings, rotations."""
    config = copy.deepcopy(checkpoint.config)
    config.tie_word_embeddings, config.dtype = False, torch.float32
    write_config(folder, config, plain=not rotations.any_online)
    copy_companions(checkpoint, folder)
    write_rotations(folder / ROTATIONS, rotations)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Save tokenizer and generation settings beside new weights; settings that nobody can read are left out."""
    checkpoint.tokenizer().save_pretrained(folder)
    try:
        if read_generation_config(checkpoint.folder) is not None:
            (folder / GENERATION).write_bytes((checkpoint.folder / GENERATION).read_bytes())
    except CheckpointError as error:
        log.warning("left out: %s", error)


class _Fuser:
    """One pass over the model: fold, gate, write.

    Three probes go along, as three windows of hidden states: through the original model, the rotated one, and the
    rotated one as written, in float32. After them come, as long, windows of the text that channels to scale are
    measured on, through the original model.
    """

    def __init__(
        self, walker: Walker, rotations: Rotations, work: Workplace, scaled: Sequence[Part], text: Tensor
    ) -> None:
        self.walker, self.architecture, self.work = walker, walker.architecture, work
        # Not earlier: a walker made meanwhile for the same configuration, as signs are chosen by, sets it back.
        walker.model.set_attn_implementation(ATTENTION)
        residual, value = (r if r is None else r.to(walker.device) for r in (rotations.residual, rotations.value))
        self.rotations = replace(rotations, residual=residual, value=value)
        config = walker.checkpoint.config
        self.eps: float = config.rms_norm_eps
        self.shards = ShardWriter(work.folder, work.scratch, parts=walker.n_layers + 2)
        length = min(text.shape[1], config.max_position_embeddings)
        self.text = text[:, :length]
        self.scales = channel_scales(walker, scaled)
        generator = torch.Generator().manual_seed(0)
        self.probe = torch.randint(config.vocab_size, (1, length), generator=generator).to(walker.device)
        shape = (3 + len(self.text), length, config.hidden_size)
        self.hidden = HiddenStates(work, shape, walker.dtype, walker.device)

    @torch.no_grad()
    def run(self, meter: Meter) -> dict[str, float]:
        """Fold and write everything; returns the relative change of the logits in both precisions."""
        if self.work.done is None:
            self._embedding()
            self.work.finished(0)
        for index, layer in self.walker.layers("fuse layers", self.work):
            use_exact_layer(layer, self.architecture, self.eps)
            reference, rotated, rounded, *text = self.hidden.before
            with self.scales.measured(layer, self._normed) as channels:
                text_after = [self.walker.advance(layer, window) for window in text]
            reference_after = self.walker.advance(layer, reference)
            self._fold_layer(index, layer, reference, reference_after, channels)
            rotated_after = self.walker.advance(layer, rotated)
            rounded_after = self.walker.advance(layer.float(), rounded.float())
            self.hidden.after.fill([reference_after, rotated_after, rounded_after, *text_after])
            self._write_layer(index, layer)
            self.work.state["cost"] = meter.to_dict()
        reference, rotated, rounded, *_ = self.hidden.before
        return self._head(reference, rotated, rounded)

    def _write_layer(self, index: int, layer: nn.Module) -> None:
        # No name outlives this: one would keep the layer's weights in memory while the next ones are read.
        state = checkpoint_state(layer.state_dict(), self.architecture)
        self.shards.write(index + 1, named(f"{self.architecture.layers}.{index}", state))

    def _into_residual(self, hidden: Tensor) -> Tensor:
        """Hidden states as the rotated model has them."""
        return hidden if self.rotations.residual is None else hidden @ self.rotations.residual

    def _normed(self, hidden: Tensor) -> Tensor:
        """What a folded norm of the rotated model gives, by hidden states of the original one."""
        return self._into_residual(F.rms_norm(hidden, hidden.shape[-1:], eps=self.eps))

    def _embedding(self) -> None:
        """Write the rotated embedding, and start the probes."""
        embedding = self.walker.embedding(torch.float32)
        reference = embedding(self.probe).double()
        text = [embedding(window.unsqueeze(0).to(self.walker.device)) for window in self.text]
        for rows in torch.split(embedding.weight.data, ROWS):
            rows.copy_(self._into_residual(rows.double()))
        self.hidden.before.fill([reference, self._into_residual(reference), embedding(self.probe), *text])
        self.shards.write(0, named(self.architecture.embedding, embedding.state_dict()))
        embedding.to("meta")

    def _fold_layer(
        self,
        index: int,
        layer: nn.Module,
        reference: Tensor,
        reference_after: Tensor,
        channels: Channels,
    ) -> None:
        """Fold one layer in place, comparing its output with the original's after each fold."""
        architecture, rotations = self.architecture, self.rotations

        def gate(fold: str, before: Tensor, after: Tensor) -> None:
            output = self.walker.advance(layer, before)
            check(f"{fold} in {architecture.layers}.{index}", after, output, FLOAT64_TOLERANCE)

        if self.scales.parts:
            self.scales.fold(layer, channels)
            gate("scaling the channels", reference, reference_after)
        before, after = self._into_residual(reference), self._into_residual(reference_after)
        if rotations.residual is not None or channels.normed:
            folding.fold_layer_norms(layer, architecture)
            gate("folding the norms", reference, reference_after)
        if rotations.residual is not None:
            folding.rotate_residual(layer, architecture, rotations.residual)
            gate("rotating the residual stream (R1)", before, after)
        if channels.normed:
            self.scales.fold_norms(layer, channels)
            gate("scaling the norms", before, after)
        if rotations.value is not None:
            folding.rotate_values(layer, architecture, rotations.value[index])
            gate("rotating the values (R2)", before, after)
        for name, factors in online_rotations(layer, architecture, rotations).items():
            folding.absorb_online(folding.linear_of(layer, name), factors)
        equip_layer(layer, architecture, FLOAT, rotations, self.scales.head_dim)
        gate("rotating online (R3, R4, R5)", before, after)

    def _head(self, reference: Tensor, rotated: Tensor, rounded: Tensor) -> dict[str, float]:
        """Write final norm and head, and compare the logits."""
        norm, head = self.walker.head(torch.float32)
        scale = cast(Tensor, norm.weight).double()
        normed = [F.rms_norm(x, scale.shape, eps=self.eps) for x in (reference, rotated, rounded.float())]
        changes = [LargestChange(), LargestChange()]
        for rows in torch.split(head.weight.data, ROWS):
            plain = rows.double() * scale
            folded = self._into_residual(plain)
            if self.rotations.residual is not None:
                rows.copy_(folded)
            original = normed[0] @ plain.T
            changes[0].update(original, normed[1] @ folded.T)
            changes[1].update(original, normed[2] @ folded.float().T)
        gate = {
            "float64": require("the fused model", changes[0].relative, FLOAT64_TOLERANCE),
            "float32": require("the fused model in float32", changes[1].relative, FLOAT32_TOLERANCE),
        }
        if self.rotations.residual is not None:
            norm.weight = nn.Parameter(torch.ones_like(scale, dtype=torch.float32), requires_grad=False)
        tensors = named(self.architecture.final_norm, norm.state_dict())
        self.shards.write(self.walker.n_layers + 1, {**tensors, **named(self.architecture.head, head.state_dict())})
        self.shards.close()
        return gate
