"""Training of a decoder layer's maps, scales and clips, from the float layer's inputs to its outputs (FlatQuant)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.methods import Format, TransformTuner
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.tuner import Block, in_float, relative
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.gate import FLOAT32_TOLERANCE, check
from kurtail_pl.surgery.invertible import map_sizes
from kurtail_pl.surgery.rotations import Rotations
from kurtail_pl.surgery.trained_maps import Factor, Fixed, TrainedLayer, TrainedMap

log = logging.getLogger(__name__)

LAST_STEP = 1e-3
"""Size of the last step, in first ones."""


class TransformTraining:
    """Trains the layers of one model, each alone.

    Args:
        settings: of the recipe.
        architecture: of the model.
        scheme: its scheme.
        rotations: that the model has already.
        head_dim: of the model.
        seed: draws the maps that the training starts from.
    """

    def __init__(
        self,
        settings: TransformTuner,
        architecture: Architecture,
        scheme: Scheme,
        rotations: Rotations,
        head_dim: int,
        seed: int,
    ) -> None:
        self.settings, self.architecture, self.scheme = settings, architecture, scheme
        self.rotations, self.head_dim, self.seed = rotations, head_dim, seed

    def train(
        self,
        layer: nn.Module,
        index: int,
        block: Block,
        weights: Format | None,
        arguments: Callable[[Tensor], dict[str, object]],
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Train one layer, change it in place, and take the tuner's windows through the float layer.

        Args:
            layer: equipped, with float weights.
            index: its number.
            block: the same as tuners see it.
            weights: the format that its weights will have.
            arguments: what the layer wants beside states.

        Returns:
            Condition numbers of its maps by their places, and clip ratios by the quantizers'.

        Raises:
            GateError: when the float layer with its maps writes something else.
        """
        parts = self.settings.parts
        with in_float(block.sites):
            block.after.fill(block.run(block.before[window]) for window in range(len(block.before)))
        maps = self._maps(layer, index, block.device) if "transforms" in parts else {}
        scaled = self._scaled(layer) if "diagonals" in parts else {}
        trained = TrainedLayer(layer, self.architecture, block.sites, maps, scaled, weights)
        trained.clips.requires_grad_("clips" in parts)
        trained.shares.requires_grad_("weights" in parts)
        first, last = self._descend(trained, block, arguments)
        conditions = trained.finish()
        with in_float(block.sites):
            for window in range(min(1, len(block.before))):
                check("the learned maps", block.after[window], block.run(block.before[window]), FLOAT32_TOLERANCE)
        if "weights" in parts:
            trained.give_shares()
        worst = max(conditions.values(), default=1.0)
        log.info("layer %d: error %.3g before, %.3g after; largest condition %.3g", index, first, last, worst)
        return conditions, trained.clip() if "clips" in parts else {}

    def _maps(self, layer: nn.Module, index: int, device: torch.device) -> dict[str, TrainedMap]:
        """At their start: random Hadamards, or identities where the model has a rotation already."""
        generator = torch.Generator().manual_seed(self.seed + index)
        turned = self._turned(layer)
        output = self.architecture.output

        def factor(place: str, size: int, learns: bool) -> Factor | Fixed:
            if not learns:
                return Fixed(size, device)
            eye = torch.eye(size, dtype=torch.float64)
            start = eye if turned[place] else random_hadamard(size, generator)
            return Factor(start.to(device), self.settings.orthogonal)

        # A left factor of order 1 has nothing to mix; before the output projection heads are mixed alone.
        return {
            place: TrainedMap(factor(place, a, a > 1), factor(place, b, place != output))
            for place, (a, b) in map_sizes(layer, self.architecture, self.scheme, self.head_dim).items()
        }

    def _turned(self, layer: nn.Module) -> Mapping[str, bool]:
        """Whether the model has a rotation at each place."""
        architecture, rotations = self.architecture, self.rotations
        found = {"keys": rotations.query_key is not None, "values": rotations.value is not None}
        for names in architecture.readers_alike(layer):
            found[names[0]] = rotations.turns_inputs
        for name in architecture.mlp_writers(layer):
            found[name] = rotations.mlp_hidden is not None
        return {**found, architecture.output: rotations.attention_output is not None}

    def _scaled(self, layer: nn.Module) -> dict[str, int]:
        """Channels of both norms and of every gated MLP, where these can be scaled."""
        architecture = self.architecture
        norms = {name: architecture.linears(layer)[0] for name in (architecture.attention_norm, architecture.mlp_norm)}
        mlps = architecture.gated_mlps(layer) if architecture.rigid_hidden is None else ()
        hidden = {mlp: f"{mlp}.{architecture.down}" for mlp in mlps}
        return {name: int(layer.get_submodule(reader).in_features) for name, reader in (norms | hidden).items()}  # type: ignore[arg-type]

    def _descend(
        self, trained: TrainedLayer, block: Block, arguments: Callable[[Tensor], dict[str, object]]
    ) -> tuple[float, float]:
        """Bring what the layer writes near what the float layer does; returns the error of both ends of the way."""
        settings, ranks = self.settings, block.ranks
        counts = ranks.each(len(block.before))
        start, windows = sum(counts[: ranks.rank]), sum(counts)
        clips = [*trained.clips, *trained.shares]
        others = [*trained.maps.parameters(), *trained.scales]
        learning = [parameter for parameter in (*others, *clips) if parameter.requires_grad]
        adam = torch.optim.AdamW(
            [{"params": others, "lr": settings.lr}, {"params": clips, "lr": settings.clip_lr}], foreach=False
        )
        a_round = math.ceil(windows / settings.batch)
        steps = settings.epochs * a_round
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _along_cosine(step / steps))
        errors = []
        for step in range(steps):
            first = step % a_round * settings.batch
            numbers = [number - start for number in range(first, min(first + settings.batch, windows))]
            adam.zero_grad()
            error = _backward(trained, block, arguments, [n for n in numbers if 0 <= n < len(block.before)])
            for parameter in learning:
                # No token may have come to it here.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = ranks.sum(gradient)
            adam.step()
            schedule.step()
            errors.append(ranks.sum(torch.tensor(error)).item())
        return sum(errors[:a_round]), sum(errors[-a_round:])


def _along_cosine(way: float) -> float:
    """Size of a step in first ones, at a share of the way."""
    return LAST_STEP + (1 - LAST_STEP) * (1 + math.cos(math.pi * way)) / 2


@torch.enable_grad()
def _backward(
    trained: TrainedLayer, block: Block, arguments: Callable[[Tensor], dict[str, object]], numbers: list[int]
) -> float:
    """Gradients of the error in some of this process's windows; returns the error, that of each token added up."""
    if not numbers:
        return 0.0
    states, wanted = (torch.cat([part[number] for number in numbers]) for part in (block.before, block.after))
    error = relative(trained.run(states, arguments(states)) - wanted, wanted)
    error.backward()  # type: ignore[no-untyped-call]
    return error.item()
