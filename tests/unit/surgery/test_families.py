"""Every family: folded and rotated models against transformers' own, and the layouts of mixtures on disk."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW, re_expressed, tiny_family
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    Olmo2Config,
    PreTrainedModel,
)
from walks import embed

from kurtail_pl.errors import CheckpointError, UnsupportedArchitecture
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.rotation_file import require_rotations_of
from kurtail_pl.streaming.walker import Walker
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture, check_layer
from kurtail_pl.surgery.equip import empty_model, equip_model, layers_of, online_rotations
from kurtail_pl.surgery.families import LLAMA, REGISTRY, architecture_of, is_dense
from kurtail_pl.surgery.gate import use_exact_layer, use_exact_norm
from kurtail_pl.surgery.layout import module_state
from kurtail_pl.surgery.rotations import Rotations, head_dim_of, random_fused, random_rotations

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))


def make_exact(model: PreTrainedModel) -> PreTrainedModel:
    """Float64 through and through: transformers' norms and routers compute in float32."""
    architecture = architecture_of(model.config)
    for layer in layers_of(model, architecture):
        use_exact_layer(layer, architecture, model.config.rms_norm_eps)
    use_exact_norm(model, architecture.final_norm, model.config.rms_norm_eps, architecture.norm_offset)
    return model.double()


def rotated(
    reference: PreTrainedModel,
    rotations: Rotations,
    prepare: Callable[[nn.Module, Architecture], None] = lambda layer, architecture: None,
) -> PreTrainedModel:
    """The same weights in our modules, each layer prepared, with all five rotations, float64."""
    config = reference.config
    model, architecture = empty_model(config), architecture_of(config)
    state = {}
    for name, tensor in reference.state_dict().items():
        state[name] = tensor.double().clone()
    for i in range(config.num_hidden_layers):
        prefix = f"{architecture.layers}.{i}."
        own = {name: state.pop(name) for name in list(state) if name.startswith(prefix)}
        layer = module_state({n.removeprefix(prefix): t for n, t in own.items()}, architecture)
        state |= {prefix + name: tensor for name, tensor in layer.items()}
    model.load_state_dict(state, assign=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())
    residual, value = rotations.residual, rotations.value
    assert value is not None
    folding.fold_norm(model.model.norm, [model.lm_head], architecture.norm_offset)
    if residual is not None:
        model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data @ residual
        folding.rotate_input(model.lm_head, residual)
    for layer, per_layer in zip(layers_of(model, architecture), value, strict=True):
        prepare(layer, architecture)
        if residual is not None:
            folding.fold_layer_norms(layer, architecture)
            folding.rotate_residual(layer, architecture, residual)
        folding.rotate_values(layer, architecture, per_layer)
        for name, factors in online_rotations(layer, architecture, rotations).items():
            folding.absorb_online(folding.linear_of(layer, name), factors)
    equip_model(model, FLOAT, rotations)
    return model


