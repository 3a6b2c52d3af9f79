"""An export as its readers see it: the configuration by the library's own models, and the tensors by name."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.transform import TransformConfig
from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
from compressed_tensors.utils import is_match
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from kurtail_pl.errors import CheckFailed
from kurtail_pl.storage.weights import stored_tensors, usual_files

OURS = ("version", "transform_config")
"""What stands beside the quantization's own settings."""
WEIGHT = "weight_"


class Served:
    """A folder that was exported.

    Raises:
        CheckFailed: when the library refuses its configuration.
    """

    def __init__(self, folder: Path) -> None:
        self._places = stored_tensors(usual_files(folder))
        given: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config: dict[str, Any] = given["quantization_config"]
        own = {name: value for name, value in config.items() if name not in OURS}
        try:
            self.quantization = QuantizationConfig.model_validate(own)
            self.transforms = TransformConfig.model_validate(config.get("transform_config", {"config_groups": {}}))
        except (ValidationError, ValueError) as error:
            raise CheckFailed(f"compressed-tensors refuses the config.json of {folder}: {error}") from error

    @cached_property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; raises CheckFailed when there is none of that name."""
        if name not in self._places:
            raise CheckFailed(f"the export has no tensor {name}")
        with safe_open(self._places[name].path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def scheme(self, name: str) -> QuantizationScheme:
        """What the configuration says of a linear; raises CheckFailed when it says nothing."""
        for scheme in self.quantization.config_groups.values():
            assert isinstance(scheme, QuantizationScheme)
            if is_match(name, nn.Linear(1, 1, device="meta"), scheme.targets, self.quantization.ignore or ()):
                return scheme
        raise CheckFailed(f"the export's config.json does not say how {name} is quantized")

    def weight(self, name: str) -> dict[str, Tensor]:
        """The tensors that stand for a linear's weight, by their names in it."""
        start = f"{name}.{WEIGHT}"
        return {place.removeprefix(f"{name}."): self.tensor(place) for place in self.names if place.startswith(start)}

    def transform(self, name: str) -> Tensor | None:
        """The matrix of a block of a linear's transform, ``[n, n]`` in double, which all its targets share.

        It is read, or computed by the library where the configuration says so.
        """
        for group, scheme in self.transforms.config_groups.items():
            (apply,) = scheme.apply
            if is_match(name, nn.Linear(1, 1, device="meta"), apply.targets, apply.ignore):
                (place,) = (n for n in self.names if n.endswith(f".{group}_{cast(str, apply.location)}.weight"))
                stored: Tensor = self.tensor(place).double()
                if scheme.type == "hadamard":
                    stored = deterministic_hadamard_matrix(scheme.head_dim or len(stored), torch.float64)
                return stored.div(len(stored) ** 0.5)
        return None
