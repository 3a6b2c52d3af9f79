"""What all methods share: R1 and R2 as parameters, their checkpoints, and the kurtosis that they leave."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PretrainedConfig

from kurtail_pl.errors import ConfigError, NotFinite, ResumeMismatch, listed
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.curves import Curves
from kurtail_pl.lit.inputs import InputRotations
from kurtail_pl.lit.interrupt import InterruptBetweenSteps
from kurtail_pl.lit.loader import Batch
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.maths.finite import is_finite
from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.maths.kurtosis import Mean, rms_norm
from kurtail_pl.maths.objectives import rounding_error
from kurtail_pl.maths.orthogonal import block_diagonal, diagonal_blocks, nearest_orthogonal, orthogonality_error
from kurtail_pl.maths.quantizers import Quantizer, split_groups
from kurtail_pl.metrics import Kurtosis
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.storage.activations import block_sites
from kurtail_pl.storage.resume import differences
from kurtail_pl.surgery.rotations import Rotations, random_fused, random_rotations, require_aligned

HELD_OUT = Quantizer(bits=4)
"""Whose error on held-out rows is reported, whatever the scheme: recipes can stop by it."""
ROTATIONS = ("residual", "inputs.", "value")
"""What names of rotations begin with, among the parameters."""
FLOAT32_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


class RotationModule(L.LightningModule):
    """Holds R1 ``[hidden, hidden]`` and every layer's R2; how they are learned is the subclass's.

    Where the residual stream cannot be turned, each block input has an R1 of its own (`InputRotations`).

    Sizes come from the data module when `kurtail fit` runs; those given by hand are then refused.

    Args:
        sizes: of the model.
        rotation_seed: decides the random Hadamards that R1 and R2 start from, and the online ones.
        value_per_head: one R2 for each KV head, ``[layers, kv_heads, head_dim, head_dim]``, instead of one for each
            layer, ``[layers, head_dim, head_dim]``.
        aim: what is made with them; by default what base.yaml makes.
        optimizer: an optimizer on the Stiefel manifold.
        scheduler: of its step size, stepped after each iteration; None keeps the step size.
        block: neighbouring channels that R1 mixes, as wide as the groups of a format for example; R2 mixes those of a
            head that lie in one block. The parameters are then stacks of blocks, ``[hidden / block, block, block]`` and
            ``[layers, ..., head_dim / k, k, k]``. None mixes all.

    Raises:
        ConfigError: when the block is no power of two that divides the residual stream, or groups of the scheme do not
            line up with it.
    """

    residual: nn.Parameter
    """R1, unless block inputs have rotations of their own."""
    method: str
    """Name in artefacts and tables."""
    learns: ClassVar[bool] = True
    """Whether the trainer takes steps."""
    rotates: bool = True
    """Whether there are rotations at all."""

    def __init__(
        self,
        sizes: ModelSizes,
        rotation_seed: int = 0,
        value_per_head: bool = False,
        aim: Aim | None = None,
        optimizer: OptimizerCallable = CayleyAdam,
        scheduler: LRSchedulerCallable | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.layers, self.rms_norm_eps, self.rotation_seed = sizes["layers"], sizes["rms_norm_eps"], rotation_seed
        self.optimizer, self.scheduler, self.aim = optimizer, scheduler, aim or Aim()
        residual, value = random_fused(
            sizes["layers"],
            sizes["hidden_size"],
            sizes["head_dim"],
            rotation_seed,
            kv_heads=sizes["kv_heads"] if value_per_head else None,
            turned_back=self.aim.block_size is not None,
            block=block,
        )
        self.block = block
        if block is not None:
            require_aligned(block, self.aim.groups)
            residual = diagonal_blocks(residual, block)
            value = diagonal_blocks(value, math.gcd(block, sizes["head_dim"]))
        rigid = sizes.get("rigid_residual") is not None
        sites = sizes["layers"], sizes["hidden_size"]
        self.inputs = InputRotations(*sites, rotation_seed, block) if rigid else None
        self.register_parameter("residual", None if rigid else nn.Parameter(residual.float()))
        self.value = nn.Parameter(value.float())
        self.site_kurtosis = Kurtosis(sites=2 * sizes["layers"])
        self._stopped = False

    def setup(self, stage: str) -> None:
        """Refuse precisions that wreck orthogonality."""
        if self.trainer.precision not in FLOAT32_PRECISIONS:
            raise ConfigError(
                f"trainer.precision is {self.trainer.precision!r}, in which the rotations do not stay orthogonal; "
                f"use one of {', '.join(FLOAT32_PRECISIONS)}"
            )

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss of the method."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop at once where the loss is no number: all steps after it would be lost."""
        loss = (outputs or {}).get("loss")  # Fixed rotations have none.
        if loss is not None and not is_finite(loss.detach()):
            raise NotFinite(
                f"the loss is {loss.item()} in step {self.trainer.global_step}; learn with a smaller step size, "
                "optimizer.lr, or look for values in the model that are far too large"
            )

    def turned(self, rows: Tensor, site: int) -> Tensor:
        """Rows ``[..., hidden]`` of a block input turned by R1; blocks cost less than the whole matrix would."""
        if self.inputs is not None:
            return self.inputs.turned(rows, site)
        if self.block is None:
            return rows @ self.residual
        return torch.einsum("...ci,cij->...cj", split_groups(rows, self.block), self.residual).flatten(-2)

    @property
    def r2(self) -> Tensor:
        """Every layer's R2, ``[layers, head_dim, head_dim]``, or ``[layers, kv_heads, head_dim, head_dim]``."""
        return self.value if self.block is None else block_diagonal(self.value)

    def orthogonality(self) -> dict[str, Tensor]:
        """Scalars for the log: the largest entry of ``|R^T R - I|``."""
        return {
            "orthogonality/r1": torch.stack([orthogonality_error(each).max() for each in self._r1]).max(),
            "orthogonality/r2": orthogonality_error(self.value).max(),
        }

    def block_input(self, site: Tensor) -> tuple[Tensor, Mean]:
        """What R1 turns of one site's rows ``[rows, hidden]``, and the mean over them."""
        return rms_norm(site, self.rms_norm_eps), lambda x: self.over_ranks(x.mean())

    def over_ranks(self, moment: Tensor) -> Tensor:
        """Mean over all processes, with its gradient; they hold equal parts of a batch."""
        if self._trainer is None or self.trainer.world_size == 1:
            return moment
        gathered = self.all_gather(moment, sync_grads=True)
        assert isinstance(gathered, Tensor)
        return gathered.mean(0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Kurtosis and 4-bit error of every block input on rows kept out of training."""
        normed = rms_norm(batch["residual"].to(self.value), self.rms_norm_eps)
        self.site_kurtosis.update(torch.stack([self.turned(rows, site) for site, rows in enumerate(normed)]))
        errors = []
        for site, stored in enumerate(batch["residual"]):
            rows, mean = self.block_input(stored.to(self.value))
            errors.append(rounding_error(self.turned(rows, site), mean, HELD_OUT))
        rows_of_site = batch["residual"].shape[1]
        self.log("error/validation", torch.stack(errors).mean(), batch_size=rows_of_site, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Report the kurtosis: mean, maximum, and every site by its name."""
        values = self.site_kurtosis.compute().float()
        self.site_kurtosis.reset()
        if not is_finite(values):
            bad = block_sites(self.layers)[int((~values.isfinite()).nonzero()[0])]
            raise NotFinite(f"the kurtosis of {bad} is not finite: its held-out rows are all alike, or far too large")
        self.log_dict({"kurtosis/validation/mean": values.mean(), "kurtosis/validation/max": values.max()})
        sites = block_sites(self.layers)
        self.log_dict({f"kurtosis_site/{site}": value for site, value in zip(sites, values, strict=True)})

    def configure_callbacks(self) -> list[L.Callback]:
        """Whatever the trainer, an interrupted training can be resumed, and its curves are kept."""
        return [Curves(), InterruptBetweenSteps()]  # An interrupted step is on the curves.

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer for all rotations; its moments are kept for each matrix."""
        optimizer = self.optimizer([*self._r1, self.value])
        if self.scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}

    @property
    def _r1(self) -> list[nn.Parameter]:
        """All matrices that R1 is made of."""
        return [self.residual] if self.inputs is None else list(self.inputs.parameters())

    def learned(self) -> tuple[Tensor | HadamardFactors, Tensor]:
        """R1 and every R2 as learned, re-orthogonalised, float64 on the CPU; raises NotFinite when one diverged."""
        if not all(is_finite(each.detach()) for each in (*self._r1, self.value)):
            raise NotFinite("the learned rotations are nan or infinite; learn with a smaller step size, optimizer.lr")
        r2 = nearest_orthogonal(self.value.detach()).cpu()
        r2 = r2 if self.block is None else block_diagonal(r2)
        if self.inputs is not None:
            return self.inputs.learned(), r2
        r1 = nearest_orthogonal(self.residual.detach()).cpu()
        return r1 if self.block is None else block_diagonal(r1), r2

    def rotations(self, config: PretrainedConfig) -> Rotations:
        """All rotations of a model: the learned ones, and the random online ones of the same seed."""
        r1, value = self.learned()
        found: dict[str, Any] = {"residual" if self.inputs is None else "block_input": r1, "value": value}
        return replace(self.random_rotations(config), **found)

    def random_rotations(self, config: PretrainedConfig) -> Rotations:
        """Random Hadamards of the module's seed, those that act at run time as they are aimed at."""
        return random_rotations(config, self.rotation_seed, self.aim.block_size, self.block)

    def settings(self) -> dict[str, Any]:
        """What decides the learned rotations, beside the data; plain data for JSON."""
        optimizer = self.optimizer([nn.Parameter(torch.eye(2))])
        settings = {
            "method": self.method,
            "seed": self.rotation_seed,
            "rms_norm_eps": self.rms_norm_eps,
            "optimizer": {"class": type(optimizer).__name__, **optimizer.defaults},
            **self.blocks(),
        }
        if self.scheduler is not None:
            scheduler = self.scheduler(optimizer)
            numbers = {k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | str)}
            settings["scheduler"] = {"class": type(scheduler).__name__, **numbers}
        return settings

    def blocks(self) -> dict[str, Any]:
        """The sizes of blocks, among the settings of rotations that are in blocks."""
        sizes = {"block_size": self.aim.block_size, "block": self.block}
        return {name: size for name, size in sizes.items() if size is not None}

    def trainer_settings(self) -> dict[str, Any]:
        """What of the trainer decides the learned rotations, the number of steps apart."""
        trainer = self.trainer
        stops = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
        return {
            "precision": trainer.precision,
            "gradient_clip": [trainer.gradient_clip_val, trainer.gradient_clip_algorithm],
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "early_stopping": [[stop.monitor, stop.mode, stop.patience, stop.min_delta] for stop in stops],
        }

    def _require_same_training(self, checkpoint: dict[str, Any]) -> None:
        """Raise ResumeMismatch when a checkpoint's training was another one, or cannot end at the steps wanted."""
        found = differences(checkpoint["trainer"], self.trainer_settings())
        taken, wanted = checkpoint["global_step"], getattr(self.trainer.datamodule, "steps", None)  # type: ignore[attr-defined]
        ended = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] and not checkpoint["stopped"]
        if wanted is not None and (taken > wanted or (ended and taken < wanted)):
            found.append(f"it has {'ended after' if ended else 'taken'} {taken} steps, and data.steps is {wanted}")
        if found:
            raise ResumeMismatch(
                f"the checkpoint is of another training: {listed(found)}; name another trainer.default_root_dir, or "
                "start anew with --overwrite"
            )

    def on_train_start(self) -> None:
        """Take no more steps when what is resumed had been stopped early."""
        self.trainer.should_stop = self._stopped

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the settings, for whoever resumes, and whether the training was stopped early."""
        checkpoint["settings"], checkpoint["trainer"] = self.settings(), self.trainer_settings()
        checkpoint["stopped"] = self.trainer.should_stop

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other sizes, by name instead of by torch's list of shapes, or of other settings."""
        own = {name: tuple(each.shape) for name, each in self.named_parameters() if name.startswith(ROTATIONS)}
        shapes = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items() if name.startswith(ROTATIONS)}
        if shapes != own:
            raise ConfigError(f"the checkpoint holds rotations {shapes}, this model needs {own}; resume its own run")
        found = differences(checkpoint["settings"], self.settings())
        if found:
            raise ResumeMismatch(
                f"the checkpoint was made with other settings: {listed(found)}; "
                "resume with its own, or start anew with --overwrite"
            )
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            self._require_same_training(checkpoint)
        self._stopped = checkpoint["stopped"]
