"""Every layout of a checkpoint that transformers reads gives transformers' logits, or is refused with its cause."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, tiny_family
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from kurtail_pl.artefact.skeleton import whole_model
from kurtail_pl.errors import CheckpointError
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.sources import open_model
from kurtail_pl.storage.weights import INDEX, SINGLE
from kurtail_pl.streaming.walker import Walker

IDS = torch.randint(300, (1, 30), generator=torch.Generator().manual_seed(0))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

State = dict[str, Tensor]


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, change: Callable[[State], State], name: str = SINGLE) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    save_file(change(tensors), folder / name, metadata={"format": "pt"})


def split(folder: Path, parts: list[State], **index: Any) -> None:
    """Shards with an index instead of the single file."""
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **index}))


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """One file, a head of its own."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@torch.no_grad()
def assert_as_transformers(folder: Path) -> None:
    """By the loader of whole models, and layer by layer."""
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    expected = expected.eval()(IDS).logits
    torch.testing.assert_close(whole_model(open_model(str(folder)))(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    walker = Walker(Checkpoint(folder))
    embedding = walker.embedding()
    hidden = walker.embed(embedding, IDS)
    for _, layer in walker.layers("test"):
        hidden = walker.advance(layer, hidden)
    norm, head = walker.head()
    torch.testing.assert_close(walker.logits(norm, head, hidden), expected, rtol=1e-5, atol=1e-5)


def without(*names: str) -> Callable[[State], State]:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def renamed(rule: Callable[[str], str]) -> Callable[[State], State]:
    return lambda state: {rule(name): tensor for name, tensor in state.items()}


def plus(**extra: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in extra.items()}


HEADS: dict[str, tuple[bool, Callable[[State], State]]] = {
    "not tied, both stored": (False, lambda state: state),
    "tied, only the embedding stored": (True, without(HEAD)),
    "tied, only the head stored": (True, without(EMBEDDING)),
    "tied, both stored, different": (True, lambda state: state),
    "tied, both stored, equal": (True, lambda state: state | {HEAD: state[EMBEDDING].clone()}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HEADS)
def test_which_tensor_is_the_head(model: Path, case: str) -> None:
    tied, change = HEADS[case]
    edit(model, tie_word_embeddings=tied)
    rewrite(model, change)
    assert_as_transformers(model)


PREFIXES: dict[str, Callable[[str], str]] = {
    "of a base model": lambda name: name.removeprefix("model."),
    "twice": lambda name: f"model.{name}",
    "of the head": lambda name: f"model.{name}" if name == HEAD else name,
    "of some": lambda name: name.removeprefix("model.") if "layers.1" in name else name,
}


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes_that_transformers_reads(model: Path, case: str) -> None:
    rewrite(model, renamed(PREFIXES[case]))
    assert_as_transformers(model)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("stacked", [False, True])
def test_prefixes_of_mixtures(name: str, stacked: bool, tmp_path: Path) -> None:
    tiny_family(name).save_pretrained(tmp_path, save_original_format=not stacked)
    rewrite(tmp_path, renamed(PREFIXES["of a base model"]))
    assert_as_transformers(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_complete(name: str, tmp_path: Path) -> None:
    tiny_family(name).save_pretrained(tmp_path)
    assert_as_transformers(tmp_path)


def test_the_single_file_comes_before_the_index(model: Path) -> None:
    other = {name: tensor.clone() + 1 for name, tensor in load_file(model / SINGLE).items()}
    split(model, [other])
    assert Checkpoint(model).files == [model / SINGLE]
    assert_as_transformers(model)


def test_the_configuration_may_name_the_file(model: Path) -> None:
    """A file, and an index; whatever else lies beside it."""
    other = {name: tensor.clone() + 1 for name, tensor in load_file(model / SINGLE).items()}
    save_file(other, model / "other.safetensors", metadata={"format": "pt"})
    edit(model, transformers_weights="other.safetensors")
    assert Checkpoint(model).files == [model / "other.safetensors"]
    assert_as_transformers(model)
    split(model, [{name: tensor + 1 for name, tensor in other.items()}])
    edit(model, transformers_weights=INDEX)
    assert_as_transformers(model)


def test_all_of_a_shard_is_read_and_the_last_one_counts(model: Path) -> None:
    """The index names the files; what is in them is theirs."""
    state = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    middle = len(state) // 2
    first, second = dict(list(state.items())[:middle]), dict(list(state.items())[middle:])
    name = next(iter(first))
    split(model, [first, second | {name: first[name] + 1}])
    assert_as_transformers(model)
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][next(iter(second))]
    (model / INDEX).write_text(json.dumps(index))
    assert_as_transformers(model)


def test_shards_in_a_folder_within(model: Path) -> None:
    state = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    (model / "weights").mkdir()
    save_file(state, model / "weights" / "a.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(state, "weights/a.safetensors")
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_as_transformers(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_mixture_of_types(model: Path, dtype: torch.dtype) -> None:
    rewrite(model, lambda state: {n: t.to(dtype) if "proj" in n else t for n, t in state.items()})
    assert_as_transformers(model)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.1.self_attn.k_scale",
        "model.layers.1.self_attn.v_scale",
        "model.layers.4.mlp.up_proj.weight",
        "mtp.layers.0.weight",
        "score.weight",
    ],
)
def test_what_the_model_does_not_know_is_left_out(model: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(model, lambda state: state | {name: torch.ones(8)})
    with caplog.at_level(logging.WARNING, "kurtail_pl"):
        assert_as_transformers(model)
    assert (name in caplog.text) == ("inv_freq" not in name)


def wrapped(prefix: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, renamed(lambda name: prefix + name))


def pickled(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def variant(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model.fp16.safetensors")


def below(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / SINGLE).rename(folder / "weights" / SINGLE)


def no_index(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")


def outside(folder: Path) -> None:
    (folder / SINGLE).rename(folder.parent / SINGLE)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {HEAD: f"../{SINGLE}"}}))


def pointer(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def gptq(folder: Path) -> None:
    packed = {"qweight": torch.zeros(6, 48, dtype=torch.int32), "scales": torch.ones(1, 48)}
    start = "model.layers.0.self_attn.o_proj."
    rewrite(folder, lambda state: without(f"{start}weight")(state) | {start + name: t for name, t in packed.items()})


def adapter(folder: Path) -> None:
    rewrite(folder, renamed(lambda n: f"base_model.model.{n}".replace("q_proj.", "q_proj.base_layer.")))
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{which}.weight" for which in "AB"]
    rewrite(folder, lambda state: state | {name: torch.ones(4) for name in names})


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "compiled": (wrapped("_orig_mod."), r"'_orig_mod.' before .* save_pretrained on the model within"),
    "parallel": (wrapped("module."), r"'module.' before .* save_pretrained on the model within"),
    "adapter": (adapter, r"holds an adapter \(.*(base_layer|lora_[AB]).*merge_and_unload"),
    "adapter's configuration": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter; merge it"),
    "pickle": (pickled, r"pytorch_model.bin is a pickle, .*convert it by transformers"),
    "variant": (variant, r"model.fp16.safetensors is a variant; name it model.safetensors"),
    "in a folder within": (below, r"weights/model.safetensors lies in a folder within"),
    "no index": (no_index, r"is a shard without its index; add model.safetensors.index.json"),
    "outside": (outside, r"names the file '../model.safetensors', which is not in its folder"),
    "a name of nothing": (
        lambda f: edit(f, transformers_weights="other.bin"),
        r"says transformers_weights: 'other.bin', which is not a safetensors file",
    ),
    "a name outside": (
        lambda f: edit(f, transformers_weights=f"../{SINGLE}"),
        r"names the file '../model.safetensors', which is not in its folder",
    ),
    "nothing": (lambda f: (f / SINGLE).unlink(), r"has no weights: model.safetensors is missing"),
    "pointer": (pointer, r"is a pointer of git-lfs, .* run: git lfs pull"),
    "gptq": (lambda f: edit(f, quantization_config={"quant_method": "gptq", "bits": 4}), "already quantized by gptq"),
    "gptq, nothing said": (gptq, r"holds quantized weights \(model.layers.0.self_attn.o_proj.qweight\)"),
    "scale": (
        lambda f: rewrite(f, plus(model__layers__0__mlp__up_proj__weight_scale=torch.ones(1))),
        r"holds quantized weights \(model.layers.0.mlp.up_proj.weight_scale\)",
    ),
    "integers": (
        lambda f: rewrite(f, lambda s: s | {HEAD: s[HEAD].to(torch.int8)}),
        r"stores lm_head.weight in I8, .*quantized already",
    ),
    "bias of the head": (
        lambda f: rewrite(f, plus(lm_head__bias=torch.ones(300))),
        r"stores lm_head.bias, which a llama of its config.json does not have",
    ),
    "biases not asked for": (
        lambda f: edit(f, attention_bias=False),
        r"stores model.layers.0.self_attn.k_proj.bias, which a llama .*correct config.json",
    ),
    "no head": (lambda f: rewrite(f, without(HEAD)), r"no lm_head.weight, and its config.json ties it to nothing"),
    "neither, tied": (
        lambda f: (edit(f, tie_word_embeddings=True), rewrite(f, without(HEAD, EMBEDDING))),
        r"has no tensor model.embed_tokens.weight and 1 more",
    ),
    "one missing": (
        lambda f: rewrite(f, without("model.layers.1.mlp.down_proj.bias")),
        r"has no tensor model.layers.1.mlp.down_proj.bias, which its config.json asks for",
    ),
    "more layers": (
        lambda f: edit(f, num_hidden_layers=5),
        r"has no tensor model.layers.4.self_attn.q_proj.weight and 15 more",
    ),
    "another shape": (
        lambda f: edit(f, intermediate_size=160),
        r"stores model.layers.0.mlp.\w+_proj.\w+ as \[.*172.*\] and its config.json asks for \[.*160",
    ),
    "twice": (
        lambda f: rewrite(f, lambda s: s | {"norm.weight": s["model.norm.weight"] + 1}),
        r"stores model.norm.weight twice, as model.norm.weight and norm.weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_why(model: Path, case: str) -> None:
    damage, cause = REFUSED[case]
    damage(model)
    with pytest.raises(CheckpointError, match=cause) as error:
        open_model(str(model))
    message = str(error.value).replace(str(model.parent), "")
    assert "\n" not in message
    assert len(message) < 240
    assert "again" not in message


def test_a_classifier_is_no_language_model(tiny: Path, tmp_path: Path) -> None:
    LlamaForSequenceClassification.from_pretrained(tiny, ignore_mismatched_sizes=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"LlamaForSequenceClassification\): no language model"):
        open_model(str(tmp_path))


def test_experts_that_are_stored_twice(tmp_path: Path) -> None:
    tiny_family("mixtral").save_pretrained(tmp_path, save_original_format=False)
    one = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    rewrite(tmp_path, lambda state: state | {one: state["model.layers.0.mlp.experts.down_proj"][1].clone()})
    with pytest.raises(CheckpointError, match=r"stores model.layers.0.mlp.experts.1.down_proj.weight twice"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama3", {"hidden_size": 3 * 2**18}),
        ("qwen3_moe", {"num_experts": 4096, "num_local_experts": 4096, "num_hidden_layers": 300}),
        ("mixtral", {"num_local_experts": 4096, "num_hidden_layers": 300}),
    ],
)
def test_more_than_the_files_hold_is_refused_before_modules_are_made(
    tmp_path: Path, name: str, values: dict[str, int]
) -> None:
    tiny_family(name).save_pretrained(tmp_path)
    edit(tmp_path, **values)
    with pytest.raises(CheckpointError, match=r"config\.json asks for \d+ layers \d+ wide .* and the files hold"):
        open_model(str(tmp_path))
