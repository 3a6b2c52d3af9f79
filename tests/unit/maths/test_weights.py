"""Weight grids against a float64 search over the 80 ratios, RTN against all codes, packing against its byte layout."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kurtail_pl.maths.packing import pack_codes, stored_bits, unpack_codes
from kurtail_pl.maths.quantizers import Grid, Quantizer, dequantize
from kurtail_pl.maths.weights import round_to_nearest, search_grid

RATIOS = [1 - step / 100 for step in range(80)]
SETTINGS = [
    Quantizer(4, True),
    Quantizer(3, True),
    Quantizer(4, True, group_size=16),
    Quantizer(4, False),
    Quantizer(2, False, group_size=32),
    Quantizer(8, True),
]


def weights(out: int, inputs: int, seed: int = 0) -> Tensor:
    """Heavy-tailed float64 weights: clipping pays in some rows."""
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3


def nearest(group: np.ndarray, scale: float, zero: float, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of one group, by trying every code."""
    bits = quantizer.bits
    codes = np.arange(2**bits) - (2 ** (bits - 1) if quantizer.symmetric else 0)
    grid = (codes - zero) * scale
    best = np.abs(group[:, None] - grid).argmin(-1)
    return codes[best], grid[best]


def error(group: np.ndarray, scale: float, zero: float, quantizer: Quantizer) -> float:
    return float((np.abs(nearest(group, scale, zero, quantizer)[1] - group) ** 2.4).sum())


def candidate(group: np.ndarray, ratio: float, quantizer: Quantizer) -> tuple[float, float]:
    """Scale and zero point of one group shrunk by a ratio."""
    if quantizer.symmetric:
        return ratio * float(np.abs(group).max()) / (2 ** (quantizer.bits - 1) - 1), 0.0
    low, high = ratio * min(float(group.min()), 0), ratio * max(float(group.max()), 0)
    scale = (high - low) / (2**quantizer.bits - 1)
    return scale, float(round(-low / scale))


def groups_of(weight: Tensor, grid: Grid) -> list[tuple[np.ndarray, float, float]]:
    """Each group with the scale and zero point found for it."""
    flat = weight.double().reshape(grid.scale.numel(), -1).numpy()
    scales = grid.scale.flatten().tolist()
    zeros = [0.0] * len(scales) if grid.zero_point is None else grid.zero_point.flatten().tolist()
    return list(zip(flat, scales, zeros, strict=True))


