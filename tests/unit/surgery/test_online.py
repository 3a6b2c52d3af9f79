"""Online Hadamards by a fast transform, against the dense matrix."""

import importlib.util

import pytest
import scipy.linalg
import torch
from torch import Tensor

from kurtail_pl.maths.hadamard import block_hadamard_factors, hadamard_factors, random_hadamard_factors
from kurtail_pl.surgery.online import OnlineHadamard


def scipys(x: Tensor, scale: float) -> Tensor:
    """What the package computes, by SciPy's matrix."""
    return scale * x @ torch.from_numpy(scipy.linalg.hadamard(x.shape[-1])).to(x)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "block"), [(2, None), (64, None), (4096, None), (1536, 512), (96, 32)])
def test_a_fast_transform_gives_the_dense_product(n: int, block: int | None, transposed: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    factors = random_hadamard_factors(n, draw) if block is None else block_hadamard_factors(n, block)
    factors = factors.transposed() if transposed else factors
    module = OnlineHadamard(factors)
    assert module.is_sylvester
    x = torch.randn(2, 3, n, generator=draw, dtype=torch.float64)
    blocks = x.unflatten(-1, (-1, block or n))
    expected = x @ factors.dense()
    torch.testing.assert_close(module._by(scipys, blocks).flatten(-2), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_signs_that_are_all_positive_are_left_out() -> None:
    module = OnlineHadamard(block_hadamard_factors(96, 32))
    assert module.rows is None
    assert module.columns is None
    assert not OnlineHadamard(hadamard_factors(96)).is_sylvester
    assert module.state_dict() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("fast_hadamard_transform") is None, reason="needs the CUDA kernel")
@pytest.mark.parametrize("n", [2, 64, 576, 1536, 4096, 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_kernel_agrees_with_the_dense_matrix(n: int, dtype: torch.dtype) -> None:
    signed = random_hadamard_factors(n, torch.Generator().manual_seed(n))
    for factors in (signed, signed.transposed()):
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        y = OnlineHadamard(factors).cuda()(x.cuda())
        tolerance = 1e-4 if dtype == torch.float32 else 2.0**-6
        torch.testing.assert_close(y.double().cpu(), x.double() @ factors.dense(), rtol=0, atol=tolerance)
