"""The sparse side: the largest numbers of each row, in a matrix of zeros, against numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import GPTQ, Mixed, Moments, Needs, Side, Sparse, Uniform
from kurtail_pl.stages.quantization.weights import Notes, WeightSolver
from kurtail_pl.surgery.linear import QuantizedLinear, side_buffers

NONE = Moments(None, None)


def weight_of(rows: int = 24, columns: int = 64) -> Tensor:
    """With heavy tails."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) ** 3


def nothing(rest: Tensor) -> Tensor:
    return torch.zeros_like(rest)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.05, 3), (0.5, 32)])
def test_the_largest_numbers_of_each_row(share: float, count: int) -> None:
    weight, side = weight_of(), Sparse(share)
    tensors = side.fitted(weight, NONE, nothing)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == dict(side.buffers(24, 64))
    expected = np.zeros((24, 64))
    for row, values in enumerate(weight.half().double().numpy()):
        largest = np.argsort(-np.abs(weight[row].numpy()))[:count]
        expected[row, largest] = values[largest]
    found = side.dense(tensors, 64)
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), expected)
    x = torch.randn(2, 5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(side.product(x, tensors).numpy(), x.numpy() @ expected.T, rtol=1e-12, atol=1e-12)


def test_wide_rows_have_wide_places() -> None:
    weight = torch.zeros(2, 40000)
    weight[0, 39999] = weight[1, 35000] = -3.0
    tensors = Sparse(0.00001).fitted(weight, NONE, nothing)
    assert tensors["index"].dtype == torch.int32 == Sparse(0.00001).buffers(2, 40000)["index"].dtype
    assert tensors["index"].tolist() == [[39999], [35000]]
    assert torch.equal(Sparse(0.00001).dense(tensors, 40000).float(), weight)


def test_several_linears_have_the_rows_of_one_side() -> None:
    """The rounded rest and the side make up the weight, and each linear computes with its own rows."""
    notes = Notes(errors={}, fallbacks=[], borrowers=[], expert_tokens={})
    solver = WeightSolver(GPTQ(), None, Sparse(0.05), notes)
    weights = {name: weight_of(rows, 64) * scale for name, rows, scale in (("a", 8, 1.0), ("b", 16, 2.0))}
    linears = {}
    for name, weight in weights.items():
        plain = nn.Linear(64, len(weight), bias=False)
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        linears[name] = QuantizedLinear(plain, None, None)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(2))
    moments = Moments(x.double().T @ x.double(), None)
    solver.take_side(linears, moments, Mixed(2.5, 8))
    solver.pack(linears, moments, Mixed(2.5, 8))
    for name, linear in linears.items():
        side = Sparse(0.05).dense(linear.side_tensors(), 64)
        assert torch.equal((side != 0).sum(1), torch.full((len(side),), 3))
        expected = x.double() @ (linear.dense_weight().double() + side).T
        torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-3)
        assert (expected - x.double() @ weights[name].double().T).norm() < 0.4 * expected.norm()
    assert side_buffers(list(linears.values()), Sparse(0.05))["index"].shape == (24, 3)


def test_what_is_left_loses_less() -> None:
    """Heavy tails in 2 bits: without its outliers a group has finer steps."""
    weight, weights = weight_of(), Uniform(2, False, group_size=16)

    def lost(share: float) -> float:
        rest = weight - Sparse(share).dense(Sparse(share).fitted(weight, NONE, nothing), 64).float()
        return float((weights.values(weights.nearest(rest)) - rest).square().sum())

    plain = float((weights.values(weights.nearest(weight)) - weight).square().sum())
    assert lost(0.1) < lost(0.02) < plain


def test_settings() -> None:
    assert Sparse().needs == Needs.NOTHING
    assert Side.from_dict(Sparse(0.01).to_dict()) == Sparse(0.01)
    assert Sparse(0.005).sentence().startswith("0.5 % of the weights in 16 bits")
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ConfigError, match=f"side.share is {share}; give a number above 0 and below 1"):
            Sparse(share)
