"""Maps and scales of every family's layers: the float64 output is transformers' own, whatever the maps."""

import math

import pytest
import torch
from families import FAMILIES, tiny_family
from torch import Tensor, nn
from transformers import PreTrainedModel

from kurtail_pl.maths.kronecker import Kronecker
from kurtail_pl.methods.scheme import FLOAT, Scheme
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.architecture import Architecture
from kurtail_pl.surgery.attention import ATTENTION
from kurtail_pl.surgery.equip import empty_model, equip_layer, layers_of
from kurtail_pl.surgery.families import architecture_of
from kurtail_pl.surgery.gate import use_exact_layer, use_exact_norm
from kurtail_pl.surgery.invertible import Pair, map_sizes, mapped_weights, put_maps
from kurtail_pl.surgery.layout import module_state
from kurtail_pl.surgery.rotations import Rotations, head_dim_of, random_rotations

IDS = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))


def drawn(layer: nn.Module, architecture: Architecture, head_dim: int, seed: int) -> dict[str, Pair]:
    """Random invertible maps at every place, as a file stores them."""
    draw = torch.Generator().manual_seed(seed)

    def factor(n: int) -> Tensor:
        noise = torch.randn(n, n, generator=draw)
        return torch.eye(n) + noise / (2 * math.sqrt(n))

    maps = {}
    for place, (a, b) in map_sizes(layer, architecture, Scheme(), head_dim).items():
        stored = Kronecker(factor(a), factor(b)).stored()
        maps[place] = Pair(stored, stored.inverse_transposed())
    return maps


def scales_of(layer: nn.Module, architecture: Architecture, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    norms = (architecture.attention_norm, architecture.mlp_norm)
    widths = {norm: layer.get_parameter(f"{norm}.weight").numel() for norm in norms}
    downs = {mlp: folding.linear_of(layer, f"{mlp}.{architecture.down}") for mlp in architecture.gated_mlps(layer)}
    if architecture.rigid_hidden is None:
        widths |= {mlp: down.in_features for mlp, down in downs.items()}
    return {name: torch.rand(n, generator=draw, dtype=torch.float64) + 0.5 for name, n in widths.items()}


def ours(reference: PreTrainedModel) -> PreTrainedModel:
    """The same weights in our modules, experts apart, float64 through and through."""
    model, architecture = empty_model(reference.config), architecture_of(reference.config)
    state = {name: tensor.double() for name, tensor in reference.state_dict().items()}
    for index in range(reference.config.num_hidden_layers):
        prefix = f"{architecture.layers}.{index}."
        own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        state |= {prefix + name: tensor for name, tensor in module_state(own, architecture).items()}
    model.load_state_dict(state, assign=True)
    return exact(model)


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' norms and routers compute in float32."""
    architecture, eps = architecture_of(model.config), model.config.rms_norm_eps
    for layer in layers_of(model, architecture):
        use_exact_layer(layer, architecture, eps)
    use_exact_norm(model, architecture.final_norm, eps, architecture.norm_offset)
    return model.double()


@torch.no_grad()
def change(reference: PreTrainedModel, rotations: Rotations, parts: tuple[str, ...]) -> tuple[float, float]:
    """Of the logits in float64, relative to the largest; and of the weights."""
    model = ours(reference)
    expected, moved = exact(reference)(IDS).logits, 0.0
    architecture, head_dim = architecture_of(model.config), head_dim_of(model.config)
    layers = layers_of(model, architecture)
    model.set_attn_implementation(ATTENTION)
    for index, layer in enumerate(layers):
        for name in (architecture.output, *architecture.mlp_writers(layer)):
            linear = folding.linear_of(layer, name)
            factors = (
                rotations.attention_output if name == architecture.output else rotations.hidden(linear.in_features)
            )
            if factors is not None:
                folding.absorb_online(linear, factors)
        equip_layer(layer, architecture, FLOAT, rotations, head_dim)
        maps = drawn(layer, architecture, head_dim, index) if "maps" in parts else {}
        scales = scales_of(layer, architecture, index) if "scales" in parts else {}
        for name, tensor in mapped_weights(layer, architecture, scales, maps, torch.float64).items():
            parameter = layer.get_parameter(name)
            moved = max(moved, (parameter - tensor).abs().max().item())
            parameter.data = tensor
        put_maps(layer, architecture, maps)
    value = model(IDS).logits
    return ((value - expected).abs().max() / expected.abs().max()).item(), moved


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_and_scales_change_nothing(family: str) -> None:
    changed, moved = change(tiny_family(family), Rotations(), ("maps", "scales"))
    assert changed < 1e-8
    assert moved > 0.1


@pytest.mark.parametrize("parts", [("maps",), ("scales",)], ids=str)
def test_nor_behind_online_rotations(parts: tuple[str, ...]) -> None:
    model = tiny_family("llama3")
    rotations = random_rotations(model.config, 0)
    online = Rotations(
        query_key=rotations.query_key, attention_output=rotations.attention_output, mlp_hidden=rotations.mlp_hidden
    )
    changed, moved = change(model, online, parts)
    assert changed < 1e-8
    assert moved > 0.1
