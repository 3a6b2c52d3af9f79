"""SpinQuant: R1 and R2 from the cross-entropy of the whole fake-quantized model (arXiv 2405.16406)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.aim import Aim
from kurtail_pl.lit.datamodule import WindowDataModule
from kurtail_pl.lit.rotations import RotationModule
from kurtail_pl.lit.sizes import ModelSizes
from kurtail_pl.optim import CayleySGD
from kurtail_pl.storage.files import gigabytes
from kurtail_pl.surgery.learnable import make_learnable

log = logging.getLogger(__name__)

NETWORK = "network"


class SpinQuantModule(RotationModule):
    """Learns R1 and every layer's R2 end to end: next-token cross-entropy, gradients straight through the rounding.

    Holds the whole model in float32, and what its backward pass needs: about thirty times what KurTail's proxy takes.

    Args:
        sizes: see `RotationModule`.
        aim: see `RotationModule`; the forward quantizes by its scheme, and has its online rotations.
        rotation_seed: see `RotationModule`.
        quantized_weights: round the weights in the forward. SpinQuant does so when RTN follows, and leaves them float
            when GPTQ does.
        value_per_head: see `RotationModule`.
        optimizer: see `RotationModule`.
        scheduler: see `RotationModule`.

    Raises:
        ConfigError: when the model's residual stream cannot be turned; when the scheme centres, has static scales or a
            prefix, which come from the finished rotations, or has `layer_bits` or a side where weights are rounded.
    """

    method = "spinquant"
    network: PreTrainedModel

    def __init__(
        self,
        sizes: ModelSizes,
        aim: Aim | None = None,
        rotation_seed: int = 0,
        quantized_weights: bool = False,
        value_per_head: bool = False,
        optimizer: OptimizerCallable = CayleySGD,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(sizes, rotation_seed, value_per_head, aim, optimizer, scheduler)
        if self.inputs is not None:
            raise ConfigError(
                f"SpinQuant learns R1 in the weights, which this model does not allow: {sizes.get('rigid_residual')}; "
                "learn with KurTail, or take QuaRot's rotations"
            )
        scheme = self.aim.scheme
        if quantized_weights and scheme.layer_bits is not None:
            raise ConfigError("quantized_weights is true and layer_bits are given; SpinQuant learns with equal bits")
        if quantized_weights and scheme.side is not None:
            raise ConfigError("quantized_weights is true and side is given; SpinQuant learns without one")
        if scheme.calibrated or scheme.prefix is not None:
            raise ConfigError(
                "the scheme of quantization centres, has static scales, a fitted cache or a prefix, which are made "
                "after the rotations are learned, and SpinQuant learns through the scheme: leave centre, cache, "
                "activation_scales and prefix as they are in base.yaml"
            )
        self.scheme = scheme if quantized_weights else replace(scheme, weights=None, layer_bits=None, side=None)
        # The vanilla weights are not what is learned: checkpoints leave them out.
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        """Read the model and make its weights functions of the rotations."""
        super().setup(stage)
        if stage != "fit":
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, WindowDataModule)
        network = whole_model(data.checkpoint)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        log.info("spinquant learns through the whole model: %s of weights in memory", gigabytes(weights))
        online = self.random_rotations(network.config).keeping(self.aim.online)
        make_learnable(network, self.scheme, online, self.residual, self.value)
        self.network = network

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood of the next token over windows ``[windows, seqlen]``."""
        logits = self.network(input_ids=batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        with torch.no_grad():
            self.log_dict({"loss/total": loss, **{k: v.float() for k, v in self.orthogonality().items()}})
        self.log_dict({"loss": loss}, prog_bar=True, logger=False)
        return loss

    def settings(self) -> dict[str, Any]:
        """What decides the learned rotations, beside the data."""
        return {**super().settings(), "scheme": self.scheme.to_dict(), "online": self.aim.online}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rotations alone."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith(f"{NETWORK}.")}
