"""Where a loaded model goes, and in which floating-point type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kurtail_pl.errors import ConfigError, reason

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Place = str | int | torch.device


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """The type by its name; raises ConfigError for one that models are not loaded in."""
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype is {dtype!r}; choose {', '.join(DTYPES)}")
    return found


def device_of(device: Place) -> torch.device:
    """The device; raises ConfigError when there is none of that name here."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"device is {device!r}, and torch has none here ({reason(error)}); choose cpu") from error
    return found


def place(module: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Cast and move the weights of a module, in place; raises ConfigError when the type does not hold one of them."""
    module.to(device, dtype)
    require_range(module, f"{name}.")


def require_range(module: nn.Module, prefix: str = "") -> None:
    """Raise ConfigError when a weight of a module was too large for float16."""
    for key, tensor in module.state_dict(prefix=prefix).items():
        if tensor.dtype == torch.float16 and not torch.isfinite(tensor).all():
            raise ConfigError(f"dtype is float16, and {key} is beyond its range; choose bfloat16 or float32")


def spread(model: PreTrainedModel, device_map: Place | Mapping[str, Any]) -> None:
    """Spread a model over devices, in place; decoder layers stay whole and move what they get to their device.

    Args:
        model: on the CPU.
        device_map: ``auto`` to fill the devices that there are, one device, or modules' names and their devices, as
            `accelerate` takes them.

    Raises:
        ConfigError: when a device is not there, a module has none, or a part would be fetched from memory or disk at
            each use, because the devices have no room for it.
    """
    from accelerate import dispatch_model

    if device_map == "auto":
        device_map = _filled(model)
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_of(device_map)}
    require_no_offload(device_map)
    try:
        dispatch_model(model, dict(device_map))
    except (ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise ConfigError(f"device_map cannot be used here ({reason(error)}); give auto, or a device") from error


def require_no_offload(device_map: Mapping[str, Any]) -> None:
    """Raise ConfigError when parts would be fetched from memory or disk at each use."""
    places = sorted({str(place) for place in device_map.values()})
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ConfigError(
            f"device_map puts parts on {' and '.join(places)}; give devices with room for all, or the cpu"
        )


def _filled(model: PreTrainedModel) -> dict[str, Any]:
    """The devices that there are, each with as many whole layers as fit, evenly."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or ())
    memory = get_balanced_memory(model, no_split_module_classes=whole)
    found: dict[str, Any] = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)
    return found
