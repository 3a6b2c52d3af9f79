"""The alpha of `absmax`, searched: that with which a model's blocks err least once their weights are rounded."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kurtail_pl.maths.quantizers import Quantizer, fake_quantize
from kurtail_pl.methods.tuner import relative
from kurtail_pl.stages.fusion.passes import placed, transforms_of, turned
from kurtail_pl.stages.fusion.scales import AlphaSearch, ScaleSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.keys import settings_key, tokens_sha256
from kurtail_pl.storage.resume import resumable_work
from kurtail_pl.storage.rotation_file import hash_of
from kurtail_pl.streaming.compute import AUTO, Compute
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import ATTENTION
from kurtail_pl.surgery.rotations import Rotations


@torch.no_grad()
def alpha_errors(
    checkpoint: Checkpoint,
    rotations: Rotations,
    scales: ScaleSpec,
    search: AlphaSearch,
    windows: Tensor,
    compute: Compute = AUTO,
) -> list[list[float]]:
    """Error of each decoder layer with each alpha, ``[layers][alphas]``.

    A layer is fused with an alpha, its weights are rounded, and it reads what it reads in the original model; what it
    then writes is compared with what it writes there, relative to each token's size, the mean over tokens. That its
    weights are the only ones that are rounded lets all alphas go through the model at once.

    Args:
        checkpoint: the original model.
        rotations: that are fused beside the scales.
        scales: whose alpha is searched.
        search: the alphas, and how weights are rounded.
        windows: of tokens, ``[any number, any length]``.
        compute: device and floating-point type of the layers.
    """
    recipe = {
        "model_sha256": checkpoint.sha256,
        "rotations_sha256": hash_of(rotations),
        "tokens_sha256": tokens_sha256(windows),
        "scales": settings_key(scales),
        "dtype": compute.dtype,
    }
    with resumable_work(recipe) as work:
        walker = Walker(checkpoint, dtype=compute.torch_dtype, device=compute.torch_device)
        walker.model.set_attn_implementation(ATTENTION)
        rotations = placed(rotations, walker)
        scaled, *others = transforms_of(walker, rotations, scales)
        errors: list[list[float]] = work.state.setdefault("errors", [])
        hidden = walker.hidden_states(windows, work)
        for index, layer in walker.layers("alphas of the scales", work):
            with ExitStack() as stack:
                for transform in (scaled, *others):
                    stack.enter_context(transform.watching(layer))
                hidden.after.fill(walker.advance(layer, states) for states in hidden.before)
            found = []
            for alpha in search.alphas:
                scaled.measured.rule_of = replace(scales, alpha=alpha).rule_of
                trial = copy.deepcopy(layer)
                for transform in (scaled, *others):
                    transform.fold(trial, index)
                round_weights(trial, walker.architecture, search.rounding)
                lost = 0.0
                for before, after in zip(hidden.before, hidden.after, strict=True):
                    wanted = turned(after, rotations.residual)
                    lost += float(relative(walker.advance(trial, turned(before, rotations.residual)) - wanted, wanted))
                found.append(lost / windows.numel())
            errors.append(found)
        return errors


def round_weights(layer: nn.Module, architecture: Architecture, rounding: Quantizer) -> None:
    """Round the weights of a layer's linears to nearest, in place."""
    for name in architecture.linears(layer):
        linear = layer.get_submodule(name)
        linear.weight = nn.Parameter(fake_quantize(linear.weight.data, rounding), requires_grad=False)  # type: ignore[arg-type]


def with_alphas(scales: ScaleSpec, search: AlphaSearch, errors: Sequence[Sequence[float]]) -> ScaleSpec:
    """The scales with the best alphas in place of their own: one for all layers, by the mean over them, or each's."""
    if search.per == "block":
        return replace(scales, alpha=[_best(search, of_layer) for of_layer in errors], search=None)
    return replace(scales, alpha=_best(search, [sum(of_alpha) for of_alpha in zip(*errors, strict=True)]), search=None)


def note(scales: ScaleSpec, errors: Sequence[Sequence[float]]) -> Mapping[str, Any]:
    """What a card says of the search: the alphas that were chosen, and all errors."""
    return {"alpha": scales.alpha, "errors": [list(of_layer) for of_layer in errors]}


def _best(search: AlphaSearch, errors: Sequence[float]) -> float:
    return search.alphas[min(range(len(errors)), key=errors.__getitem__)]
