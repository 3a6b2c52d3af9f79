"""Online rotations as transforms: direction and scale by the library's own module and by a dense product; W4A4."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.transform import TransformFactory
from kurtail_vllm.exporter import VLLM
from kurtail_vllm.verify.folder import Served
from kurtail_vllm.verify.mirror import MirrorLinear, quantized
from safetensors.torch import load_file
from torch import nn

from kurtail_pl.artefact.source import Source
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import PerTokenHead, Uniform
from kurtail_pl.stages.export import export
from kurtail_pl.storage.rotation_file import read_rotations
from kurtail_pl.surgery.online import OnlineHadamard
from kurtail_pl.surgery.rotations import BlockSize

ACTIVATIONS = Quantizer(4, symmetric=True)
MakeArtefact = Callable[..., Path]
WIDTHS = {"attention_output": ("self_attn.o_proj", 256), "mlp_hidden": ("mlp.down_proj", 384)}


@pytest.fixture(scope="module")
def folder(online: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the tiny Llama with all five rotations."""
    return export(online, tmp_path_factory.mktemp("vllm") / "w4a4", VLLM())


def described(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


@pytest.mark.parametrize("name", WIDTHS)
def test_the_librarys_own_transform_is_the_online_rotation(online: Path, folder: Path, name: str) -> None:
    """Built from the configuration as the library builds it, with the tensor of the file in it."""
    linear, width = WIDTHS[name]
    stored = load_file(folder / "model.safetensors")
    tensor = stored[f"model.layers.0.{linear}.{name}_input.weight"]
    assert tensor.dtype == torch.float16
    assert torch.equal(tensor.abs(), torch.ones(width, width, dtype=torch.float16))
    assert sum(place.endswith(f"{name}_input.weight") for place in stored) == 1
    scheme = Served(folder).transforms.config_groups[name]
    module = nn.Linear(width, 3)
    transform: Any = TransformFactory.from_scheme(scheme, name=name).create_transform(module, scheme.apply[0])
    transform.weight = nn.Parameter(tensor.double())
    x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = getattr(read_rotations(online / "rotations.safetensors"), name)
    assert torch.allclose(transform(x), x @ factors.dense(), rtol=0, atol=1e-13)
    assert torch.allclose(transform(x), OnlineHadamard(factors)(x), rtol=0, atol=1e-13)


def test_activations_and_transforms_are_in_the_configuration(folder: Path) -> None:
    quantization = described(folder, "config.json")["quantization_config"]
    (group,) = quantization["config_groups"].values()
    wanted = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "group_size": None}
    assert group["input_activations"] == wanted
    groups = quantization["transform_config"]["config_groups"]
    assert {name: scheme["apply"][0]["targets"] for name, scheme in groups.items()} == {
        "attention_output": [r"re:.*self_attn\.o_proj$"],
        "mlp_hidden": [r"re:.*mlp\.down_proj$"],
    }
    assert all(scheme["type"] == "random-hadamard" for scheme in groups.values())


def test_the_card_says_how_it_is_served_and_who_prints_garbage(folder: Path) -> None:
    readme = (folder / "README.md").read_text()
    command = "vllm serve FOLDER --dtype float16 --linear-backend humming --kv-cache-dtype int4_per_token_head"
    for words in (command, "Using HummingLinearKernel for CompressedTensorsWNA4Int", "prints garbage"):
        assert words in readme
    description = described(folder, "kurtail_export.json")
    assert description["transforms"]["mlp_hidden"]["size"] == 384
    layer = 128 * (256 + 2 * 128) + 256 * 128 + 3 * 128 * 384
    assert description["multiplications"] == {"linears": 3 * layer, "transforms": 3 * (256**2 + 384**2)}


