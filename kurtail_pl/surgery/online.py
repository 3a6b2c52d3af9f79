"""Maps of the last dimension at run time: Hadamards, Kronecker products, and the inverses of these."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kurtail_pl.maths.backends import Transform, fast_transform
from kurtail_pl.maths.hadamard import HadamardFactors, hadamard_transform
from kurtail_pl.maths.kronecker import Kronecker, kronecker_transform
from kurtail_pl.surgery.exact import Exact


class OnlineHadamard(Exact):
    """A Hadamard rotation of the last dimension at run time; its two factors are not part of the state dict.

    Where its blocks are Sylvester's matrices up to signs, and fast-hadamard-transform is installed, that computes them
    on CUDA.
    """

    left: Tensor
    right: Tensor
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, factors: HadamardFactors) -> None:
        super().__init__()
        self.construction, self.blocks = factors.construction, factors.blocks
        self.register_buffer("left", factors.left, persistent=False)
        self.register_buffer("right", factors.right, persistent=False)
        signs = factors.sylvester_signs()
        self.is_sylvester = signs is not None
        for name, each in zip(("rows", "columns"), signs or (None, None), strict=True):
            self.register_buffer(name, None if each is None else _small(each), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate ``[..., n]``, in float32 or wider: in half precision the factors would not be orthogonal."""
        block = x.shape[-1] // self.blocks
        kernel = fast_transform(x, block) if self.is_sylvester else None
        if kernel is None:
            return self._by_factors(x)
        return self._by(kernel, x.reshape(*x.shape[:-1], self.blocks, block)).reshape(x.shape)

    def _by(self, transform: Transform, x: Tensor) -> Tensor:
        """Rotate blocks ``[..., block]`` by a transform with Sylvester's matrix."""
        x = x if self.rows is None else x * self.rows.to(x.dtype)
        turned = transform(x.contiguous(), x.shape[-1] ** -0.5)
        return turned if self.columns is None else turned * self.columns.to(x.dtype)

    def _by_factors(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return hadamard_transform(wide, self.factors).to(x.dtype)

    @property
    def multiplications(self) -> int:
        """Of one row."""
        return self.factors.multiplications

    @property
    def factors(self) -> HadamardFactors:
        """Where the module is, and in its type."""
        return HadamardFactors(self.left, self.right, self.construction, self.blocks)


def _small(signs: Tensor) -> Tensor | None:
    """Signs as int8; None where all are positive, since nothing has to be multiplied then."""
    return signs.to(torch.int8) if bool((signs < 0).any()) else None


class OnlineKronecker(Exact):
    """An invertible map of the last dimension at run time; its two factors are part of the state dict, float32."""

    left: Tensor
    right: Tensor

    def __init__(self, kronecker: Kronecker) -> None:
        super().__init__()
        # Others may read the same inputs, and a file holds no shared tensors.
        self.register_buffer("left", kronecker.left.detach().float().clone())
        self.register_buffer("right", kronecker.right.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., n]``, in float32 or wider."""
        return _times(x, self.kronecker)

    @property
    def kronecker(self) -> Kronecker:
        """The map."""
        return Kronecker(self.left, self.right)

    @property
    def multiplications(self) -> int:
        """Of one row."""
        return self.kronecker.multiplications


class OnlineInverse(nn.Module):
    """The transposed inverse of another map, made anew when that one's factors are others."""

    def __init__(self, of: OnlineKronecker) -> None:
        super().__init__()
        # In a tuple, which makes it no part of this module.
        self._of = (of,)
        self._made: tuple[Tensor, Tensor, Kronecker] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., n]``, in float32 or wider."""
        return _times(x, self._inverse())

    @property
    def multiplications(self) -> int:
        """Of one row, as many as those of the other map."""
        return self._of[0].multiplications

    def _inverse(self) -> Kronecker:
        left, right = self._of[0].left, self._of[0].right
        if left.requires_grad or right.requires_grad:
            return Kronecker(left, right).inverse_transposed()
        if self._made is None or self._made[0] is not left or self._made[1] is not right:
            self._made = left, right, Kronecker(left, right).inverse_transposed()
        return self._made[2]


def _times(x: Tensor, kronecker: Kronecker) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return kronecker_transform(wide, kronecker).to(x.dtype)