def prefill(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(IDS).logits
    return logits


def decode(model: PreTrainedModel) -> Tensor:
    """A prefix at once, then token after token through the cache."""
    cache = DynamicCache(config=model.config)
    cuts = [0, 28, *range(29, IDS.shape[1] + 1)]
    parts = [model(IDS[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(cuts)]
    return torch.cat(parts, 1)


def change(expected: Tensor, value: Tensor) -> float:
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_scaling_channels_changes_nothing(name: str) -> None:
    """Before the rotations, by a factor of its own for each channel of each KV head and MLP."""
    plain, exact = tiny_family(name), make_exact(tiny_family(name))
    config, draw = plain.config, torch.Generator().manual_seed(7)
    kv_heads, head_dim = config.num_key_value_heads, head_dim_of(config)

    def scale(layer: nn.Module, architecture: Architecture) -> None:
        folding.scale_values(layer, architecture, torch.randn(kv_heads, head_dim, generator=draw).double().exp())
        for mlp in architecture.gated_mlps(layer) if architecture.rigid_hidden is None else ():
            width = layer.get_submodule(f"{mlp}.{architecture.down}").in_features
            folding.scale_hidden(layer, architecture, mlp, torch.randn(width, generator=draw).double().exp())

    ours = make_exact(rotated(plain, random_rotations(config, 1), scale))
    for run in (prefill, decode):
        assert change(run(exact), run(ours)) < 1e-8, run


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_modules_are_transformers_own(name: str) -> None:
    """Norms and routers, but for the type that they compute in."""
    assert change(tiny_family(name)(IDS).logits, make_exact(tiny_family(name))(IDS).logits) < 1e-4


@torch.no_grad()
def test_a_family_may_have_head_norms_or_not() -> None:
    """GLM-4.5 has them and GLM-4.5-Air has not."""
    plain, exact = (tiny_family("glm4_moe", use_qk_norm=False) for _ in range(2))
    assert not hasattr(plain.model.layers[0].self_attn, "q_norm")
    ours = make_exact(rotated(plain, random_rotations(plain.config, 1)))
    assert change(prefill(make_exact(exact)), prefill(ours)) < 1e-8


@torch.no_grad()
def test_a_bias_that_chooses_experts_is_never_rounded() -> None:
    own, config = tiny_family("glm4_moe"), FAMILIES["glm4_moe"]()
    router = empty_model(config).model.layers[1].mlp.gate
    router.load_state_dict(own.model.layers[1].mlp.gate.state_dict(), assign=True)
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.e_score_correction_bias, own.model.layers[1].mlp.gate.e_score_correction_bias)


RIGID = [name for name in FAMILIES if architecture_of(FAMILIES[name]()).rigid_hidden is not None]


@torch.no_grad()
@pytest.mark.parametrize("part", ["scales", "signs"])
@pytest.mark.parametrize("name", RIGID)
def test_what_a_record_does_not_allow_does_change_the_logits(name: str, part: str) -> None:
    """Channels multiplied where `up` writes them and divided where `down` reads them, as if nothing stood between."""
    plain, draw = tiny_family(name), torch.Generator().manual_seed(7)

    def force(layer: nn.Module, architecture: Architecture) -> None:
        for mlp in architecture.gated_mlps(layer):
            noise = torch.randn(layer.get_submodule(f"{mlp}.{architecture.down}").in_features, generator=draw)
            folding.scale_hidden(layer, architecture, mlp, noise.exp() if part == "scales" else noise.sign())

    forced = make_exact(rotated(plain, random_rotations(plain.config, 1), force))
    assert change(plain(IDS).logits, forced(IDS).logits) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if architecture_of(FAMILIES[name]()).rigid_residual is not None]
)
def test_r1_in_the_weights_where_it_is_not_allowed_does_change_the_logits(name: str) -> None:
    """And such rotations are refused, with the reason."""
    plain = tiny_family(name)
    config = plain.config
    residual, _ = random_fused(config.num_hidden_layers, config.hidden_size, head_dim_of(config), 1)
    rotations = replace(random_rotations(config, 1), residual=residual, block_input=None)
    assert change(plain(IDS).logits, make_exact(rotated(plain, rotations))(IDS).logits) > 1e-2
    with pytest.raises(CheckpointError, match=r"residual is there, .* no R1 in its weights: a norm multiplies"):
        require_rotations_of(config, rotations, "the rotations")


@torch.no_grad()
@pytest.mark.parametrize("per_head", [False, True], ids=["R2 a layer", "R2 a head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_folding_and_rotating_changes_nothing(name: str, per_head: bool) -> None:
    plain, exact = tiny_family(name), make_exact(tiny_family(name))
    config = plain.config
    rotations = random_rotations(config, 1)
    if per_head:
        sizes = config.num_hidden_layers, config.hidden_size, head_dim_of(config)
        residual, value = random_fused(*sizes, 2, config.num_key_value_heads)
        rotations = replace(rotations, residual=None if rotations.residual is None else residual, value=value)
    ours = make_exact(rotated(plain, rotations))
    in_float32 = rotated(plain, rotations).float()
    for run in (prefill, decode):
        assert change(run(exact), run(ours)) < 1e-8, run
        assert change(run(plain), run(in_float32)) < 1e-4, run


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3", "mixtral"])
def test_these_families_slide(name: str) -> None:
    """What the test above says of sliding windows is about windows that matter."""
    assert IDS.shape[1] > WINDOW
    everywhere = {"layer_types": ["full_attention"] * 3} if name == "qwen2" else {}
    wide = tiny_family(name, sliding_window=None, **everywhere)
    assert change(wide(IDS).logits, tiny_family(name)(IDS).logits) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("fused_on_disk", [False, True])
def test_experts_are_read_apart_and_fused(name: str, fused_on_disk: bool, tmp_path: Path) -> None:
    model = tiny_family(name)
    model.save_pretrained(tmp_path, save_original_format=not fused_on_disk)
    checkpoint = Checkpoint(tmp_path)
    assert any("experts.gate_up_proj" in tensor for tensor in checkpoint.names) == (fused_on_disk or name == "gpt_oss")
    walker = Walker(checkpoint)
    (hidden,) = embed(walker, IDS[:1])
    for _, layer in walker.layers("test"):
        hidden = walker.advance(layer, hidden)
    norm, head = walker.head()
    torch.testing.assert_close(head(norm(hidden)), model(IDS[:1]).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["phi3", "qwen2", "mixtral"])
def test_re_expressed_weights_are_the_same_function(layout: str, stories: Path) -> None:
    llama = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    model = re_expressed(stories, layout)
    assert model.config.model_type == layout
    assert change(llama(IDS).logits, model(IDS).logits) < 1e-5
    exact = make_exact(re_expressed(stories, layout))
    ours = make_exact(rotated(model, random_rotations(model.config, 1)))
    for run in (prefill, decode):
        assert change(run(exact), run(ours)) < 1e-8


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GemmaConfig(), r"multiply by 1 \+ weight"),
        (Gemma2Config(), "scores of the attention are capped"),
        (Olmo2Config(), "read the residual stream without a norm"),
        (GPT2Config(), "LayerNorm subtracts the mean"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_cannot_be_rotated_is_refused_with_the_reason(config: GPT2Config, reason: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"{config.model_type}.*{reason}.*use one of .*llama"):
        empty_model(config)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "has values cut off at a number"),
        ("glm4_moe", {"n_shared_experts": 2}, "has an MLP beside the experts that is wider than one of them"),
        (
            "granite4",
            {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
            "has state-space layers",
        ),
        ("granite4", {"num_local_experts": 2}, "has experts beside an MLP that all tokens share"),
        ("granite4", {"position_embedding_type": None}, "has no rotary positions"),
    ],
)
def test_members_of_a_family_that_no_record_describes_are_refused(
    family: str, changes: dict[str, Any], reason: str
) -> None:
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    (key,) = changes
    with pytest.raises(UnsupportedArchitecture, match=rf"{key} is .*this {config.model_type} {reason}.*whose {key} is"):
        empty_model(config)


