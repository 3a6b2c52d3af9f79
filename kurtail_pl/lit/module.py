"""The proxy that learns the rotations: RMSNorm and rotation, kurtosis loss, Cayley Adam (KurTail, §3)."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from kurtail_pl.errors import ConfigError, ResumeMismatch
from kurtail_pl.lit.interrupt import InterruptBetweenSteps
from kurtail_pl.lit.loader import Batch
from kurtail_pl.maths.kurtosis import distance_to_uniform, kurtosis, rms_norm
from kurtail_pl.maths.orthogonal import nearest_orthogonal, orthogonality_error
from kurtail_pl.metrics import Kurtosis
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.storage.activations import block_sites
from kurtail_pl.storage.resume import differences
from kurtail_pl.surgery.rotations import random_fused

FLOAT32_PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


class KurTailModule(L.LightningModule):
    """Learns R1 ``[hidden, hidden]`` and every layer's R2 together.

    The two are independent (KurTail, Prop. 2.5), and the loss is a sum over them: each gets the gradient it would get
    alone. Sizes come from the data module when `kurtail fit` runs; a size given by hand is then ignored.

    Args:
        layers: decoder layers.
        hidden_size: width of the residual stream.
        head_dim: width of a value head.
        kv_heads: key and value heads.
        rms_norm_eps: of the model's norms.
        rotation_seed: decides the random Hadamards that the rotations start from.
        value_per_head: one R2 for each KV head, ``[layers, kv_heads, head_dim, head_dim]``, instead of one for each
            layer, ``[layers, head_dim, head_dim]``.
        optimizer: an optimizer on the Stiefel manifold.
    """

    def __init__(
        self,
        layers: int,
        hidden_size: int,
        head_dim: int,
        kv_heads: int,
        rms_norm_eps: float,
        rotation_seed: int = 0,
        value_per_head: bool = False,
        optimizer: OptimizerCallable = CayleyAdam,
    ) -> None:
        super().__init__()
        self.layers, self.rms_norm_eps, self.rotation_seed = layers, rms_norm_eps, rotation_seed
        self.optimizer = optimizer
        residual, value = random_fused(
            layers, hidden_size, head_dim, rotation_seed, kv_heads if value_per_head else None
        )
        self.residual = nn.Parameter(residual.float())
        self.value = nn.Parameter(value.float())
        self.site_kurtosis = Kurtosis(sites=2 * layers)

    def setup(self, stage: str) -> None:
        """Refuse precisions that wreck orthogonality."""
        if self.trainer.precision not in FLOAT32_PRECISIONS:
            raise ConfigError(
                f"trainer.precision is {self.trainer.precision!r}, in which the rotations do not stay orthogonal; "
                f"use one of {', '.join(FLOAT32_PRECISIONS)}"
            )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Kurtosis of what the quantizers would see: of block inputs ``[2 layers]`` and of what each R2 turns.

        The RMSNorm has no weight (it is folded) and comes first: it commutes with the rotation and needs no gradient
        there. Sites are taken one by one: a site's values then stay in the processor's cache, which halves the time.
        """
        normed = rms_norm(batch["residual"], self.rms_norm_eps)
        residual = torch.stack([kurtosis((site @ self.residual).flatten(), self._over_ranks) for site in normed])
        value = batch["value"].flatten(1, 2) if self.value.ndim == 3 else batch["value"].transpose(1, 2)
        return residual, kurtosis((value @ self.value).flatten(-2), self._over_ranks)

    def _over_ranks(self, moment: Tensor) -> Tensor:
        """Mean over all processes, with its gradient; they hold equal parts of a batch."""
        if self._trainer is None or self.trainer.world_size == 1:
            return moment
        gathered = self.all_gather(moment, sync_grads=True)
        assert isinstance(gathered, Tensor)
        return gathered.mean(0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Eq. 4 for R1 plus its twin for every R2."""
        with torch.autocast(self.device.type, enabled=False):
            kurtosis_r1, kurtosis_r2 = self(batch)
            loss_r1, loss_r2 = distance_to_uniform(kurtosis_r1).mean(), distance_to_uniform(kurtosis_r2).sum()
        loss: Tensor = loss_r1 + loss_r2
        with torch.no_grad():
            scalars = {
                "loss/total": loss,
                "loss/r1": loss_r1,
                "loss/r2": loss_r2,
                "kurtosis/r1/mean": kurtosis_r1.mean(),
                "kurtosis/r1/max": kurtosis_r1.max(),
                "kurtosis/r2/mean": kurtosis_r2.mean(),
                "kurtosis/r2/max": kurtosis_r2.max(),
                "orthogonality/r1": orthogonality_error(self.residual),
                "orthogonality/r2": orthogonality_error(self.value).max(),
            }
        self.log_dict({name: value.float() for name, value in scalars.items()})
        # Keys of at most five characters: longer ones are cut to the same word at 80 columns.
        bar = {"loss": loss, "k_r1": kurtosis_r1.mean(), "k_r2": kurtosis_r2.mean()}
        self.log_dict(bar, prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect the kurtosis of every block input on rows kept out of training."""
        self.site_kurtosis.update(rms_norm(batch["residual"], self.rms_norm_eps) @ self.residual)

    def on_validation_epoch_end(self) -> None:
        """Report it: mean, maximum, and every site by its name."""
        values = self.site_kurtosis.compute().float()
        self.site_kurtosis.reset()
        self.log_dict({"kurtosis/validation/mean": values.mean(), "kurtosis/validation/max": values.max()})
        sites = block_sites(self.layers)
        self.log_dict({f"kurtosis_site/{site}": value for site, value in zip(sites, values, strict=True)})

    def configure_callbacks(self) -> list[L.Callback]:
        """Whatever the trainer, an interrupted training can be resumed."""
        return [InterruptBetweenSteps()]

    def configure_optimizers(self) -> Optimizer:
        """One optimizer for all rotations; its moments are kept for each matrix."""
        return self.optimizer([self.residual, self.value])

    def learned(self) -> tuple[Tensor, Tensor]:
        """R1 and every R2 as learned, re-orthogonalised, float64 on the CPU."""
        return nearest_orthogonal(self.residual.detach().cpu()), nearest_orthogonal(self.value.detach().cpu())

    def settings(self) -> dict[str, Any]:
        """What decides the learned rotations, beside the data."""
        optimizer = self.optimizer([nn.Parameter(torch.eye(2))])
        own = {"rotation_seed": self.rotation_seed, "rms_norm_eps": self.rms_norm_eps}
        return {**own, "optimizer": {"class": type(optimizer).__name__, **optimizer.defaults}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the settings, for whoever resumes."""
        checkpoint["settings"] = self.settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other sizes, by name instead of by torch's list of shapes, or of other settings."""
        shapes = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items() if name in ("residual", "value")}
        own = {name: tuple(getattr(self, name).shape) for name in ("residual", "value")}
        if shapes != own:
            raise ConfigError(f"the checkpoint holds rotations {shapes}, this model needs {own}; resume its own run")
        found = differences(checkpoint["settings"], self.settings())
        if found:
            raise ResumeMismatch(
                f"the checkpoint was made with other settings: {'; '.join(found)}; "
                "resume with its own, or start anew with --overwrite"
            )
