"""Records of model families, and models without weights against transformers' own."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, LlamaConfig, T5Config

from kurtail_pl.errors import UnsupportedArchitecture
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.surgery.architecture import check_layer
from kurtail_pl.surgery.equip import empty_model, equip_model, expect_quantized, layers_of
from kurtail_pl.surgery.families import LLAMA, architecture_of
from kurtail_pl.surgery.linear import QuantizedLinear
from kurtail_pl.surgery.rotations import Rotations, head_dim_of, random_fused, random_rotations


def decoder_layer(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).model.layers[0]


@pytest.mark.parametrize("config", [BertConfig(), T5Config()], ids=lambda c: c.model_type)
def test_unknown_type_names_itself_and_the_known_ones(config: BertConfig | T5Config) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"'{config.model_type}'.*known: .*llama"):
        architecture_of(config)
    with pytest.raises(UnsupportedArchitecture, match=config.model_type):
        empty_model(config)


def test_llama_record_names_every_linear_and_norm_of_a_real_model(tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert architecture_of(model.config) is LLAMA
    linears = {name for name, m in model.model.layers[0].named_modules() if isinstance(m, nn.Linear)}
    assert set(LLAMA.linears(model.model.layers[0])) == linears
    assert len(linears) == 7
    for layer in model.model.layers:
        check_layer(layer, LLAMA)
    for name in (LLAMA.embedding, LLAMA.layers, LLAMA.final_norm, LLAMA.rotary, LLAMA.head):
        model.get_submodule(name)


def test_half_matching_layer_names_missing_and_unknown(tiny: Path) -> None:
    layer = decoder_layer(tiny)
    layer.mlp.w2 = layer.mlp.down_proj
    del layer.mlp.down_proj
    del layer.input_layernorm
    with pytest.raises(UnsupportedArchitecture, match=r"missing modules \[(.*)\], unknown modules \[(.*)\]") as error:
        check_layer(layer, LLAMA)
    missing, unknown = str(error.value).split("unknown modules")
    assert "'mlp.down_proj'" in missing
    assert "'input_layernorm'" in missing
    assert "up_proj" not in missing
    assert "['mlp.w2']" in unknown


def test_an_extra_linear_alone_raises(tiny: Path) -> None:
    layer = decoder_layer(tiny)
    layer.self_attn.gate = nn.Linear(2, 2)
    with pytest.raises(UnsupportedArchitecture, match=r"missing modules \[\], unknown modules \['self_attn.gate'\]"):
        check_layer(layer, LLAMA)


def test_empty_model_has_no_weights_and_real_rotary_frequencies(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    model = empty_model(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    # head_dim 16 and the default base: 10000^(-2i/16).
    expected = torch.tensor([10000 ** (-2 * i / 16) for i in range(8)])
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert len(layers_of(model, LLAMA)) == 4


def test_empty_model_with_weights_is_the_model(tiny: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny)
    model = empty_model(reference.config)
    model.load_state_dict(reference.state_dict(), assign=True)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)


@pytest.mark.parametrize("rotated", [False, True])
def test_equipped_empty_model_takes_no_memory(tiny: Path, rotated: bool) -> None:
    config = AutoConfig.from_pretrained(tiny)
    model, scheme = empty_model(config), Scheme()
    equip_model(model, scheme, random_rotations(config, 0) if rotated else Rotations())
    expect_quantized(model, scheme)
    linears = [m for m in model.model.layers.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 7 * 4
    state = model.state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert not any("rotation" in name for name in state)
    layer = model.model.layers[1]
    assert (layer.self_attn.o_proj.rotation is not None) == rotated
    assert (layer.mlp.down_proj.rotation is not None) == rotated
    assert (layer.self_attn.query_key_rotation is not None) == rotated
    assert layer.mlp.up_proj.rotation is None


def test_expect_codes_leaves_float_weights_when_the_scheme_does(tiny: Path) -> None:
    model = empty_model(AutoConfig.from_pretrained(tiny))
    names = set(model.state_dict())
    scheme = Scheme(weights=None)
    equip_model(model, scheme, Rotations())
    expect_quantized(model, scheme)
    assert set(model.state_dict()) == names


def test_the_output_projection_may_have_a_scale_for_each_head(tiny: Path) -> None:
    """Against a loop over heads; every other linear has one scale a token."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    equip_model(model, Scheme(attention_output="head", activations=Quantizer(4)), Rotations())
    x = torch.randn(5, 6 * 16, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[2]
    expected = torch.empty_like(x)
    for token in range(5):
        for head in range(6):
            own = x[token, 16 * head : 16 * head + 16]
            scale = own.abs().max() / 7
            expected[token, 16 * head : 16 * head + 16] = (own / scale).round() * scale
    assert torch.equal(layer.self_attn.o_proj.prepare(x), expected)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
        read = layer.get_submodule(name).prepare(x[:, :48])
        assert len((read[0] / (x[0, :48].abs().max() / 7)).round(decimals=3).unique()) <= 15


def test_head_dim_is_read_or_derived(tiny: Path) -> None:
    assert head_dim_of(AutoConfig.from_pretrained(tiny)) == 16
    config = LlamaConfig(hidden_size=48, num_attention_heads=6)
    config.head_dim = None
    assert head_dim_of(config) == 8


def orthogonal(matrix: torch.Tensor) -> bool:
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64).expand_as(matrix)
    return bool(torch.allclose(matrix.mT @ matrix, identity, atol=1e-12))


def test_random_rotations_are_orthogonal_and_of_the_right_sizes(tiny: Path) -> None:
    rotations = random_rotations(AutoConfig.from_pretrained(tiny), 3)
    assert rotations.residual is not None
    assert rotations.value is not None
    sizes = {
        "residual": (rotations.residual, (48, 48)),
        "value": (rotations.value, (4, 16, 16)),
        **{
            name: (getattr(rotations, name).dense(), (size, size))
            for name, size in (("query_key", 16), ("attention_output", 96), ("mlp_hidden", 172))
        },
    }
    for name, (matrix, shape) in sizes.items():
        assert matrix.shape == shape, name
        assert matrix.dtype == torch.float64, name
        assert orthogonal(matrix), name
    assert "Hartley 43" in rotations.mlp_hidden.construction  # type: ignore[union-attr]
    assert not torch.equal(rotations.value[0], rotations.value[1])


def test_random_rotations_depend_on_the_seed_and_start_where_learning_starts(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny)
    first, again, other = (random_rotations(config, seed) for seed in (3, 3, 4))
    assert first.origin == {"seed": 3}
    residual, value = random_fused(4, 48, 16, 3)
    for name in ("residual", "value"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    assert torch.equal(first.residual, residual)  # type: ignore[arg-type]
    assert torch.equal(first.value, value)  # type: ignore[arg-type]
    for name in ("query_key", "attention_output", "mlp_hidden"):
        mine, same, different = (getattr(r, name).dense() for r in (first, again, other))
        assert torch.equal(mine, same)
        assert not torch.equal(mine, different)