@pytest.mark.parametrize("shape", ["heavy tails", "uniform", "one-sided"])
@pytest.mark.parametrize("quantizer", SETTINGS, ids=str)
def test_search_finds_the_best_of_80_ratios(quantizer: Quantizer, shape: str) -> None:
    # The flatter a row, the sooner its search ends.
    weight = {
        "heavy tails": lambda w: w,
        "uniform": lambda w: torch.erf(w.sign() * w.abs() ** (1 / 3)),
        "one-sided": lambda w: w.abs() + 0.1,
    }[shape](weights(6, 64))
    grid = search_grid(weight, quantizer)
    assert grid.scale.shape == (6, 64 // (quantizer.group_size or 64))
    for group, scale, zero in groups_of(weight, grid):
        candidates = [candidate(group, ratio, quantizer) for ratio in RATIOS]
        errors = [error(group, *pair, quantizer) for pair in candidates]
        best = int(np.argmin(errors))
        assert (scale, zero) == pytest.approx(candidates[best], rel=1e-12)


@pytest.mark.parametrize("quantizer", SETTINGS, ids=str)
def test_search_in_float32_reaches_the_least_error(quantizer: Quantizer) -> None:
    weight = weights(6, 96, seed=1).float()
    grid = search_grid(weight, quantizer)
    assert grid.scale.dtype == torch.float32
    for group, scale, zero in groups_of(weight, grid):
        candidates = [candidate(group, ratio, quantizer) for ratio in RATIOS]
        least = min(error(group, *pair, quantizer) for pair in candidates)
        assert error(group, scale, zero, quantizer) == pytest.approx(least, rel=1e-3)
        # Never worse than not shrinking at all.
        assert error(group, scale, zero, quantizer) <= error(group, *candidates[0], quantizer) * (1 + 1e-3)


def test_search_shrinks_where_it_pays_and_not_where_it_does_not() -> None:
    spread = torch.linspace(-1, 1, 15).repeat(32)  # 15 values on the grid: no error at ratio 1
    outlier = weights(1, 480)[0].float()
    scale = search_grid(torch.stack([spread, outlier]), Quantizer(4)).scale[:, 0]
    assert scale[0].item() == pytest.approx(1 / 7)
    assert scale[1].item() < 0.9 * outlier.abs().max().item() / 7


def test_search_ends_at_ratio_021() -> None:
    # Many values within [-1, 1] and one of 10: clipping the outlier to 1 would be best, were the search to get there.
    weight = torch.linspace(-1, 1, 1 << 16)[None].double()
    weight[0, 0] = 10
    assert search_grid(weight, Quantizer(4)).scale.item() == pytest.approx(0.21 * 10 / 7, rel=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_searched_each_on_its_own_however_they_are_split(symmetric: bool) -> None:
    # 2^18 weights are searched at a time: here 2 rows, then 1.
    weight = weights(3, 1 << 17).float()
    quantizer = Quantizer(2, symmetric)
    grid = search_grid(weight, quantizer)
    assert grid.scale.shape == (3, 1)
    for row, (scale, zero) in zip(weight, ((s, z) for _, s, z in groups_of(weight, grid)), strict=True):
        low, high = row.min().item(), row.max().item()
        limit = max(-low, high)
        ratio = scale / (limit if symmetric else (high - low) / 3)
        assert min(abs(ratio - r) for r in RATIOS) < 1e-5
        assert zero == (0 if symmetric else round(-low / (high - low) * 3))


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_get_scale_one(symmetric: bool) -> None:
    weight = weights(3, 32).float()
    weight[1] = 0
    quantizer = Quantizer(4, symmetric)
    grid = search_grid(weight, quantizer)
    quantized = round_to_nearest(weight, grid, quantizer)
    assert grid.scale[1].item() == 1
    assert grid.scale.isfinite().all()
    assert not dequantize(quantized)[1].any()


@pytest.mark.parametrize("quantizer", SETTINGS, ids=str)
def test_round_to_nearest_tries_every_code(quantizer: Quantizer) -> None:
    weight = weights(6, 64)
    grid = search_grid(weight, quantizer)
    quantized = round_to_nearest(weight, grid, quantizer)
    assert quantized.codes.shape == weight.shape
    assert quantized.codes.dtype == (torch.int8 if quantizer.symmetric else torch.uint8)
    expected = [nearest(*group, quantizer) for group in groups_of(weight, grid)]
    assert np.array_equal(quantized.codes.flatten().numpy(), np.concatenate([codes for codes, _ in expected]))
    values = torch.from_numpy(np.concatenate([values for _, values in expected])).reshape(6, 64)
    torch.testing.assert_close(dequantize(quantized), values, rtol=1e-12, atol=0)


def test_inputs_are_left_alone() -> None:
    weight = weights(4, 32).float()
    before = weight.clone()
    for quantizer in (Quantizer(4), Quantizer(4, False), Quantizer(4, group_size=1)):
        round_to_nearest(weight, search_grid(weight, quantizer), quantizer)
        assert torch.equal(weight, before)


@pytest.mark.parametrize("signed", [True, False])
def test_packing_round_trip_for_every_pair_of_codes(signed: bool) -> None:
    values = torch.arange(-8, 8, dtype=torch.int8) if signed else torch.arange(16, dtype=torch.uint8)
    codes = torch.cartesian_prod(values, values)
    packed = pack_codes(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (256, 1)
    assert len(set(packed.flatten().tolist())) == 256
    unpacked = unpack_codes(packed, signed)
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)


def test_low_nibble_holds_the_first_half() -> None:
    signed = torch.tensor([[1, -1, 7, -8], [0, 2, -2, 3]], dtype=torch.int8)
    assert pack_codes(signed).tolist() == [[0x71, 0x8F], [0xE0, 0x32]]
    unsigned = torch.tensor([1, 15, 9, 7, 8, 0], dtype=torch.uint8)
    assert pack_codes(unsigned).tolist() == [0x71, 0x8F, 0x09]
    assert unpack_codes(torch.tensor([0x71, 0x8F], dtype=torch.uint8), signed=True).tolist() == [1, -1, 7, -8]
    assert unpack_codes(torch.tensor([0x71, 0x8F], dtype=torch.uint8), signed=False).tolist() == [1, 15, 7, 8]


def test_packing_keeps_leading_dimensions() -> None:
    codes = torch.randint(-8, 8, (2, 3, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    assert pack_codes(codes).shape == (2, 3, 5)
    assert torch.equal(unpack_codes(pack_codes(codes), signed=True), codes)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 8))
def test_every_bit_of_a_code_has_its_place_in_a_byte(bits: int, signed: bool) -> None:
    """Against planes of 4, 2 and 1 bits, cut by Python's integers; bytes are as few as the bits fill."""
    draw, n = torch.Generator().manual_seed(bits), 48
    codes = torch.randint(0, 1 << bits, (3, n), generator=draw) - ((1 << bits - 1) if signed else 0)
    expected = []
    for row in codes.tolist():
        low, packed = 0, []
        for width in (4, 2, 1):
            if bits & width:
                part, per = [(code >> low) % (1 << width) for code in row], 8 // width
                step = n // per
                packed += [sum(part[j + step * k] << width * k for k in range(per)) for j in range(step)]
                low += width
        expected.append(packed)
    kept = codes.to(torch.int8 if signed else torch.uint8)
    packed = pack_codes(kept, bits)
    assert packed.tolist() == expected
    assert packed.shape == (3, n * bits // 8)
    unpacked = unpack_codes(packed, signed, bits)
    assert unpacked.dtype == kept.dtype
    assert torch.equal(unpacked, kept)


@pytest.mark.parametrize(
    ("count", "widths"),
    [(576, [2, 3, 4, 5, 6, 7, 8]), (172, [2, 4, 4, 6, 6, 8, 8]), (6, [4, 4, 4, 8, 8, 8, 8]), (7, [8] * 7)],
)
def test_rows_that_fill_no_bytes_take_more_bits(count: int, widths: list[int]) -> None:
    assert [stored_bits(bits, count) for bits in range(2, 9)] == widths


@pytest.mark.parametrize(("bits", "n", "of"), [(4, 1, 2), (4, 7, 2), (2, 6, 4), (3, 172, 8)])
def test_packing_what_fills_no_bytes_raises(bits: int, n: int, of: int) -> None:
    with pytest.raises(ValueError, match=rf"{bits} bits .* multiple of {of} codes .* got {n}$"):
        pack_codes(torch.zeros(2, n, dtype=torch.int8), bits)
