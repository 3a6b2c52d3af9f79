"""Hadamard matrices against their definition, SciPy's Sylvester matrices and NumPy's Kronecker product."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from kurtail_pl.maths.constructions import hadamard_matrix
from kurtail_pl.maths.hadamard import (
    HadamardFactors,
    block_hadamard_factors,
    hadamard_factors,
    hadamard_transform,
    random_hadamard,
    random_hadamard_factors,
)

PALEY_ORDERS = [12, 20, 28, 36, 44, 52, 60, 68, 76, 84, 100, 108, 140, 148, 344, 688, 924]
UNKNOWN_BELOW_200 = [92, 116, 156, 172, 184, 188]

# Worked out by hand from q = k - 1 = 3 mod 4 or q = k / 2 - 1 = 1 mod 4: odd part -> (order k, construction).
ODD_PARTS = {
    1: (1, ""),
    3: (12, "Paley I GF(11)"),
    5: (20, "Paley I GF(19)"),
    7: (28, "Paley I GF(3^3)"),
    9: (36, "Paley II GF(17)"),
    11: (44, "Paley I GF(43)"),
    13: (52, "Paley II GF(5^2)"),
    15: (60, "Paley I GF(59)"),
    17: (68, "Paley I GF(67)"),
    19: (76, "Paley II GF(37)"),
    21: (84, "Paley I GF(83)"),
    25: (100, "Paley II GF(7^2)"),
    27: (108, "Paley I GF(107)"),
    35: (140, "Paley I GF(139)"),
    37: (148, "Paley II GF(73)"),
    43: (344, "Paley I GF(7^3)"),
    231: (924, "Paley II GF(461)"),
}

# Published configurations: hidden, feed-forward, attention output (query heads * head size), head size.
MODELS = {
    "Llama-1-7B": (4096, 11008, 4096, 128),
    "Llama-1-13B": (5120, 13824, 5120, 128),
    "Llama-1-30B": (6656, 17920, 6656, 128),
    "Llama-1-65B": (8192, 22016, 8192, 128),
    "Llama-2-7B": (4096, 11008, 4096, 128),
    "Llama-2-13B": (5120, 13824, 5120, 128),
    "Llama-2-70B": (8192, 28672, 8192, 128),
    "Llama-3-8B": (4096, 14336, 4096, 128),
    "Llama-3-70B": (8192, 28672, 8192, 128),
    "Llama-3.1-405B": (16384, 53248, 16384, 128),
    "Llama-3.2-1B": (2048, 8192, 2048, 64),
    "Llama-3.2-3B": (3072, 8192, 3072, 128),
    "Mistral-7B": (4096, 14336, 4096, 128),
    "Mistral-Nemo-12B": (5120, 14336, 4096, 128),
    "Mixtral-8x7B": (4096, 14336, 4096, 128),
    "Mixtral-8x22B": (6144, 16384, 6144, 128),
    "Qwen2.5-0.5B": (896, 4864, 896, 64),
    "Qwen2.5-1.5B": (1536, 8960, 1536, 128),
    "Qwen2.5-3B": (2048, 11008, 2048, 128),
    "Qwen2.5-7B": (3584, 18944, 3584, 128),
    "Qwen2.5-14B": (5120, 13824, 5120, 128),
    "Qwen2.5-32B": (5120, 27648, 5120, 128),
    "Qwen2.5-72B": (8192, 29568, 8192, 128),
    "Qwen3-0.6B": (1024, 3072, 2048, 128),
    "Qwen3-1.7B": (2048, 6144, 2048, 128),
    "Qwen3-4B": (2560, 9728, 4096, 128),
    "Qwen3-8B": (4096, 12288, 4096, 128),
    "Qwen3-14B": (5120, 17408, 5120, 128),
    "Qwen3-32B": (5120, 25600, 8192, 128),
    "Qwen3-30B-A3B": (2048, 768, 4096, 128),
    "Phi-3-mini": (3072, 8192, 3072, 96),
    "Phi-3-medium": (5120, 17920, 5120, 128),
    "Phi-3.5-MoE": (4096, 6400, 4096, 128),
    "Phi-4": (5120, 17920, 5120, 128),
    "Phi-4-mini": (3072, 8192, 3072, 128),
    "SmolLM2-135M": (576, 1536, 576, 64),
    "SmolLM2-360M": (960, 2560, 960, 64),
    "SmolLM2-1.7B": (2048, 8192, 2048, 64),
    "TinyLlama-1.1B": (2048, 5632, 2048, 64),
    "Gemma-2B": (2048, 16384, 2048, 256),
    "Gemma-7B": (3072, 24576, 4096, 256),
    "Gemma-2-2B": (2304, 9216, 2048, 256),
    "Gemma-2-9B": (3584, 14336, 4096, 256),
    "Gemma-2-27B": (4608, 36864, 4096, 128),
    "Gemma-3-27B": (5376, 21504, 4096, 128),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_hadamard(matrix: Tensor, order: int) -> None:
    assert matrix.shape == (order, order)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def assert_orthonormal(matrix: Tensor) -> None:
    order = matrix.shape[0]
    tolerance = 8 * order * torch.finfo(torch.float64).eps
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order).double(), rtol=0, atol=tolerance)


def kron_reference(factors: HadamardFactors) -> Tensor:
    return torch.from_numpy(np.kron(factors.left.numpy(), factors.right.numpy()))


@pytest.mark.parametrize("order", [1, 2, *range(4, 201, 4)])
def test_every_order_to_200_constructs_but_the_known_gaps(order: int) -> None:
    if order in UNKNOWN_BELOW_200:
        with pytest.raises(ValueError, match=rf"\b{order}\b"):
            hadamard_matrix(order)
    else:
        assert_hadamard(hadamard_matrix(order), order)


def test_orders_from_200_to_700() -> None:
    primes = [p for p in range(2, 700) if all(p % d for d in range(2, p))]
    fields = {p**r for p in primes for r in range(1, 10)}
    known = {1, 2}
    for order in range(4, 701, 4):
        paley = order - 1 in fields or (order // 2 - 1 in fields and order % 8 == 4)
        if paley or order // 2 in known:
            known.add(order)
            assert_hadamard(hadamard_matrix(order), order)
        else:
            with pytest.raises(ValueError, match=f"order {order}$"):
                hadamard_matrix(order)


@pytest.mark.parametrize("order", PALEY_ORDERS)
def test_orders_that_models_need(order: int) -> None:
    assert_hadamard(hadamard_matrix(order), order)


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 18])
def test_impossible_orders_raise(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order}$"):
        hadamard_matrix(order)


@pytest.mark.parametrize("power", range(10))
def test_powers_of_two_are_sylvester(power: int) -> None:
    expected = torch.from_numpy(scipy.linalg.hadamard(2**power, dtype=np.float64))
    assert torch.equal(hadamard_matrix(2**power), expected)
    factors = hadamard_factors(2**power)
    torch.testing.assert_close(factors.dense() * 2 ** (power / 2), expected)


def test_writing_to_a_result_changes_no_later_one() -> None:
    hadamard_matrix(12).zero_()
    assert_hadamard(hadamard_matrix(12), 12)
    factors = hadamard_factors(12)
    factors.left.zero_()
    factors.right.zero_()
    assert_orthonormal(hadamard_factors(12).dense())


@pytest.mark.parametrize("n", range(1, 513))
def test_transform_is_the_dense_orthogonal_matrix_for_every_width(n: int) -> None:
    factors = random_hadamard_factors(n, generator(n))
    x = torch.randn(2, n, generator=generator(), dtype=torch.float64)
    y = hadamard_transform(x, factors)
    tolerance = 8 * n * torch.finfo(torch.float64).eps
    assert factors.size == n
    torch.testing.assert_close(y, x @ kron_reference(factors), rtol=0, atol=tolerance)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=tolerance, atol=0)
    torch.testing.assert_close(hadamard_transform(y, factors.transposed()), x, rtol=0, atol=tolerance)
    assert_orthonormal(factors.left)
    assert_orthonormal(factors.right)


@pytest.mark.parametrize(
    ("n", "a", "b", "construction"),
    [
        (1, 1, 1, "Sylvester 1"),
        (48, 12, 4, "Paley I GF(11) x Sylvester 4"),
        (64, 8, 8, "Sylvester 64"),
        (76, 76, 1, "Paley II GF(37)"),
        (172, 43, 4, "Hartley 43 x Sylvester 4"),
        (173, 173, 1, "Hartley 173"),
        (576, 36, 16, "Paley II GF(17) x Sylvester 16"),
        (1536, 48, 32, "Paley I GF(11) x Sylvester 128"),
        (2048, 32, 64, "Sylvester 2048"),
        (4096, 64, 64, "Sylvester 4096"),
        (11008, 344, 32, "Paley I GF(7^3) x Sylvester 32"),
        (14336, 112, 128, "Paley I GF(3^3) x Sylvester 512"),
    ],
)
def test_factor_sizes_and_names(n: int, a: int, b: int, construction: str) -> None:
    factors = hadamard_factors(n)
    assert (factors.left.shape[0], factors.right.shape[0], factors.construction) == (a, b, construction)


@pytest.mark.parametrize("model", MODELS)
def test_every_size_of_public_models_has_a_true_hadamard(model: str) -> None:
    for n in MODELS[model]:
        k, name = ODD_PARTS[n // (n & -n)]
        factors = hadamard_factors(n)
        expected = " x ".join(part for part in (name, f"Sylvester {n // k}" if n > k else "") if part)
        assert factors.construction == expected
        assert factors.size == n
        for factor in (factors.left, factors.right):
            order = factor.shape[0]
            assert_hadamard((factor * order**0.5).round(), order)
            assert_orthonormal(factor)


def test_hartley_part_is_the_cas_matrix() -> None:
    k = 43
    angle = 2 * np.pi * np.outer(np.arange(k), np.arange(k)) / k
    expected = torch.from_numpy((np.cos(angle) + np.sin(angle)) / np.sqrt(k))
    torch.testing.assert_close(hadamard_factors(k).left, expected, rtol=0, atol=1e-12)


def test_random_signs_follow_the_seed() -> None:
    first, same, other = (random_hadamard_factors(576, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.dense(), same.dense())
    assert not torch.equal(first.dense(), other.dense())
    assert torch.equal(random_hadamard(96, generator(1)), random_hadamard(96, generator(1)))
    assert not torch.equal(random_hadamard(96, generator(1)), random_hadamard(96, generator(2)))


def test_random_signs_are_on_the_rows() -> None:
    plain, signed = hadamard_factors(576), random_hadamard_factors(576, generator())
    for before, after in ((plain.left, signed.left), (plain.right, signed.right)):
        ratio = after / before
        assert torch.equal(ratio, ratio[:, :1].expand_as(ratio))
        assert set(ratio.flatten().tolist()) == {-1.0, 1.0}
    assert signed.construction == plain.construction


def test_random_hadamard_is_orthogonal_with_independent_signs() -> None:
    matrix = random_hadamard(96, generator())
    signs = (matrix / hadamard_factors(96).dense())[:, 0]
    assert_orthonormal(matrix)
    # Signs made of one per block and one per row of a block would have rank 1 in every reshape.
    assert torch.linalg.matrix_rank(signs.reshape(12, 8)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transform_keeps_leading_shape_dtype_and_gradient(dtype: torch.dtype) -> None:
    factors = random_hadamard_factors(48, generator())
    x = torch.randn(2, 3, 48, generator=generator(), dtype=torch.float64).to(dtype).requires_grad_()
    y = hadamard_transform(x, factors)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    # Two products, each rounding its factor, its sum and its result.
    tolerance = 16 * torch.finfo(dtype).eps
    dense = kron_reference(factors)
    assert y.shape == x.shape
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ dense, rtol=0, atol=tolerance)
    expected = dense.sum(dim=1).expand_as(x)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_transform_accepts_no_rows() -> None:
    assert hadamard_transform(torch.empty(0, 12), hadamard_factors(12)).shape == (0, 12)


def test_errors_name_the_sizes() -> None:
    with pytest.raises(ValueError, match=r"width 10 .* size 12$"):
        hadamard_transform(torch.zeros(1, 10), hadamard_factors(12))
    for n in (0, -8):
        with pytest.raises(ValueError, match=f"at least 1, got {n}$"):
            hadamard_factors(n)


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (2, 1), (16, 1), (64, 1), (96, 3)])
def test_signs_of_a_sylvester_matrix_rebuild_it(n: int, blocks: int) -> None:
    order = n // blocks
    plain = block_hadamard_factors(n, order) if blocks > 1 else random_hadamard_factors(n, generator(n))
    columns = [torch.randint(2, (len(f),), generator=generator(3)) * 2.0 - 1 for f in (plain.left, plain.right)]
    left, right = (factor * signs for factor, signs in zip((plain.left, plain.right), columns, strict=True))
    factors = HadamardFactors(left, right, plain.construction, blocks)
    found = factors.sylvester_signs()
    assert found is not None
    sylvester = torch.from_numpy(scipy.linalg.hadamard(order)).double() * order**-0.5
    rebuilt = torch.block_diag(*blocks * [found[0][:, None] * sylvester * found[1]])
    torch.testing.assert_close(factors.dense(), rebuilt, rtol=0, atol=1e-15)


@pytest.mark.parametrize("n", [12, 96, 576, 1536, 43])
def test_other_matrices_have_no_such_signs(n: int) -> None:
    assert hadamard_factors(n).sylvester_signs() is None
    # Of a power of two, but another Hadamard matrix.
    swapped = torch.kron(torch.eye(2), torch.ones(1, 1)).double()
    assert HadamardFactors(swapped, torch.ones(1, 1).double(), "").sylvester_signs() is None
