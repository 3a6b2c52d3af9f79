"""KurTail: R1 and R2 from a proxy, RMSNorm and rotation, by the kurtosis of cached activations (KurTail, §3)."""

from __future__ import annotations

import torch
from torch import Tensor

from kurtail_pl.lit.loader import Batch
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.maths.kurtosis import distance_to_uniform, kurtosis, rms_norm


class KurTailModule(RotationModule):
    """Learns R1 and every layer's R2 together, from batches of cached activations.

    The two are independent (KurTail, Prop. 2.5), and the loss is a sum over them: each gets the gradient it would get
    alone.
    """

    method = "kurtail"

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
                **self.orthogonality(),
            }
        self.log_dict({name: value.float() for name, value in scalars.items()})
        # Keys of at most five characters: longer ones are cut to the same word at 80 columns.
        bar = {"loss": loss, "k_r1": kurtosis_r1.mean(), "k_r2": kurtosis_r2.mean()}
        self.log_dict(bar, prog_bar=True, logger=False)
        return loss