DENSE: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "one": ({"mlp_only_layers": [0]}, [True, False, False]),
    "every other": ({"mlp_only_layers": [], "decoder_sparse_step": 2}, [True, False, True]),
    "both": ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, [True, True, True]),
    "as wide as an expert": ({"mlp_only_layers": [1], "intermediate_size": 20}, [False, True, False]),
    "none": ({"mlp_only_layers": []}, [False, False, False]),
}


@torch.no_grad()
@pytest.mark.parametrize("case", DENSE)
def test_dense_layers_among_experts(case: str) -> None:
    changes, dense = DENSE[case]
    plain, exact = (tiny_family("qwen3_moe", **changes) for _ in range(2))
    config = plain.config
    assert [not hasattr(layer.mlp, "experts") for layer in plain.model.layers] == dense
    assert [is_dense(config, layer) for layer in range(3)] == dense
    widths = {20} if not all(dense) else set()
    widths |= {config.intermediate_size} if any(dense) else set()
    found = random_rotations(config, 1)
    sizes = {factors.size for factors in (found.mlp_hidden, found.dense_hidden) if factors is not None}
    assert widths <= sizes <= widths | {20}
    ours = make_exact(rotated(plain, found))
    for run in (prefill, decode):
        assert change(run(make_exact(exact)), run(ours)) < 1e-8, run


def test_every_zeroth_layer_is_no_mixture() -> None:
    config = FAMILIES["qwen3_moe"]()
    config.decoder_sparse_step = 0
    with pytest.raises(UnsupportedArchitecture, match=r"decoder_sparse_step is 0; expected 1 or more"):
        empty_model(config)


def test_an_online_rotation_of_no_mlps_width_is_refused() -> None:
    config = FAMILIES["qwen3_moe"]()
    rotations = replace(random_rotations(config, 1), dense_hidden=None)
    with pytest.raises(CheckpointError, match=r"R5 is of size 20 and an MLP of this model has 172 channels"):
        equip_model(empty_model(config), FLOAT, rotations)


def test_the_documentation_has_a_row_for_each_family() -> None:
    text = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    assert [kind for kind in REGISTRY if f"| `{kind}` |" not in text] == []
    assert {architecture_of(make()).model_type for make in FAMILIES.values()} == set(REGISTRY)


def test_weights_that_a_record_does_not_know_are_named() -> None:
    """A Qwen3 called a Llama: the head norms are no linears, and still not Llama's."""
    config = FAMILIES["qwen3"]()
    layer = tiny_family("qwen3").model.layers[0]
    with pytest.raises(UnsupportedArchitecture, match=r"unknown modules \['self_attn.k_norm', 'self_attn.q_norm'\]"):
        check_layer(layer, LLAMA)
    check_layer(layer, architecture_of(config))
