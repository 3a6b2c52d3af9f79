"""One pass over a model: fold every layer in float64, with a gate after each transform, and write it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kurtail_pl.artefact.shards import ShardWriter, named
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.scaling import ReorderChannels, ScaleChannels, ScaleNorms, scale_channels
from kurtail_pl.stages.meter import Meter
from kurtail_pl.storage.resume import Workplace
from kurtail_pl.streaming.hidden import HiddenStates
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.attention import ATTENTION
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
from kurtail_pl.surgery.transform import (
    FlipHidden,
    FoldNorms,
    RotateOnline,
    RotateResidual,
    RotateValues,
    Transform,
)

ROWS = 4096
"""Embedding and head are folded so many rows at a time: all of them in float64 would be the largest thing in memory."""


def transforms_of(
    walker: Walker, rotations: Rotations, scales: ScaleSpec | None
) -> tuple[ScaleChannels, *tuple[Transform, ...]]:
    """All that is done to a layer, in order.

    Args:
        walker: of the original model.
        rotations: to fuse, R1 and R2 in the type and on the device of the layers.
        scales: of channels.
    """
    architecture, residual, eps = walker.architecture, rotations.residual, walker.checkpoint.config.rms_norm_eps

    def normed(states: Tensor) -> Tensor:
        """What a folded norm of the rotated model gives, by hidden states of the original one."""
        return turned(F.rms_norm(states, states.shape[-1:], eps=eps), residual)

    scaled = scale_channels(walker, scales, normed)
    return (
        scaled,
        ReorderChannels(scaled.measured, scaled.kv_heads),
        FoldNorms(architecture, residual is not None or (scaled.measured.norms and rotations.block_input is None)),
        RotateResidual(architecture, residual),
        ScaleNorms(scaled.measured),
        RotateValues(architecture, rotations.value),
        FlipHidden(architecture, rotations),
        RotateOnline(architecture, rotations, scaled.measured.head_dim),
    )


def placed(rotations: Rotations, walker: Walker) -> Rotations:
    """Rotations with R1 and R2 where a walker's layers are, in their type."""
    matrices = (None if r is None else r.to(walker.device, walker.dtype) for r in (rotations.residual, rotations.value))
    residual, value = matrices
    return replace(rotations, residual=residual, value=value)


def turned(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """Hidden states of the original model as the rotated one has them."""
    return hidden if residual is None else hidden @ residual


class Fuser:
    """One pass over the model: fold, gate, write.

    Three probes go along, as three windows of hidden states: through the original model, the rotated one, and the
    rotated one as written, in float32. After them come, as long, windows of the text that channels to scale are
    measured on, through the original model.
    """

    def __init__(
        self, walker: Walker, rotations: Rotations, work: Workplace, scales: ScaleSpec | None, text: Tensor
    ) -> None:
        self.walker, self.architecture, self.work = walker, walker.architecture, work
        # Not earlier: a walker made meanwhile for the same configuration, as signs are chosen by, sets it back.
        walker.model.set_attn_implementation(ATTENTION)
        self.rotations = placed(rotations, walker)
        config = walker.checkpoint.config
        self.eps: float = config.rms_norm_eps
        self.shards = ShardWriter(work.folder, work.scratch, parts=walker.n_layers + 2)
        length = min(text.shape[1], config.max_position_embeddings)
        self.text = text[:, :length]
        self.transforms = transforms_of(walker, self.rotations, scales)
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
            with ExitStack() as stack:
                for transform in self.transforms:
                    stack.enter_context(transform.watching(layer))
                text_after = [self.walker.advance(layer, window) for window in text]
            reference_after = self.walker.advance(layer, reference)
            self._fold_layer(index, layer, reference, reference_after)
            rotated_after = self.walker.advance(layer, rotated)
            rounded_after = self.walker.advance(layer.float(), rounded.float())
            self.hidden.after.fill([reference_after, rotated_after, rounded_after, *text_after])
            self._write_layer(index, layer)
            self.work.state["cost"] = meter.to_dict()
        reference, rotated, rounded, *_ = self.hidden.before
        return self._head(reference, rotated, rounded)

    def _write_layer(self, index: int, layer: nn.Module) -> None:
        # No name outlives this: one would keep the layer's weights in memory while the next ones are read.
        state = checkpoint_state(layer.state_dict(), self.architecture, plain=not self.rotations.any_online)
        self.shards.write(index + 1, named(f"{self.architecture.layers}.{index}", state))

    def _into_residual(self, hidden: Tensor) -> Tensor:
        """Hidden states as the rotated model has them."""
        return turned(hidden, self.rotations.residual)

    def _embedding(self) -> None:
        """Write the rotated embedding, and start the probes."""
        embedding = self.walker.embedding(torch.float32)
        reference = self.walker.embed(embedding, self.probe).double()
        text = [self.walker.embed(embedding, window.unsqueeze(0).to(self.walker.device)) for window in self.text]
        for rows in torch.split(embedding.weight.data, ROWS):
            rows.copy_(self._into_residual(rows.double()))
        rounded = self.walker.embed(embedding, self.probe)
        self.hidden.before.fill([reference, self._into_residual(reference), rounded, *text])
        self.shards.write(0, named(self.architecture.embedding, embedding.state_dict()))
        embedding.to("meta")

    def _fold_layer(self, index: int, layer: nn.Module, reference: Tensor, reference_after: Tensor) -> None:
        """Fold one layer in place, comparing its output with the original's after each fold."""
        before, after = reference, reference_after
        for transform in self.transforms:
            folded = transform.fold(layer, index)
            if folded and transform.turns:
                before, after = self._into_residual(reference), self._into_residual(reference_after)
            if folded:
                place = f"{transform.sentence} in {self.architecture.layers}.{index}"
                check(place, after, self.walker.advance(layer, before), FLOAT64_TOLERANCE)

    def _head(self, reference: Tensor, rotated: Tensor, rounded: Tensor) -> dict[str, float]:
        """Write final norm and head, and compare the logits."""
        norm, head = self.walker.head(torch.float32)
        scale = cast(Tensor, norm.weight).double() + self.architecture.norm_offset
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
            ones = torch.ones_like(scale, dtype=torch.float32) - self.architecture.norm_offset
            norm.weight = nn.Parameter(ones, requires_grad=False)
        tensors = named(self.architecture.final_norm, norm.state_dict())
        self.shards.write(self.walker.n_layers + 1, {**tensors, **named(self.architecture.head, head.state_dict())})
        self.shards.close()
        return gate
