"""transformers' own loader for KurTail folders: `from_pretrained` gives the model that `load` gives, bit for bit.

`config.json` names this quantizer, and has a mark (`storage.mark`) by which transformers refuses the folder where none
is registered. Here the mark is taken away; `artefact.adoption` does the rest.

This is imported while transformers is (`artefact.registration`): what needs all of transformers is imported when used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kurtail_pl.errors import ConfigError

METHOD = "kurtail"
"""`quant_method` in `config.json`, as `storage.mark` writes it, and name of our attention."""


@register_quantization_config(METHOD)
class KurtailConfig(QuantizationConfigMixin):
    """`quantization_config` of a KurTail folder; all that there is to say is in its card."""

    def __init__(self, quant_method: Any = METHOD) -> None:
        self.quant_method = quant_method


@register_quantizer(METHOD)
class KurtailQuantizer(HfQuantizer):
    """Makes `from_pretrained` read a KurTail folder.

    Raises:
        ArtefactError: when a file is missing, or not the one that was written.
        CheckpointError: when the weights are not those of the configuration that was asked for.
        ConfigError: when a keyword asks for what these models cannot be.
    """

    requires_calibration = True
    is_trainable = False

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse a map of devices, as given or as filled, that leaves parts in memory or on disk."""
        from kurtail_pl.artefact.placement import require_no_offload

        if isinstance(device_map, Mapping):
            require_no_offload(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse the types that `load` refuses."""
        from kurtail_pl.artefact.placement import dtype_of

        self._dtype = dtype_of(dtype)
        return self._dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuse what the configuration asks for in vain, and take the mark away: it is this load's own copy."""
        from kurtail_pl.storage.card import require_sound
        from kurtail_pl.storage.mark import WEIGHTS

        attention = config._attn_implementation
        if attention not in (None, "sdpa", METHOD):
            raise ConfigError(
                f"attn_implementation is {attention!r}, and keys and values are rotated and quantized in an attention "
                "of our own; leave it out"
            )
        if getattr(config, "distributed_config", None) is not None:
            raise ConfigError("tp_plan or distributed_config is given, and this model is not split; leave it out")
        # Before transformers looks for the weights, where it can be: it would tell of a lost file in its own way.
        require_sound(Path(config.name_or_path))
        if hasattr(config, WEIGHTS):
            delattr(config, WEIGHTS)
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from kurtail_pl.artefact.adoption import Adoption

        if kwargs.get("use_kernels"):
            raise ConfigError("use_kernels is true, and kernels would stand in for modules of kurtail_pl; leave it out")
        self._adoption = Adoption(model, Path(kwargs["checkpoint_files"][0]).parent, self._dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Names of our modules for names on disk, instead of transformers' own conversions, which stack experts."""
        from transformers.core_model_loading import WeightRenaming

        return [WeightRenaming(theirs, ours) for ours, theirs in self._adoption.architecture.on_disk]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        self._adoption.finish(model)

    def is_serializable(self) -> bool:
        """What is loaded saves itself, by copying its folder."""
        return True
