"""Methods of the weights down the whole road: by name, to an artefact that loads back to what was measured."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import fill, sizes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kurtail_pl
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.card import scheme_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.rotation_file import read_rotations
from kurtail_pl.surgery.equip import unpack_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
]
GROUPS = "--quantization.scheme.weights.group_size=16"
WEIGHTS = ["--quantization.scheme.weights=kurtail_pl.methods.Progressive", GROUPS]
ROADS = {
    "mxfp4 by gptq": (["--config", "mxfp4"], {"codes", "scale"}, torch.uint8),
    "nvfp4 by gptq": (["--config", "nvfp4"], {"codes", "blocks", "tensor_scale"}, torch.uint8),
    "nvfp4 by rtn": (["--config", "nvfp4", "--config", "rtn"], {"codes", "blocks", "tensor_scale"}, torch.uint8),
    "mxfp4+ by gptq": (["--config", "mxfp4-plus"], {"codes", "scale", "top"}, torch.uint8),
    "nvint4 refined": (
        ["--config", "nvint4", "--quantization.rounder.refine=1"],
        {"codes", "blocks", "tensor_scale"},
        torch.uint8,
    ),
    "qoq's weights": (WEIGHTS, {"codes", "row_scale", "group_scale", "zero_point"}, torch.uint8),
    "qoq's weights refined": (
        [*WEIGHTS, "--quantization.rounder.refine=2"],
        {"codes", "row_scale", "group_scale", "zero_point"},
        torch.uint8,
    ),
    "hqq": (["--config", "hqq", GROUPS], {"codes", "scale", "zero_point"}, torch.float32),
    "mixed-2-4-16": (
        ["--config", "mixed-2-4-16"],
        {"codes", "widths", "row_exponent", "group_scale", "zero_point", "side_index", "side_value"},
        torch.uint8,
    ),
    "skim": (["--config", "skim"], {"codes", "levels", "widths", "scale"}, torch.uint8),
    "higgs by gptq": (["--config", "higgs", "--config", "gptq"], {"codes", "scale"}, torch.float32),
}


@pytest.fixture(scope="module")
def even(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths blocks of 32 divide."""
    folder = tmp_path_factory.mktemp("even") / "even"
    fill(
        LlamaForCausalLM(LlamaConfig(**sizes(hidden_size=64, intermediate_size=96, num_attention_heads=4)))
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tied).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("road", ROADS)
def test_from_a_recipe_to_an_artefact(
    road: str,
    kurtail: Callable[..., None],
    even: Path,
    recipe: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, stored, dtype = ROADS[road]
    place = recipe.parent
    kurtail(place, "fit", "--config", recipe, "--data.capture.model", even, *flags)
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4"
    results = json.loads((folder / "results.json").read_text())["evaluation"]
    spec = TextSpec(str(text_file), results["windows"], results["seqlen"])
    assert perplexity(Checkpoint(folder), spec)["perplexity"] == results["perplexity"]
    assert math.isfinite(results["perplexity"])
    tensors = {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}
    of_up = {name.rpartition(".")[2]: t for name, t in tensors.items() if "layers.1.mlp.up_proj" in name}
    of_up.pop("bias", None)
    assert of_up.keys() == stored
    assert dict(of_up)[sorted(stored - {"codes", "tensor_scale"})[-1]].dtype == dtype
    before, after = (model(input_ids=torch.arange(9)[None]).logits for model in both(folder))
    assert torch.equal(before, after)
    card = (folder / "README.md").read_text()
    assert "rounded" in card
    if "row_scale" in stored or road == "nvint4 refined":
        kurtail(place, "export", "--artefact", folder, "--out", "onnx", "--check")
        return
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "export", "--artefact", folder, "--out", "onnx")
    alone = "quantize with side: null" if "side_index" in stored else "evenly spaced integers with integer zero points"
    assert alone in capsys.readouterr().err


