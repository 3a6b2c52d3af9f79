"""Folds of a whole transformers model: its logits stay, in float64 and in float32; the gate sees wrong folds."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kurtail_pl.errors import GateError, NotFinite
from kurtail_pl.maths.hadamard import random_hadamard
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.stages.meter import Meter, resident_memory
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.equip import equip_model
from kurtail_pl.surgery.families import LLAMA
from kurtail_pl.surgery.gate import FLOAT32_TOLERANCE, FLOAT64_TOLERANCE, check, use_exact_norm
from kurtail_pl.surgery.rotations import Rotations, random_rotations

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))


def exact_model(folder: Path) -> PreTrainedModel:
    """transformers' model in float64, norms included, the head untied."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())
    for layer in model.model.layers:
        for norm in (LLAMA.attention_norm, LLAMA.mlp_norm):
            use_exact_norm(layer, norm, model.config.rms_norm_eps)
    use_exact_norm(model, LLAMA.final_norm, model.config.rms_norm_eps)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def change(reference: Tensor, value: Tensor) -> float:
    return ((value.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def fold_norms(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        folding.fold_layer_norms(layer, LLAMA)
    folding.fold_norm(model.model.norm, [model.lm_head])


def rotate_residual(model: PreTrainedModel, rotation: Tensor) -> None:
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data @ rotation
    for layer in model.model.layers:
        folding.rotate_residual(layer, LLAMA, rotation)
    folding.rotate_input(model.lm_head, rotation)


def rotate_values(model: PreTrainedModel, rotation: Tensor) -> None:
    for layer, per_layer in zip(model.model.layers, rotation, strict=True):
        folding.rotate_values(layer, LLAMA, per_layer)


def rotate_online(model: PreTrainedModel, rotations: Rotations) -> None:
    for layer in model.model.layers:
        for name, factors in ((LLAMA.output, rotations.attention_output), ("mlp.down_proj", rotations.mlp_hidden)):
            if factors is not None:
                folding.absorb_online(folding.linear_of(layer, name), factors)
    equip_model(model, FLOAT, rotations)


def per_head(seed: int) -> Tensor:
    """R2 of its own for each of 4 layers and 2 KV heads."""
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.stack([random_hadamard(16, draw) for _ in range(2)]) for _ in range(4)])


def scale_keys(model: PreTrainedModel) -> None:
    """Channels i and i + 8 of a head alike: RoPE turns them together."""
    draw = torch.Generator().manual_seed(4)
    for layer in model.model.layers:
        scale = torch.rand(2, 8, generator=draw, dtype=torch.float64) + 0.5
        folding.scale_keys(layer, LLAMA, torch.cat([scale, scale], 1))


def scale_norms(model: PreTrainedModel) -> None:
    draw = torch.Generator().manual_seed(4)
    for layer in model.model.layers:
        for norm in (LLAMA.attention_norm, LLAMA.mlp_norm):
            folding.scale_norm(layer, LLAMA, norm, torch.rand(48, generator=draw, dtype=torch.float64) + 0.5)


def orders(*shape: int) -> Tensor:
    """A permutation in each row, another one in each."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5)).argsort(-1)


def reorder(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        folding.reorder_values(layer, LLAMA, orders(2, 16))
        folding.reorder_hidden(layer, LLAMA, LLAMA.mlp, orders(folding.linear_of(layer, "mlp.down_proj").in_features))


def all_folds(model: PreTrainedModel) -> None:
    rotations = random_rotations(model.config, 1)
    fold_norms(model)
    rotate_residual(model, rotations.residual)
    rotate_values(model, rotations.value)
    rotate_online(model, rotations)


def only(model: PreTrainedModel, *names: str) -> Rotations:
    rotations = random_rotations(model.config, 1)
    return Rotations(**{name: getattr(rotations, name) for name in names})


FOLDS: dict[str, Callable[[PreTrainedModel], None]] = {
    "norms": fold_norms,
    "R1": lambda m: (fold_norms(m), rotate_residual(m, random_rotations(m.config, 1).residual)),  # type: ignore[dict-item]
    "R2 shared": lambda m: rotate_values(m, random_rotations(m.config, 1).value),
    "R2 per KV head": lambda m: rotate_values(m, per_head(2)),
    "R3": lambda m: rotate_online(m, only(m, "query_key")),
    "R4": lambda m: rotate_online(m, only(m, "attention_output")),
    "R5": lambda m: rotate_online(m, only(m, "mlp_hidden")),
    "all": all_folds,
    "scaled keys": scale_keys,
    "scaled norms": scale_norms,
    "reordered channels": reorder,
    "scaled norms of rotated streams": lambda m: (all_folds(m), scale_norms(m))[0],
}


@pytest.mark.parametrize("head", ["tiny", "tied"])
@pytest.mark.parametrize("fold", FOLDS)
def test_logits_stay(fold: str, head: str, request: pytest.FixtureRequest) -> None:
    model = exact_model(request.getfixturevalue(head))
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    FOLDS[fold](model)
    assert change(before, logits(model)) < 1e-12
    assert change(before, logits(model.float())) < 1e-5
    if fold != "R3":
        # The fold did something: some weight is another.
        assert any(not torch.allclose(w, weights[name].float()) for name, w in model.state_dict().items())


def test_exact_norm_model_is_transformers_model(tiny: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    assert change(logits(exact_model(tiny)), logits(plain)) < 1e-5


def test_folded_norms_are_one_and_readers_hold_their_weight(tiny: Path) -> None:
    model, original = exact_model(tiny), AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    fold_norms(model)
    layer, before = model.model.layers[2], original.model.layers[2]
    for norm, readers in (("input_layernorm", ("q", "k", "v")), ("post_attention_layernorm", ("gate", "up"))):
        assert torch.equal(layer.get_submodule(norm).weight, torch.ones(48, dtype=torch.float64))
        block = "self_attn" if norm == "input_layernorm" else "mlp"
        for reader in readers:
            name = f"{block}.{reader}_proj"
            expected = before.get_submodule(name).weight @ before.get_submodule(norm).weight.diag()
            torch.testing.assert_close(layer.get_submodule(name).weight, expected, rtol=1e-14, atol=0)
    assert torch.equal(layer.mlp.down_proj.weight, before.mlp.down_proj.weight)
    assert torch.equal(layer.self_attn.o_proj.weight, before.self_attn.o_proj.weight)


def test_values_are_rotated_head_by_head(tiny: Path) -> None:
    """Against block-diagonal matrices: query head h reads KV head h // 3."""
    model, original = exact_model(tiny), AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    rotation = per_head(3)
    rotate_values(model, rotation)
    for layer, before, (first, second) in zip(model.model.layers, original.model.layers, rotation, strict=True):
        values = torch.block_diag(first, second)
        outputs = torch.block_diag(first, first, first, second, second, second)
        new, old = layer.self_attn, before.self_attn
        torch.testing.assert_close(new.v_proj.weight, values.T @ old.v_proj.weight, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(new.v_proj.bias, values.T @ old.v_proj.bias, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(new.o_proj.weight, old.o_proj.weight @ outputs, rtol=1e-12, atol=1e-14)
        assert torch.equal(new.o_proj.bias, old.o_proj.bias)


@torch.no_grad()
def test_reordering_multiplies_by_permutation_matrices(tiny: Path) -> None:
    """One matrix for all of the MLP's channels; for values a matrix of blocks, three query heads for each KV head."""
    before, after = (AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64).model.layers[1] for _ in range(2))
    width = before.mlp.down_proj.in_features
    of_heads, hidden = orders(2, 16), torch.eye(width, dtype=torch.float64)[orders(width)]
    folding.reorder_hidden(after, LLAMA, LLAMA.mlp, orders(width))
    for name in ("gate_proj", "up_proj"):
        old, new = (layer.mlp.get_submodule(name) for layer in (before, after))
        assert torch.equal(new.weight, hidden @ old.weight)
        if old.bias is not None:
            assert torch.equal(new.bias, hidden @ old.bias)
    assert torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight @ hidden.T)
    folding.reorder_values(after, LLAMA, of_heads)
    blocks = [torch.eye(16, dtype=torch.float64)[order] for order in of_heads]
    values, heads = torch.block_diag(*blocks), torch.block_diag(*(block for block in blocks for _ in range(3)))
    old, new = before.self_attn, after.self_attn
    assert torch.equal(new.v_proj.weight, values @ old.v_proj.weight)
    assert torch.equal(new.v_proj.bias, values @ old.v_proj.bias)
    assert torch.equal(new.o_proj.weight, old.o_proj.weight @ heads.T)


def test_absorbing_multiplies_by_the_dense_matrix(tiny: Path) -> None:
    model = exact_model(tiny)
    factors = random_rotations(model.config, 1).mlp_hidden
    assert factors is not None
    down = model.model.layers[0].mlp.down_proj
    expected = down.weight @ factors.dense()
    folding.absorb_online(down, factors)
    torch.testing.assert_close(down.weight, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
def test_turning_heads_takes_the_memory_of_the_weight() -> None:
    """Not a copy of the rotations for each of its rows, which would be 134 MB."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 8 * 64, dtype=torch.float64, generator=draw)
    per_head = torch.randn(2, 64, 64, dtype=torch.float64, generator=draw)
    expected = weight @ torch.block_diag(*(per_head[head // 4] for head in range(8)))
    before = resident_memory()
    with Meter() as meter:
        turned = folding.turn_heads(weight, per_head)
    assert meter.peak_bytes - before < 20e6
    torch.testing.assert_close(turned, expected)


def wrong_transposed(model: PreTrainedModel, rotation: Tensor) -> None:
    """What is written to the residual stream is rotated the wrong way round."""
    rotate_residual(model, rotation)
    for layer in model.model.layers:
        for name in (LLAMA.output, "mlp.down_proj"):
            folding.rotate_output(folding.linear_of(layer, name), rotation.T @ rotation.T)


def wrong_centred(model: PreTrainedModel, rotation: Tensor) -> None:
    """The embedding's mean subtracted, as for LayerNorm."""
    weight = model.model.embed_tokens.weight
    weight.data = weight.data - weight.data.mean(-1, keepdim=True)
    rotate_residual(model, rotation)


def wrong_scaled(model: PreTrainedModel, rotation: Tensor) -> None:
    rotate_residual(model, rotation * (1 + 1e-6))


def wrong_bias(model: PreTrainedModel, rotation: Tensor) -> None:
    """A bias forgotten."""
    biases = [layer.mlp.down_proj.bias.data.clone() for layer in model.model.layers]
    rotate_residual(model, rotation)
    for layer, bias in zip(model.model.layers, biases, strict=True):
        layer.mlp.down_proj.bias.data = bias


@pytest.mark.parametrize("wrong", [wrong_transposed, wrong_centred, wrong_scaled, wrong_bias])
def test_gate_sees_a_wrong_fold(tiny: Path, wrong: Callable[[PreTrainedModel, Tensor], None]) -> None:
    model = exact_model(tiny)
    before = logits(model)
    fold_norms(model)
    draw = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=draw, dtype=torch.float64)).Q  # not symmetric
    wrong(model, rotation)
    with pytest.raises(GateError, match=r"^rotating layer 3 changed the output by .* more than 1e-08"):
        check("rotating layer 3", before, logits(model), FLOAT64_TOLERANCE)


def test_gate_passes_just_below_and_raises_at_its_tolerance() -> None:
    reference = torch.tensor([2.0, -8.0, 1.0], dtype=torch.float64)
    shifted = reference + torch.tensor([0.0, 0.0, 8e-9], dtype=torch.float64)
    assert check("shifting", reference, shifted, 1e-8) == pytest.approx(1e-9, rel=1e-6)
    assert check("fold", reference, shifted, FLOAT64_TOLERANCE) == pytest.approx(1e-9, rel=1e-6)
    with pytest.raises(GateError, match="fold"):
        check("fold", reference, reference * (1 + 2e-8), FLOAT64_TOLERANCE)
    with pytest.raises(GateError, match="more than 1e-04"):
        check("fold", reference.float(), reference.float() * 1.0002, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["value", "reference"])
def test_gate_refuses_what_is_not_finite(bad: float, place: str) -> None:
    good, other = torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    other[2] = bad
    pair = (good, other) if place == "value" else (other, good)
    # An original that is not finite is no fold's fault.
    with pytest.raises(GateError if place == "value" else NotFinite, match="fold of layer 1"):
        check("fold of layer 1", *pair, FLOAT64_TOLERANCE)
