"""GPTQ against a float64 loop without blocks or factors: one column at a time, a fresh inverse for those to come."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.gptq import Settings, gptq
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer, dequantize
from kurtail_pl.maths.weights import round_to_nearest, search_grid
from kurtail_pl.methods import GPTQ
from kurtail_pl.stages.meter import Meter, resident_memory


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_inputs(rows: int, channels: int, seed: int = 0) -> Tensor:
    """Inputs ``[rows, channels]`` that share a few directions, with channels of different size."""
    shared = random(rows, channels // 4, seed=seed) @ random(channels // 4, channels, seed=seed + 1)
    return (shared + random(rows, channels, seed=seed + 2)) * random(channels, seed=seed + 3).exp()


def per_weight(grid: Grid, inputs: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every single weight, float64 ``[out, in]``."""
    repeat = inputs // grid.scale.shape[1]
    zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point
    return grid.scale.double().repeat_interleave(repeat, 1), zero.double().repeat_interleave(repeat, 1)


def textbook(
    weight: Tensor, hessian: Tensor, grid: Grid, quantizer: Quantizer, settings: GPTQ, lost: Tensor | None = None
) -> Tensor:
    """Codes by optimal brain quantization in a fixed order (GPTQ paper, Eq. 2 and 3).

    With `lost`, ``(X - Y)^T Y``, GPTAQ: what a column's inputs lost, times its weight, is made up for by the columns to
    come, by least squares, a quarter of it. FOEM: the best step if the gradient is 0.2 (w - w0) H in its column.
    """
    weight, inputs = weight.double().clone(), weight.shape[1]
    original = weight.clone()
    scale, zero = per_weight(grid, inputs)
    bits = quantizer.bits
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if quantizer.symmetric else (0, 2**bits - 1)
    diagonal = hessian.diagonal().tolist()
    order = list(range(inputs))
    if settings.act_order:
        order.sort(key=lambda j: -diagonal[j])
    damped = hessian + settings.percdamp * sum(diagonal) / inputs * torch.eye(inputs).double()
    codes = torch.zeros_like(weight)
    for position, j in enumerate(order):
        left = order[position:]
        inverse = torch.linalg.inv(damped[left][:, left])
        if settings.correction == "foem":
            weight[:, j] -= 0.2 * (weight[:, j] - original[:, j])
        codes[:, j] = ((weight[:, j] / scale[:, j]).round() + zero[:, j]).clamp(low, high)
        error = weight[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]
        if settings.correction == "foem":
            error -= 0.2 * (weight[:, j] - original[:, j])
        made_up = torch.zeros_like(weight)
        if lost is not None and len(left) > 1:
            later = left[1:]
            least_squares = torch.linalg.solve(damped[later][:, later], lost[j, later])
            made_up[:, later] = 0.25 * torch.outer(weight[:, j], least_squares)
        weight[:, left] -= torch.outer(error / inverse[0, 0], inverse[0])
        weight += made_up
    return codes


def output_error(weight: Tensor, values: Tensor, inputs: Tensor) -> float:
    return float(torch.linalg.norm(inputs @ (weight.double() - values.double()).T))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"),
    [(4, True, None), (4, False, None), (4, True, 25), (3, False, 50), (2, True, 10)],
)
@pytest.mark.parametrize("block_size", [1, 64, 128, 1000])
def test_codes_equal_the_textbook_loop(
    bits: int, symmetric: bool, group_size: int | None, act_order: bool, block_size: int
) -> None:
    inputs = 150  # no multiple of 64 or 128
    quantizer = Quantizer(bits, symmetric, group_size=group_size)
    settings = GPTQ(block_size=block_size, act_order=act_order)
    weight, x = random(24, inputs, seed=9).float(), correlated_inputs(400, inputs)
    grid = search_grid(weight, quantizer)
    quantized = gptq(weight, x.T @ x, grid, quantizer, settings)
    assert quantized.codes.dtype == (torch.int8 if symmetric else torch.uint8)
    assert torch.equal(quantized.grid.scale, grid.scale)
    expected = textbook(weight, x.T @ x, grid, quantizer, settings)
    # A tie decided otherwise in float32 also moves later codes of its row.
    assert (quantized.codes != expected).double().mean().item() < 1e-3