def test_svdquant_down_the_road(
    kurtail: Callable[..., None], even: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its sides in the file, by two names for linears that read the same; what page and inspect say, and an export."""
    flags = [GROUPS, "--quantization.scheme.activations.group_size=16", "--quantization.scheme.side.rank=8"]
    place = recipe.parent
    kurtail(place, "fit", "--config", recipe, "--data.capture.model", even, "--config", "svdquant", *flags)
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4"
    tensors = {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}
    sides = {name: tuple(tensor.shape) for name, tensor in tensors.items() if ".side_" in name}
    layer = "model.layers.1."
    assert {name.removeprefix(layer): shape for name, shape in sides.items() if name.startswith(layer)} == {
        "self_attn.q_proj.side_down": (8, 64), "self_attn.q_proj.side_up": (64, 8),
        "self_attn.k_proj.side_up": (32, 8), "self_attn.v_proj.side_up": (32, 8),
        "self_attn.o_proj.side_down": (8, 64), "self_attn.o_proj.side_up": (64, 8),
        "mlp.gate_proj.side_down": (8, 64), "mlp.gate_proj.side_up": (96, 8), "mlp.up_proj.side_up": (96, 8),
        "mlp.down_proj.side_down": (8, 96), "mlp.down_proj.side_up": (64, 8),
    }  # fmt: skip
    evaluated = json.loads((folder / "results.json").read_text())["evaluation"]
    assert math.isfinite(evaluated["perplexity"])
    assert "beside them a side of rank 8 in 16 bits" in (folder / "README.md").read_text()
    capsys.readouterr()
    kurtail(place, "inspect", folder)
    assert "- beside the quantizers: a side of rank 8 in 16 bits" in capsys.readouterr().out
    kurtail(place, "export", "--artefact", folder, "--out", "onnx", "--check")
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "fit", "--config", recipe, "--config", "svdquant", "--target", "vllm", "--overwrite")
    assert "target is vllm" in capsys.readouterr().err


def test_qoq_down_the_road(
    kurtail: Callable[..., None], even: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that the recipe asks for, in the artefact; an order that R5 would undo is refused before any work."""
    place = recipe.parent
    short = ["--fusion.scales.text.windows=4", "--fusion.scales.text.seqlen=48"]
    flags = ["--config", recipe, "--data.capture.model", even, "--config", "qoq", GROUPS, *short]
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "fit", *flags, "--fusion.online=[mlp_hidden]")
    assert "R5 mixes the channels of mlp_hidden" in capsys.readouterr().err
    assert not (place / "runs" / "rotations.safetensors").exists()
    kurtail(place, "fit", *flags)
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4"
    card = json.loads((folder / "kurtail.json").read_text())
    assert scheme_of(folder).name == "w4a8kv4"
    assert card["fuse"]["scales"]["reorder"] == ["mlp_hidden"]
    assert "4-bit codes on two levels of scales: an integer in groups of 16" in (folder / "README.md").read_text()
    # Four bits, two bytes for each 16 of the 64 or 96 inputs, two bytes for each output.
    numbers, outputs = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64, 2 * 64 + 2 * 32 + 2 * 96 + 64
    assert card["bits_per_weight"] == pytest.approx(4 + 16 / 16 + 16 * outputs / numbers)


def test_smoothquant_plus_down_the_road(kurtail: Callable[..., None], even: Path, recipe: Path) -> None:
    """A plain float model is scaled and rounded in groups; the card has the alpha, and ONNX Runtime computes it."""
    place, settings = (
        recipe.parent,
        ["text.windows=4", "text.seqlen=48", "search.step=0.5", "search.rounding.group_size=16"],
    )
    flags = ["--config", "smoothquant-plus", GROUPS, *(f"--fusion.scales.{setting}" for setting in settings)]
    kurtail(place, "fit", "--config", recipe, "--data.capture.model", even, *flags)
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4"
    assert scheme_of(folder).name == "w4a16kv16"
    note = json.loads((folder / "kurtail.json").read_text())["rotations"]["scales"]
    sums = [sum(errors) for errors in zip(*note["errors"], strict=True)]
    assert note["alpha"] == [0.0, 0.5, 1.0][sums.index(min(sums))]
    page = (folder / "README.md").read_text()
    assert f"- channels: scaled by their largest magnitudes, alpha {note['alpha']}" in page
    kurtail(place, "export", "--artefact", folder, "--out", "onnx", "--check")


