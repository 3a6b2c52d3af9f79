"""The quantized linear against rotation, per-token quantizer and weight written out in float64; its packed state."""

import pytest
import torch
from torch import Tensor, nn

from kurtail_pl.maths.clip import Clip
from kurtail_pl.maths.hadamard import HadamardFactors, random_hadamard_factors
from kurtail_pl.maths.normal_grid import normal_levels
from kurtail_pl.maths.quantizers import Grid, Quantized, Quantizer
from kurtail_pl.maths.weights import round_to_nearest, search_grid
from kurtail_pl.methods import LowRank, Normal, Uniform
from kurtail_pl.surgery.linear import QuantizedLinear, put_side

IN, OUT = 48, 10
WEIGHTS = [
    Uniform(4),
    Uniform(4, group_size=12),
    Uniform(3),
    Uniform(4, symmetric=False),
    Uniform(4, symmetric=False, group_size=16),
    Uniform(8),
    Uniform(8, symmetric=False, group_size=24),
]


def linear(inputs: int = IN, bias: bool = True) -> nn.Linear:
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(inputs, OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(torch.randn(OUT, inputs, generator=draw))
    if bias:
        layer.bias.copy_(torch.randn(OUT, generator=draw))
    return layer


def rows(inputs: int = IN) -> Tensor:
    return torch.randn(2, 5, inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def codes_of(layer: nn.Linear, weights: Uniform) -> Quantized:
    """Codes on a grid of the layer's dtype (the search gives float32)."""
    scale, zero_point = search_grid(layer.weight, weights.quantizer)
    zero_point = None if zero_point is None else zero_point.to(layer.weight)
    return round_to_nearest(layer.weight, Grid(scale.to(layer.weight), zero_point), weights.quantizer)


def dense(quantized: Quantized) -> Tensor:
    """Every weight by itself: (code - zero point) * scale of its group."""
    codes, (scale, zero) = quantized
    size = codes.shape[1] // scale.shape[1]
    values = torch.empty(codes.shape, dtype=torch.float64)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            offset = 0 if zero is None else zero[i, j // size].item()
            values[i, j] = (codes[i, j].item() - offset) * scale[i, j // size].item()
    return values


def per_token(x: Tensor, bits: int, ratio: float) -> Tensor:
    """Symmetric, a scale for each token."""
    flat = x.reshape(-1, x.shape[-1])
    top = 2 ** (bits - 1) - 1
    out = torch.empty_like(flat)
    for token, row in enumerate(flat):
        scale = ratio * row.abs().max() / top
        out[token] = torch.clamp(torch.round(row / scale), -top - 1, top) * scale
    return out.reshape(x.shape)


def factors(inputs: int = IN) -> HadamardFactors:
    return random_hadamard_factors(inputs, torch.Generator().manual_seed(2))


@pytest.mark.parametrize("quantizer", WEIGHTS, ids=str)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_forward_is_rotate_quantize_multiply(quantizer: Uniform, rotated: bool, bits: int | None) -> None:
    layer, x = linear(), rows()
    quantized = codes_of(layer, quantizer)
    activations = None if bits is None else Quantizer(bits, clip=Clip(amount=0.9))
    module = QuantizedLinear(layer, factors() if rotated else None, activations)
    module.pack(quantized, quantizer)
    inputs = x @ factors().dense() if rotated else x
    if bits is not None:
        inputs = per_token(inputs, bits, 0.9)
    expected = inputs @ dense(quantized).T + layer.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(module.prepare(x), inputs, rtol=1e-11, atol=1e-11)


def test_a_float_weight_stays_float() -> None:
    layer, x = linear(), rows()
    assert torch.equal(QuantizedLinear(layer, None, None)(x), layer(x))
    module = QuantizedLinear(layer, None, None)
    assert module.weight is layer.weight
    assert set(module.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("quantizer", "codes", "scale", "zero_point"),
    [
        (Uniform(4), (OUT, IN // 2), (OUT, 1), None),
        (Uniform(2), (OUT, IN // 4), (OUT, 1), None),
        (Uniform(3), (OUT, 3 * IN // 8), (OUT, 1), None),
        (Uniform(4, group_size=12), (OUT, IN // 2), (OUT, 4), None),
        (Uniform(4, symmetric=False, group_size=8), (OUT, IN // 2), (OUT, 6), (OUT, 6)),
        (Uniform(8), (OUT, IN), (OUT, 1), None),
        (Uniform(5, symmetric=False), (OUT, 5 * IN // 8), (OUT, 1), (OUT, 1)),
    ],
    ids=str,
)
def test_state(
    quantizer: Uniform, codes: tuple[int, int], scale: tuple[int, int], zero_point: tuple[int, int] | None
) -> None:
    layer = linear().float()
    packed, expecting = (QuantizedLinear(layer, factors(), None) for _ in range(2))
    packed.pack(codes_of(layer, quantizer), quantizer)
    expecting.expect_codes(quantizer)
    for state in (packed.state_dict(), expecting.state_dict()):
        names = {"codes", "scale", "bias"} | (set() if zero_point is None else {"zero_point"})
        assert set(state) == names
        assert state["codes"].shape == codes
        assert state["codes"].dtype == (torch.int8 if quantizer.bits == 8 and quantizer.symmetric else torch.uint8)
        assert state["scale"].shape == scale
        assert state["scale"].dtype == torch.float32
        if zero_point is not None:
            assert state["zero_point"].shape == zero_point
            assert state["zero_point"].dtype == torch.uint8


@pytest.mark.parametrize("quantizer", WEIGHTS, ids=str)
@pytest.mark.parametrize("inputs", [IN, 144])
def test_codes_travel_through_the_state(quantizer: Uniform, inputs: int) -> None:
    layer, x = linear(inputs), rows(inputs)
    packed, other = QuantizedLinear(layer, None, None), QuantizedLinear(linear(inputs), None, None)
    packed.pack(codes_of(layer, quantizer), quantizer)
    other.expect_codes(quantizer)
    other.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(other.dense_weight(), dense(codes_of(layer, quantizer)))
    assert torch.equal(other(x), packed(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_odd_width_takes_a_byte_for_each_code(symmetric: bool) -> None:
    layer, quantizer, x = linear(43), Uniform(4, symmetric), rows(43)
    quantized = codes_of(layer, quantizer)
    module, other = (QuantizedLinear(layer, None, None) for _ in range(2))
    module.pack(quantized, quantizer)
    assert module.codes.shape == (OUT, 43)
    torch.testing.assert_close(module(x), x @ dense(quantized).T + layer.bias, rtol=1e-12, atol=1e-12)
    other.expect_codes(quantizer)
    assert {k: (v.shape, v.dtype) for k, v in other.state_dict().items() if k == "codes"} == {
        "codes": (module.codes.shape, module.codes.dtype)
    }


def test_no_bias() -> None:
    layer, x = linear(bias=False), rows()
    module = QuantizedLinear(layer, None, None)
    module.pack(codes_of(layer, Uniform(4)), Uniform(4))
    assert set(module.state_dict()) == {"codes", "scale"}
    torch.testing.assert_close(module(x), x @ dense(codes_of(layer, Uniform(4))).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quantizer", WEIGHTS, ids=str)
def test_unpacked_weights_give_the_same_bits(quantizer: Uniform) -> None:
    layer, x = linear().float(), rows().float()
    module = QuantizedLinear(layer, None, Quantizer(4, group_size=IN // 2))
    module.pack(codes_of(layer, quantizer), quantizer)
    expected = module(x)
    module.unpack()
    assert set(module.state_dict()) == {"weight", "bias"}
    assert torch.equal(module(x), expected)


def test_a_subtracted_centre_changes_nothing_without_quantizers() -> None:
    layer, x = linear(), rows()
    module = QuantizedLinear(layer, factors(), None)
    before, bias = module(x), layer.bias.clone()
    module.subtract(torch.randn(IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    torch.testing.assert_close(module(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_a_centre_is_subtracted_before_the_quantizer_and_added_by_the_bias(bias: bool) -> None:
    """Rows of one sign, which a symmetric quantizer serves badly: the centre takes the offset out."""
    layer, x, centre = linear(bias=bias), rows() + 7, torch.full((IN,), 6.5, dtype=torch.float64)
    quantized = codes_of(layer, Uniform(4))
    module = QuantizedLinear(layer, None, Quantizer(4, clip=Clip(amount=0.9)))
    module.subtract(centre)
    module.pack(quantized, Uniform(4))
    expected = per_token(x - centre, 4, 0.9) @ dense(quantized).T + centre @ layer.weight.T
    torch.testing.assert_close(module(x), expected + layer.bias if bias else expected, rtol=1e-11, atol=1e-11)


def test_a_centre_travels_through_the_state() -> None:
    layer, x = linear(bias=False), rows()
    packed, other = (QuantizedLinear(layer, None, Quantizer(8)) for _ in range(2))
    for module, centre in ((packed, x[0, 0]), (other, torch.zeros(IN, dtype=torch.float64))):
        module.subtract(centre)
        module.pack(codes_of(layer, Uniform(4)), Uniform(4))
    assert set(packed.state_dict()) == {"centre", "bias", "codes", "scale"}
    other.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(other(x), packed(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fixed_grid_serves_every_token(symmetric: bool) -> None:
    """After rotation and centring, value by value; a token ten times as large is clipped at the ends of the grid."""
    layer, x, centre = linear(), rows(), torch.linspace(-1, 1, IN, dtype=torch.float64)
    x[0, 1] *= 10
    scale, zero, low, high = 0.3, 0 if symmetric else 6, -8 if symmetric else 0, 7 if symmetric else 15
    module = QuantizedLinear(layer, factors(), Quantizer(4, symmetric, Clip(amount=0.5)))
    module.subtract(centre)
    point = torch.tensor([scale], dtype=torch.float64)
    module.fix_grid(Grid(point, None if symmetric else torch.tensor([float(zero)], dtype=torch.float64)))
    inputs = x @ factors().dense() - centre
    values = [(min(max(round(v / scale) + zero, low), high) - zero) * scale for v in inputs.flatten().tolist()]
    expected = torch.tensor(values, dtype=torch.float64).view_as(inputs)
    assert expected.unique().numel() == 16
    torch.testing.assert_close(module.prepare(x), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(module(x), expected @ layer.weight.T + module.bias, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_fixed_grid_travels_through_the_state(symmetric: bool) -> None:
    layer, x = linear(bias=False).float(), rows().float()
    packed, other = (QuantizedLinear(layer, None, Quantizer(4, symmetric)) for _ in range(2))
    for module, scale, zero in ((packed, 0.37, 5.0), (other, 1.0, 0.0)):
        module.fix_grid(Grid(torch.tensor([scale]), None if symmetric else torch.tensor([zero])))
    state = packed.state_dict()
    assert set(state) == {"weight", "input_scale"} | (set() if symmetric else {"input_zero_point"})
    assert state["input_scale"].dtype == torch.float32
    assert symmetric or state["input_zero_point"].dtype == torch.uint8
    assert not torch.equal(other(x), packed(x))
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), packed(x))
    assert other.prepare(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group_size", [None, 12])
def test_levels_of_the_normal_distribution(bits: int, group_size: int | None) -> None:
    """Every weight by itself: the level that its code numbers, times the scale of its group."""
    layer, x, quantizer = linear(), rows(), Normal(bits, group_size)
    packed, other, unpacked = (QuantizedLinear(layer, factors(), Quantizer(8)) for _ in range(3))
    quantized = quantizer.nearest(layer.weight)
    packed.pack(quantized, quantizer)
    size = group_size or IN
    levels, codes, scale = normal_levels(bits).tolist(), quantized.codes.tolist(), quantized.grid.scale.tolist()
    values = [[levels[codes[i][j]] * scale[i][j // size] for j in range(IN)] for i in range(OUT)]
    weight = torch.tensor(values, dtype=torch.float64)
    expected = per_token(x @ factors().dense(), 8, 1.0) @ weight.T + layer.bias
    torch.testing.assert_close(packed(x), expected, rtol=1e-11, atol=1e-11)
    state = packed.state_dict()
    assert set(state) == {"bias", "codes", "scale"}
    assert state["codes"].shape == (OUT, IN * bits // 8)
    stored, expecting = (QuantizedLinear(linear().float(), None, None) for _ in range(2))
    stored.pack(quantizer.nearest(layer.weight.float()), quantizer)
    expecting.expect_codes(quantizer)
    assert {name: (t.shape, t.dtype) for name, t in expecting.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in stored.state_dict().items()
    }
    other.expect_codes(quantizer)
    other.load_state_dict(state, assign=True)
    unpacked.pack(quantized, quantizer)
    unpacked.unpack()
    assert torch.equal(other(x), packed(x))
    assert torch.equal(unpacked(x), packed(x))


@pytest.mark.parametrize("centred", [False, True])
def test_a_side_reads_what_the_quantizer_reads_before_it_is_rounded(centred: bool) -> None:
    """``Q(x H - c) Q(R)^T + (x H - c) (U V)^T + b``, all in float64."""
    layer, x, draw = linear(), rows(), torch.Generator().manual_seed(3)
    down, up = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, IN), (OUT, 2)))
    module = QuantizedLinear(layer, factors(), Quantizer(4, clip=Clip(amount=0.9)))
    turned, bias = x @ factors().dense(), layer.bias
    if centred:
        centre = torch.randn(IN, generator=draw, dtype=torch.float64)
        module.subtract(centre)
        turned, bias = turned - centre, layer.bias + layer.weight @ centre
    put_side([module], LowRank(2), {"down": down, "up": up})
    module.weight = nn.Parameter(layer.weight - up @ down, requires_grad=False)
    # Without quantizers, the layer behind the rotation.
    module.activations, activations = None, module.activations
    torch.testing.assert_close(module(x), x @ factors().dense() @ layer.weight.T + layer.bias, rtol=1e-11, atol=1e-11)
    module.activations = activations
    quantized = round_to_nearest(module.weight.data, search_grid64(module.weight.data), Quantizer(4))
    module.pack(quantized, Uniform(4))
    expected = per_token(turned, 4, 0.9) @ dense(quantized).T + turned @ (up @ down).T + bias
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)
    module.unpack()
    torch.testing.assert_close(module(x), expected, rtol=1e-11, atol=1e-11)


def search_grid64(weight: Tensor) -> Grid:
    return Grid(search_grid(weight, Quantizer(4)).scale.to(weight), None)


def test_linears_that_read_the_same_hold_what_they_share_once() -> None:
    modules = [QuantizedLinear(linear(), None, None) for _ in range(3)]
    draw = torch.Generator().manual_seed(3)
    down, up = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((2, IN), (3 * OUT, 2)))
    put_side(modules, LowRank(2), {"down": down, "up": up})
    names = [set(module.state_dict()) - {"weight", "bias"} for module in modules]
    assert names == [{"side_down", "side_up"}, {"side_up"}, {"side_up"}]
    assert len({module.state_dict()["side_up"].untyped_storage().data_ptr() for module in modules}) == 3
    assert [name for name, _ in nn.ModuleList(modules).named_modules()] == ["", "0", "1", "2"]
    for module, part in zip(modules, up.split(OUT), strict=True):
        expected = rows() @ (linear().weight + part @ down).T + linear().bias
        torch.testing.assert_close(module(rows()), expected, rtol=1e-11, atol=1e-11)
