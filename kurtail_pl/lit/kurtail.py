"""KurTail: R1 and R2 from a proxy, RMSNorm and rotation, by the kurtosis of cached activations (KurTail, §3)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.datamodule import StoredModel
from kurtail_pl.lit.loader import Batch
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.maths.kurtosis import UNIFORM_KURTOSIS, Mean, distance_to_uniform, kurtosis, rms_norm
from kurtail_pl.maths.massive import is_massive
from kurtail_pl.maths.objectives import KURTOSES, OBJECTIVES, objective_of
from kurtail_pl.maths.quantizers import split_groups
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.stages.capture.effects import block_effects
from kurtail_pl.stages.capture.weight_rows import weight_rows
from kurtail_pl.stages.text import cut_windows

WEIGHT_ROWS = 256
"""Of the weights that read each block input, the same in all steps: half as many as rows of a batch."""


@dataclass(frozen=True)
class Objective:
    """What R1 makes small.

    Args:
        kind: a name of `maths.objectives.OBJECTIVES`: ``kurtosis`` (Eq. 4: its distance from the target over all rows
            of a site), ``group_kurtosis`` (that of the mean over groups), or ``token_kurtosis``, ``range``, ``whip`` or
            ``wasserstein`` of each row; where activations have groups that share a scale, of each group.
        massive_weight: how much the row of a massive token counts, others counting 1; 0 leaves them out, which is
            right where the weights are matched to them later.
        site_weights: how much each block input counts: all ``equal`` (the paper), or each by its measured ``effect``
            on the residual stream (`stages.capture.effects.block_effects`).
        weight_term: how much the objective of rows of the weights that read the block inputs, which R1 turns too,
            counts beside that of the inputs; 0 (the paper) leaves the weights unread.
        target: of kinds that are a kurtosis: 1.8, where levels are evenly spaced and a scale follows the largest
            number; 3.56 is that of the distribution which the levels of E2M1 suit.

    Raises:
        ConfigError: when there is no such objective, it has no target, no distribution has it, or a weight is below 0.
    """

    kind: str = "kurtosis"
    massive_weight: float = 1.0
    site_weights: Literal["equal", "effect"] = "equal"
    weight_term: float = 0.0
    target: float = UNIFORM_KURTOSIS

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ConfigError(f"objective.kind is {self.kind!r}; R1 is learned by {', '.join(OBJECTIVES)}")
        if not 1 <= self.target < math.inf:
            raise ConfigError(f"objective.target is {self.target}; no kurtosis is below 1: 1.8 is the uniform one")
        if self.target != UNIFORM_KURTOSIS and self.kind not in KURTOSES:
            raise ConfigError(
                f"objective.target is {self.target} and objective.kind is {self.kind!r}, which has none; leave the "
                f"target out, or write one of {', '.join(KURTOSES)}"
            )
        for name in ("massive_weight", "weight_term"):
            weight: float = getattr(self, name)
            if weight < 0:
                raise ConfigError(f"objective.{name} is {weight}; give 0 or more (an ordinary row counts 1)")


PAPER = Objective()


class KurTailModule(RotationModule):
    """Learns R1 and every layer's R2 together, from batches of cached activations.

    The two are independent (KurTail, Prop. 2.5), and the loss is a sum over them: each gets the gradient it would get
    alone. The defaults are the paper's method.

    Args:
        sizes: see `RotationModule`.
        rotation_seed: see `RotationModule`.
        value_per_head: see `RotationModule`.
        objective: what R1 makes small, and how much each part of it counts.
        aim: see `RotationModule`. Where its scheme centres the inputs of linears, R1 is learned for rows whose channel
            means, over the tokens that are not massive, are subtracted. Where its cache turns values by a matrix of its
            own behind R2, R2 is learned for both bases: that of the cache, and that which `o_proj` reads.
        method: name in artefacts and tables.
        optimizer: see `RotationModule`.
        scheduler: see `RotationModule`.
        block: see `RotationModule`.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        rotation_seed: int = 0,
        value_per_head: bool = False,
        objective: Objective = PAPER,
        aim: Aim | None = None,
        method: str = "kurtail",
        optimizer: OptimizerCallable = CayleyAdam,
        scheduler: LRSchedulerCallable | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__(sizes, rotation_seed, value_per_head, aim, optimizer, scheduler, block)
        self.objective, self.method, self.value_per_head = objective, method, value_per_head
        self.centre, cache = self.aim.scheme.centre, self.aim.scheme.cache
        self.group_size = self.aim.groups.get("activations")
        basis = None if cache is None else cache.value_basis(sizes["head_dim"])
        self.cache = None if basis is None else cache
        self.counts: Tensor
        self.weights: Tensor
        self.basis: Tensor | None
        self.register_buffer("counts", torch.ones(2 * sizes["layers"]), persistent=False)
        self.register_buffer("weights", torch.zeros(0), persistent=False)
        self.register_buffer("basis", None if basis is None else basis.float(), persistent=False)

    def settings(self) -> dict[str, Any]:
        """What decides the learned rotations, beside the data."""
        cache = None if self.cache is None else self.cache.to_dict()
        groups = {} if self.group_size is None else {"group_size": self.group_size}
        objective = {"objective": asdict(self.objective), "centre": self.centre, "cache": cache}
        return {**super().settings(), **objective, **groups}

    def setup(self, stage: str) -> None:
        """Read from store and model, before the first step, what the settings ask for.

        A checkpoint that is resumed puts its own rotations in place afterwards.
        """
        super().setup(stage)
        if stage != "fit":
            return
        data: StoredModel = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.objective.site_weights == "effect":
            spec = data.capture_spec
            windows = cut_windows(data.checkpoint, spec.text, "calibration", spec.seed)
            effects = block_effects(data.checkpoint, windows.tokens, spec.seed, data.compute, data.ranks)
            self.counts = (effects / effects.mean()).float()
        if self.objective.weight_term:
            rows = weight_rows(data.checkpoint, WEIGHT_ROWS, data.capture_spec.seed, data.compute)
            self.weights = rms_norm(rows, 0.0)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What R1 is learned by, ``[2 layers]``, the kurtosis of block inputs, as many, and that of rotated values.

        The last is ``[bases, layers]``, or ``[bases, layers, kv_heads]`` where each head has its R2.

        The RMSNorm has no weight (it is folded) and comes first: it commutes with the rotation and needs no gradient
        there. Sites are taken one by one: a site's values then stay in the processor's cache, which halves the time.
        """
        losses, kurtoses = [], []
        for site, stored in enumerate(batch["residual"]):
            rows, mean = self.block_input(stored.to(self.value))
            rotated = self.turned(rows, site)
            losses.append(self._objective(rotated, mean))
            with torch.no_grad():
                kurtoses.append(kurtosis(rotated, mean))
        return torch.stack(losses), torch.stack(kurtoses), self._kurtosis_r2(batch["value"].to(self.value))

    def _kurtosis_r2(self, heads: Tensor) -> Tensor:
        """Of values as `o_proj` reads them, and as a cache that turns them keeps them."""
        rotated = self._values(heads) @ self.r2
        bases = [rotated] if self.basis is None else [rotated, rotated @ self.basis]
        found = [kurtosis(x.flatten(-2), lambda x: self.over_ranks(x.mean(-1, keepdim=True))) for x in bases]
        return torch.stack(found).squeeze(-1)

    def _values(self, heads: Tensor) -> Tensor:
        """What each R2 turns of values ``[layers, rows, heads, head_dim]``: the heads of a group are neighbours."""
        if not self.value_per_head:
            return heads.flatten(1, 2)
        grouped = heads.view(*heads.shape[:2], self.value.shape[1], -1, heads.shape[-1])
        return grouped.transpose(1, 2).flatten(2, 3)

    def block_input(self, site: Tensor) -> tuple[Tensor, Mean]:
        """What R1 turns of one site's rows ``[rows, hidden]``, and a mean in which each counts by its weight."""
        normed, massive = rms_norm(site, self.rms_norm_eps), is_massive(site)
        if self.centre:
            normed = normed - self.over_ranks(normed[~massive].mean(0))
        if self.objective.massive_weight == 0:
            normed = normed[~massive]
        if self.objective.massive_weight in (0, 1):
            return normed, lambda x: self.over_ranks(x.mean())
        weights = torch.where(massive, self.objective.massive_weight, 1.0)
        total = self.over_ranks(weights.mean())
        return normed, lambda x: self.over_ranks((x.view(len(x), -1).mean(1) * weights).mean()) / total

    def _objective(self, rotated: Tensor, mean: Mean) -> Tensor:
        """Of rows ``[rows, hidden]``; where groups of them share a scale, it is that of groups."""
        if self.group_size is not None:
            rotated = split_groups(rotated, self.group_size)
        return objective_of(self.objective.kind, self.objective.target)(rotated, mean)

    def _loss_of_weights(self) -> Tensor:
        """The objective of rows of the weights, each of unit root mean square, mean over the sites."""
        turned = (self.turned(rows, site) for site, rows in enumerate(self.weights))
        return torch.stack([self._objective(rows, Tensor.mean) for rows in turned]).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean of R1's objective over the sites as they count, Eq. 4's twin for every R2, and the weights' term."""
        with torch.autocast(self.device.type, enabled=False):
            site_losses, kurtosis_r1, kurtosis_r2 = self(batch)
            loss_r1, loss_r2 = (site_losses * self.counts).mean(), distance_to_uniform(kurtosis_r2).mean(0).sum()
            losses = {"loss/r1": loss_r1, "loss/r2": loss_r2}
            loss: Tensor = loss_r1 + loss_r2
            if self.objective.weight_term:
                losses["loss/weights"] = self._loss_of_weights()
                loss = loss + self.objective.weight_term * losses["loss/weights"]
        with torch.no_grad():
            scalars = {
                "loss/total": loss,
                **losses,
                "kurtosis/r1/mean": kurtosis_r1.mean(),
                "kurtosis/r1/max": kurtosis_r1.max(),
                "kurtosis/r2/mean": kurtosis_r2.mean(),
                "kurtosis/r2/max": kurtosis_r2.max(),
                **self.orthogonality(),
            }
        self.log_dict({name: value.float() for name, value in scalars.items()})
        # Keys of at most five characters: longer ones are cut to the same word at 80 columns.
        bar = {"loss": loss, "k_r1": kurtosis_r1.mean(), "k_r2": kurtosis_r2.mean()}
        self.log_dict(bar, prog_bar=True, logger=False)
        return loss
