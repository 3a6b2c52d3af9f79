"""Where a model is run layer by layer, and in which floating-point type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from kurtail_pl.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Compute:
    """How decoder layers are run: by capture, GPTQ and evaluation alike.

    Weights and hidden states are of the type; moments, Hessians and log-likelihoods are float32 or wider whatever it
    is, and fusion is float64.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``: CUDA where there is a device.
        dtype: ``float32`` or ``bfloat16``; it changes the numbers a little, the device only their last digits.

    Raises:
        ConfigError: when a field is none of these.
    """

    device: Device = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; choose auto, cpu or cuda")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; choose float32 or bfloat16")

    @property
    def torch_device(self) -> torch.device:
        """The device itself; raises ConfigError when CUDA is asked for and there is none."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, and torch finds no CUDA device here; choose cpu or auto")
        return torch.device("cuda" if self.on_cuda else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type itself."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def on_cuda(self) -> bool:
        """Whether layers run on CUDA, here or, where CUDA is asked for by name, on the machine that a plan is for."""
        return self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())


AUTO = Compute()
"""Float32 on whatever device there is."""