@torch.no_grad()
def test_the_mirror_is_products_of_integers(online: Path, folder: Path) -> None:
    """Codes of the artefact, those of each token by hand, and the product of integers times both scales."""
    name, source = "model.layers.1.mlp.down_proj", Source(online)
    linear = source.linear(name)
    linear.codes, linear.scale = source.tensor(f"{name}.codes"), source.tensor(f"{name}.scale")
    codes, (scale, _) = linear.quantized()
    factors = source.rotations.mlp_hidden
    assert factors is not None
    x = torch.randn(7, 384, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = MirrorLinear(Served(folder), name)(x)
    for token, row in zip(x, found, strict=True):
        turned = token @ factors.dense()
        step = max(abs(value) for value in turned) / 7
        inputs = torch.tensor([max(-8, min(7, round(float(value / step)))) for value in turned])
        product = codes.long() @ inputs.long()
        assert torch.allclose(product * step * scale.double()[:, 0], row, rtol=0, atol=1e-12)


def test_groups_of_activations_have_a_scale_each() -> None:
    x = torch.tensor([[7.0, -3.4, 70.0, 4.0], [0.0, 0.0, 0.4, -0.7]], dtype=torch.float64)
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=2, dynamic=True)
    expected = torch.tensor([[7.0, -3.0, 70.0, 0.0], [0.0, 0.0, 0.4, -0.7]], dtype=torch.float64)
    assert torch.allclose(quantized(x, arguments), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "parts",
    [
        {"activations": Quantizer(8)},
        {"weights": Uniform(4, False), "activations": Quantizer(8)},
        {"weights": Uniform(8), "activations": Quantizer(8)},
        {"activations": Quantizer(4), "attention_output": "head"},
        {"weights": Uniform(4, group_size=64), "activations": Quantizer(4, group_size=64)},
        {"activations": None},
    ],
    ids=str,
)
def test_what_vllm_computes_gives_the_artefacts_logits(
    llama: Path, make_artefact: MakeArtefact, tmp_path: Path, parts: dict[str, Any]
) -> None:
    artefact = make_artefact(llama, online=True, **parts)
    folder = export(artefact, tmp_path / "vllm", VLLM())
    assert described(folder, "checks.json")["mirror"]["logits_error"] < 1e-12
    groups = described(folder, "config.json")["quantization_config"]["config_groups"]
    assert len(groups) == (2 if "attention_output" in parts else 1)


def test_bits_of_activations_have_a_kernel_each(llama: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    artefact = make_artefact(llama, activations=Quantizer(8), cache=PerTokenHead(Quantizer(8), Quantizer(8)))
    readme = (export(artefact, tmp_path / "vllm", VLLM(), check=False) / "README.md").read_text()
    assert "Using HummingLinearKernel for CompressedTensorsWNA8Int" in readme
    assert "--kv-cache-dtype int8_per_token_head" in readme
    assert "prints garbage" not in readme


def test_a_matrix_that_float16_rounds_is_compared_as_it_is_held(
    make_model: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    """172 = 4 * 43, where no matrix of ones is known; activations stay float, as their kernel takes no such width."""
    model = make_model("llama3", attention_bias=False, mlp_bias=False)
    artefact = make_artefact(model, online=True, weights=Uniform(4, group_size=4))
    folder = export(artefact, tmp_path / "vllm", VLLM())
    tensor = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.mlp_hidden_input.weight"]
    assert not torch.equal(tensor.abs(), torch.ones_like(tensor))
    assert described(folder, "checks.json")["mirror"]["logits_error"] < 1e-12


@pytest.mark.parametrize("block_size", ["widest", 64])
def test_blocks_are_what_the_librarys_hadamard_computes(
    llama: Path, make_artefact: MakeArtefact, tmp_path: Path, block_size: BlockSize
) -> None:
    """Built from the configuration alone: the tensor of the file is not looked at. The check has run, too."""
    artefact = make_artefact(llama, block_size, activations=ACTIVATIONS)
    folder = export(artefact, tmp_path / "blocks", VLLM(), check=True)
    rotations, groups = read_rotations(artefact / "rotations.safetensors"), Served(folder).transforms.config_groups
    for name, (linear, width) in WIDTHS.items():
        factors, scheme = getattr(rotations, name), groups[name]
        assert (scheme.type, scheme.head_dim) == ("hadamard", None if factors.blocks == 1 else factors.block)
        transform: Any = TransformFactory.from_scheme(scheme, name=name).create_transform(
            nn.Linear(factors.block, 3), scheme.apply[0]
        )
        transform.weight = nn.Parameter(transform.weight.double())
        x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        blocks = x.unflatten(-1, (-1, factors.block))
        assert torch.allclose(transform(blocks).flatten(-2), x @ factors.dense(), rtol=0, atol=1e-13)
        assert load_file(folder / "model.safetensors")[f"model.layers.0.{linear}.{name}_input.weight"].shape == (
            factors.block,
            factors.block,
        )
    assert "a fast Hadamard kernel" in (folder / "README.md").read_text()