def test_kvquant_down_the_road(
    kurtail: Callable[..., None], even: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache alone: what is stored, what page and plan say, and that no other runtime has such a cache."""
    place, short = recipe.parent, ["--quantization.text.windows=4", "--quantization.text.seqlen=48"]
    flags = ["--config", recipe, "--data.capture.model", even, "--config", "kvquant", *short]
    kurtail(place, "plan", *flags)
    assert "4.32 bits a number of keys, 5.32 bits a number of values" in capsys.readouterr().out
    kurtail(place, "fit", *flags)
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4"
    assert scheme_of(folder).name == "w16a16kv4"
    tensors = {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}
    found = {
        name.rpartition("cache_")[2]: tuple(t.shape) for name, t in tensors.items() if "1.self_attn.cache_" in name
    }
    assert found == {"key_low": (2, 1, 16), "key_high": (2, 1, 16), "key_levels": (16,), "value_levels": (16,)}
    sentence = "keys before RoPE by channel in 4 bits, values by token in 4 bits, k-means levels"
    assert sentence in (folder / "README.md").read_text()
    results = json.loads((folder / "results.json").read_text())["evaluation"]
    assert math.isfinite(results["perplexity"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "export", "--artefact", folder, "--out", "onnx")
    refused = capsys.readouterr().err
    assert f"the cache keeps {sentence}" in " ".join(refused.split())


@pytest.mark.parametrize(("name", "block"), [("mr-gptq", 32), ("mr-gptq-nvfp4", 16)])
def test_mr_gptq_down_the_road(
    kurtail: Callable[..., None],
    even: Path,
    recipe: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    block: int,
) -> None:
    """Inputs in 4-bit floating point too, all rotations in blocks, and an artefact that loads as it was measured."""
    place = recipe.parent
    kurtail(place, "fit", "--config", recipe, "--data.capture.model", even, "--config", name)
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4"
    results = json.loads((folder / "results.json").read_text())["evaluation"]
    spec = TextSpec(str(text_file), results["windows"], results["seqlen"])
    assert perplexity(Checkpoint(folder), spec)["perplexity"] == results["perplexity"]
    assert math.isfinite(results["perplexity"])
    before, after = (model(input_ids=torch.arange(9)[None]).logits for model in both(folder))
    assert torch.equal(before, after)
    rotations = read_rotations(folder / "rotations.safetensors")
    assert rotations.residual is not None
    of_blocks = torch.block_diag(*torch.ones(64 // block, block, block))
    assert torch.equal((rotations.residual != 0).float(), of_blocks)
    assert rotations.online == ["mlp_hidden"]
    assert rotations.mlp_hidden is not None
    assert rotations.mlp_hidden.block == block
    card = (folder / "README.md").read_text()
    assert f"4-bit floating point (E2M1), scales in {'E8M0' if block == 32 else 'E4M3'}" in card
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "export", "--artefact", folder, "--out", "onnx")
    assert "the weights are " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        kurtail(place, "fit", "--config", recipe, "--config", name, "--model.init_args.block", "24")
    assert "block is 24, and R1 turns" in capsys.readouterr().err


def test_flatquant_down_the_road(
    kurtail: Callable[..., None], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Maps in the file, the same logits loaded, what the page and inspect say; and clips alone over another method."""
    place = recipe.parent
    short = [f"--quantization.transforms.{name}={n}" for name, n in {"epochs": 2, "windows": 2, "seqlen": 48}.items()]
    kurtail(place, "fit", "--config", recipe, "--config", "flatquant", *short)
    folder = place / "artifacts" / "tied-kurtail-w4a4kv4"
    tensors = {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}
    maps = {name: tuple(t.shape) for name, t in tensors.items() if "layers.1." in name and "transform" in name}
    at = {name.removeprefix("model.layers.1.").replace(".transform", ""): shape for name, shape in maps.items()}
    assert at["self_attn.q_proj.left"] == at["mlp.up_proj.left"] == (6, 6)
    assert at["self_attn.o_proj.left"] == (6, 6)
    assert at["mlp.down_proj.right"] == (43, 43)
    assert at["self_attn.key_transform.right"] == (16, 16)
    assert len(at) == 2 * 8
    window = torch.arange(9)[None]
    before, after = (model(input_ids=window).logits for model in both(folder))
    assert torch.equal(before, after)
    by_transformers = AutoModelForCausalLM.from_pretrained(folder)(input_ids=window).logits
    assert torch.equal(by_transformers, kurtail_pl.load(folder)(input_ids=window).logits)
    page = (folder / "README.md").read_text()
    assert "trained on each block's float output: Kronecker maps with invertible factors, diagonals, clips" in page
    assert re.search(r"the largest condition number of a map is [1-9]\.\d", page)
    card = json.loads((folder / "kurtail.json").read_text())
    assert (card["method"], card["rounding"]) == ("flat-rtn", "flat-rtn")
    ratios = [ratio for layer in card["clips"] for ratio in layer.values()]
    found = re.search(r"clips: activations, keys, values have ratios of (\S+) to (\S+), site by site, in place", page)
    assert found
    assert [float(end) for end in found.groups()] == pytest.approx([min(ratios), max(ratios)], rel=5e-3)
    capsys.readouterr()
    kurtail(place, "inspect", folder)
    assert "a learned map before each quantizer" in capsys.readouterr().out
    flags = [*short, "--quantization.scheme.cache.keys.group_size=null", "--overwrite"]
    kurtail(place, "fit", "--config", recipe, "--config", "quarot", "--config", "trained-clips", *flags)
    card = json.loads((folder / "kurtail.json").read_text())
    assert (card["method"], card["transforms"], len(card["clips"])) == ("quarot", [], 4)


def both(folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model with packed weights, and with the floats that they stand for."""
    packed, unpacked = kurtail_pl.load(folder), kurtail_pl.load(folder)
    unpack_weights(unpacked)
    return packed, unpacked


@pytest.mark.parametrize("verb", ["plan", "fit"])
def test_blocks_that_do_not_divide_are_refused_before_training(
    verb: str, kurtail: Callable[..., None], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        kurtail(recipe.parent, verb, "--config", recipe, "--config", "mxfp4")
    assert "weights.group_size is 32 and this model has 48 channels to divide" in capsys.readouterr().err
    assert not (recipe.parent / "runs" / "rotations.safetensors").exists()