def lossy_inputs(rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Inputs, and the same as a layer reads them behind quantized ones: shrunk, on a coarse grid."""
    x = correlated_inputs(rows, channels)
    step = x.std(0) / 1.5
    return x, (0.9 * x / step).round() * step


@pytest.mark.parametrize("correction", ["gptaq", "foem"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("quantizer", [Quantizer(4), Quantizer(3, False, group_size=50)], ids=str)
@pytest.mark.parametrize("block_size", [1, 64, 1000])
def test_corrected_codes_equal_the_textbook_loop(
    correction: Any, act_order: bool, quantizer: Quantizer, block_size: int
) -> None:
    settings = GPTQ(block_size=block_size, act_order=act_order, correction=correction)
    weight, (x, y) = random(24, 150, seed=9).float(), lossy_inputs(400, 150)
    grid, lost = search_grid(weight, quantizer), (x - y).T @ y if correction == "gptaq" else None
    codes = gptq(weight, y.T @ y, grid, quantizer, settings, x.T @ y).codes
    expected = textbook(weight, y.T @ y, grid, quantizer, settings, lost)
    assert (codes != expected).double().mean().item() < 1e-3
    # Without the correction they are told apart.
    plain = textbook(weight, y.T @ y, grid, quantizer, replace(settings, correction=None))
    assert (codes != plain).double().mean().item() > 0.03


@pytest.mark.parametrize("act_order", [True, False])
def test_gptaq_with_the_inputs_of_the_float_model_is_gptq(act_order: bool) -> None:
    weight, x = random(24, 150, seed=9).float(), correlated_inputs(400, 150)
    grid, hessian = search_grid(weight, Quantizer(4)), x.T @ x
    settings = GPTQ(act_order=act_order)
    expected = gptq(weight, hessian, grid, Quantizer(4), settings).codes
    found = gptq(weight, hessian, grid, Quantizer(4), replace(settings, correction="gptaq"), hessian.clone()).codes
    assert torch.equal(found, expected)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptaq_brings_outputs_nearer_to_the_float_models(bits: int, act_order: bool) -> None:
    weight, (x, y) = random(24, 150, seed=9).float(), lossy_inputs(400, 150)
    grid, settings = search_grid(weight, Quantizer(bits)), GPTQ(act_order=act_order)
    errors = {}
    for correction in (None, "gptaq"):
        asked = replace(settings, correction=correction)
        values = dequantize(gptq(weight, y.T @ y, grid, Quantizer(bits), asked, x.T @ y)).double()
        errors[correction] = torch.linalg.norm(x @ weight.double().T - y @ values.T).item()
    assert errors["gptaq"] < 0.97 * errors[None]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("inputs", [96, 300])
def test_a_float32_hessian_gives_the_codes_of_the_textbook_loop(inputs: int, act_order: bool) -> None:
    """In float32 throughout, of inputs whose damped Hessian has a condition of thousands."""
    x = correlated_inputs(400, inputs)
    hessian = x.T @ x
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(inputs).double()
    assert torch.linalg.cond(damped) > 2e3
    settings, weight = GPTQ(act_order=act_order), random(24, inputs, seed=9).float()
    grid = search_grid(weight, Quantizer(4))
    quantized = gptq(weight, hessian.float(), grid, Quantizer(4), settings)
    expected = textbook(weight, hessian, grid, Quantizer(4), settings)
    assert (quantized.codes != expected).double().mean().item() < 5e-3
    # What differs is a matter of ties: the outputs are as good.
    exact = output_error(weight, dequantize(Quantized(expected.to(torch.int8), grid)), x)
    assert output_error(weight, dequantize(quantized), x) == pytest.approx(exact, rel=0.01)


def matrices_held(correction: Any) -> float:
    """Memory that GPTQ takes beside its arguments, in sizes of its Hessian."""
    inputs, settings = 3072, GPTQ(correction=correction)
    x, weight = torch.randn(64, inputs), torch.randn(32, inputs)
    hessian, grid = x.T @ x, search_grid(weight, Quantizer(4))
    cross, few = hessian.clone(), hessian[:256, :256]
    gptq(weight[:, :256], few, search_grid(weight[:, :256], Quantizer(4)), Quantizer(4), settings, few)
    before = resident_memory()
    with Meter() as meter:
        gptq(weight, hessian, grid, Quantizer(4), settings, cross)
    return (meter.peak_bytes - before) / (hessian.numel() * hessian.element_size())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize(("correction", "matrices"), [(None, 1), ("gptaq", 3)])
def test_matrices_of_the_hessians_size_that_are_held_beside_it(correction: Any, matrices: int) -> None:
    # A process of its own: where earlier tests have left holes in the heap, what is freed stays resident.
    fresh = subprocess.run([sys.executable, __file__, correction or ""], capture_output=True, text=True, check=True)
    taken = float(fresh.stdout)
    assert matrices - 0.1 < taken < matrices + 0.6


@pytest.mark.parametrize("percdamp", [1e-4, 0.3])
def test_damping_is_a_part_of_the_mean_diagonal(percdamp: float) -> None:
    quantizer, settings = Quantizer(4), GPTQ(percdamp=percdamp)
    weight, x = random(24, 48, seed=9).float(), correlated_inputs(200, 48)
    grid = search_grid(weight, quantizer)
    codes = gptq(weight, x.T @ x, grid, quantizer, settings).codes
    assert (codes != textbook(weight, x.T @ x, grid, quantizer, settings)).double().mean().item() < 1e-3
    # The other damping is told apart.
    other = textbook(weight, x.T @ x, grid, quantizer, GPTQ(percdamp=0.01))
    assert (codes != other).double().mean().item() > 1e-2


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("symmetric", "group_size"), [(True, None), (True, 16), (False, None), (False, 32)])
def test_better_than_round_to_nearest_on_correlated_inputs(
    symmetric: bool, group_size: int | None, act_order: bool
) -> None:
    quantizer = Quantizer(4, symmetric, group_size=group_size)
    weight, x = random(32, 96, seed=5).float(), correlated_inputs(500, 96)
    grid = search_grid(weight, quantizer)
    learned = dequantize(gptq(weight, x.T @ x, grid, quantizer, GPTQ(act_order=act_order)))
    plain = dequantize(round_to_nearest(weight, grid, quantizer))
    assert output_error(weight, learned, x) < 0.8 * output_error(weight, plain, x)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("correction", [None, "foem"])
@pytest.mark.parametrize("quantizer", [Quantizer(4), Quantizer(3, False, group_size=8), Quantizer(8)], ids=str)
def test_uncorrelated_inputs_give_round_to_nearest(quantizer: Quantizer, correction: Any, act_order: bool) -> None:
    weight = random(16, 40).float()
    grid = search_grid(weight, quantizer)
    expected = round_to_nearest(weight, grid, quantizer).codes
    for hessian in (torch.eye(40), torch.diag(random(40).exp())):
        codes = gptq(weight, hessian, grid, quantizer, GPTQ(16, act_order=act_order, correction=correction)).codes
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_on_the_hessian_changes_nothing(factor: float) -> None:
    weight, x = random(16, 40, seed=5).float(), correlated_inputs(200, 40)
    grid = search_grid(weight, Quantizer(4))
    first, second = (gptq(weight, f * x.T @ x, grid, Quantizer(4), GPTQ()).codes for f in (1, factor))
    assert torch.equal(first, second)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_columns_become_zero_and_do_not_disturb_the_others(symmetric: bool, act_order: bool) -> None:
    quantizer, dead = Quantizer(4, symmetric), [0, 7, 39]
    live = [j for j in range(40) if j not in dead]
    weight, x = random(16, 40, seed=5).float(), correlated_inputs(200, 40)
    x[:, dead] = 0
    grid = search_grid(weight, quantizer)
    values = dequantize(gptq(weight, x.T @ x, grid, quantizer, GPTQ(act_order=act_order)))
    assert values.isfinite().all()
    assert not values[:, dead].any()
    plain = dequantize(round_to_nearest(weight, grid, quantizer))
    assert output_error(weight, values, x) < 0.8 * output_error(weight, plain, x)
    alone = gptq(weight[:, live], (x.T @ x)[live][:, live], grid, quantizer, GPTQ(act_order=act_order))
    # Dead columns weigh in the mean of the diagonal, so the damping differs a little and with it a few codes.
    assert (values[:, live] != dequantize(alone)).double().mean().item() < 0.1


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_a_factor_on_a_hessian_with_dead_columns_changes_nothing(factor: float) -> None:
    weight, x = random(16, 40, seed=5).float(), correlated_inputs(200, 40)
    x[:, [0, 7, 39]] = 0
    grid = search_grid(weight, Quantizer(4))
    first, second = (gptq(weight, f * x.T @ x, grid, Quantizer(4), GPTQ()).codes for f in (1, factor))
    assert torch.equal(first, second)


def test_no_inputs_at_all_give_zeros() -> None:
    weight = random(4, 12).float()
    quantized = gptq(weight, torch.zeros(12, 12), search_grid(weight, Quantizer(4)), Quantizer(4), GPTQ())
    assert not quantized.codes.any()


@pytest.mark.parametrize("act_order", [True, False])
def test_fewer_inputs_than_columns_are_enough(act_order: bool) -> None:
    weight, x = random(16, 64, seed=5).float(), correlated_inputs(20, 64)
    grid = search_grid(weight, Quantizer(4))
    values = dequantize(gptq(weight, x.T @ x, grid, Quantizer(4), GPTQ(act_order=act_order)))
    plain = dequantize(round_to_nearest(weight, grid, Quantizer(4)))
    assert output_error(weight, values, x) < output_error(weight, plain, x)


def test_inputs_are_left_alone() -> None:
    weight, x = random(8, 24).float(), correlated_inputs(100, 24)
    x[:, 3] = 0
    hessian = x.T @ x
    grid = search_grid(weight, Quantizer(4, False))
    copies = [t.clone() for t in (weight, hessian, *grid) if t is not None]
    for settings in (GPTQ(), GPTQ(act_order=False)):
        gptq(weight, hessian, grid, Quantizer(4, False), settings)
    for tensor, copy in zip((weight, hessian, *grid), copies, strict=True):
        assert tensor is not None
        assert torch.equal(tensor, copy)


def test_every_tensor_is_made_on_the_device_of_the_inputs() -> None:
    weight, x = random(8, 24).float(), correlated_inputs(100, 24)
    grid = search_grid(weight, Quantizer(4))
    expected = gptq(weight, x.T @ x, grid, Quantizer(4), GPTQ()).codes
    with torch.device("meta"):  # the device of tensors that name none
        codes = gptq(weight, x.T @ x, grid, Quantizer(4), GPTQ()).codes
    assert torch.equal(codes, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_textbook_loop() -> None:
    weight, x = random(24, 150, seed=9).float(), correlated_inputs(400, 150)
    quantizer = Quantizer(4, False, group_size=25)
    grid = search_grid(weight, quantizer)
    assert grid.zero_point is not None
    on_device = Grid(grid.scale.cuda(), grid.zero_point.cuda())
    codes = gptq(weight.cuda(), (x.T @ x).cuda(), on_device, quantizer, GPTQ()).codes.cpu()
    assert (codes != textbook(weight, x.T @ x, grid, quantizer, GPTQ())).double().mean().item() < 1e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 0), ("block_size", -128), ("percdamp", 0.0), ("percdamp", -0.01), ("correction", "qronos")],
)
def test_settings_out_of_range_raise(field: str, value: Any) -> None:
    for kind, stop in ((Settings, ";"), (GPTQ, "[;:]")):
        with pytest.raises(ValueError, match=rf"^{field} is {value!r}{stop}"):
            kind(**{field: value})


def test_a_hessian_that_is_not_positive_definite_raises() -> None:
    # X^T X never is; a sum of Hessians gone wrong can be. Eigenvalues 3 and -1, damping 0.01.
    hessian = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    weight = random(3, 2).float()
    with pytest.raises(torch.linalg.LinAlgError, match="positive-definite"):  # type: ignore[attr-defined]
        gptq(weight, hessian, search_grid(weight, Quantizer(4)), Quantizer(4), GPTQ())


if __name__ == "__main__":
    sys.stdout.write(str(matrices_held(sys.argv[1] or None)))
