"""Online rotations as vLLM's transforms: one for all layers, on what a linear reads.

Sylvester's blocks run in its fast Hadamard kernel, any other rotation as a dense matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformLocation, TransformScheme
from torch import Tensor

from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.hadamard import HadamardFactors

FAST_SIZE = 1 << 15
LOCATION = TransformLocation.INPUT.value


@dataclass(frozen=True, eq=False)
class Transform:
    """A rotation of what one linear of every decoder layer reads.

    Attributes:
        name: of the rotation, and of the group in the configuration.
        factors: its matrix Q, which acts on row vectors: ``x Q``; its blocks are ``[n, n]``.
        linear: by its name in a layer.
    """

    name: str
    factors: HadamardFactors
    linear: str

    @property
    def fast(self) -> bool:
        """Whether vLLM has a kernel for it: of `hadacore`, up to 2^15 channels (`csrc/hadamard`)."""
        return self.factors.is_sylvester and self.factors.block <= FAST_SIZE

    @property
    def multiplications(self) -> int:
        """Of one token, as vLLM computes it; additions of the fast kernel count as such."""
        block = self.factors.block
        return self.factors.size * (block.bit_length() - 1 if self.fast else block)

    def bytes(self, dtype: torch.dtype) -> int:
        """Of the matrix in a type."""
        return self.factors.block**2 * dtype.itemsize

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """``sqrt(n) Q`` of a block, ``[n, n]``: vLLM divides what it has read by sqrt(n), and multiplies rows by it.

        The fast kernel does not look at it; vLLM wants the tensor all the same.

        Row by row of the left factor: in float64 the matrix of a large model would be the largest thing in memory.
        """
        left, right = (factor * len(factor) ** 0.5 for factor in (self.factors.left, self.factors.right))
        return torch.cat([torch.kron(row, right).to(dtype) for row in left.split(1)])


def transforms_of(source: Source) -> list[Transform]:
    """R4 and R5 of an artefact; R3 has no place among vLLM's transforms, and its cache has one of its own."""
    architecture, rotations = source.architecture, source.rotations
    found = {
        "attention_output": (rotations.attention_output, architecture.output),
        "mlp_hidden": (rotations.mlp_hidden, f"{architecture.mlp}.{architecture.down}"),
    }
    return [Transform(name, factors, linear) for name, (factors, linear) in found.items() if factors is not None]


def transform_config(transforms: Iterable[Transform]) -> dict[str, Any]:
    """``transform_config`` of ``config.json``.

    A ``hadamard`` is Sylvester's matrix, computed from its size; for a ``random-hadamard`` vLLM takes the matrix of the
    checkpoint, whatever it is. Both turn blocks of ``head_dim`` channels, or all
    (`vllm/.../compressed_tensors/transform/module.py`).
    """
    config = TransformConfig(
        config_groups={
            transform.name: TransformScheme(
                type="hadamard" if transform.fast else "random-hadamard",
                **({} if transform.factors.blocks == 1 else {"head_dim": transform.factors.block}),
                apply=[
                    TransformArgs(
                        targets=[f"re:.*{re.escape(transform.linear)}$"], location=LOCATION, inverse=False, ignore=[]
                    )
                ],
                randomize=False,
                requires_grad=False,
            )
            for transform in transforms
        }
    )
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return dumped


def transform_tensors(source: Source, transforms: Iterable[Transform], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each matrix by its name at the first decoder layer: all layers share the one that is read."""
    return dict(_named(source, transforms, dtype))


def _named(source: Source, transforms: Iterable[Transform], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for transform in transforms:
        yield tensor_name(source, transform), transform.matrix(dtype)


def tensor_name(source: Source, transform: Transform) -> str:
    """Of a matrix in the folder."""
    return f"{source.layer_name(0)}.{transform.linear}.{transform.name}_{LOCATION}.weight"
