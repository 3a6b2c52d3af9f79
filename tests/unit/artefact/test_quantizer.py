"""transformers' own loader, once `kurtail_pl` is imported: the models of `load`, bit for bit, or a clear refusal."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_family
from hub import served
from logits import IDS
from safetensors.torch import load_file, save_file
from schemes import SCHEMES
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)

import kurtail_pl
from kurtail_pl.errors import ArtefactError, CheckpointError, ConfigError
from kurtail_pl.methods import RTN
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.surgery.rotations import random_rotations


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(IDS).logits
    return logits


def are_equal(found: PreTrainedModel, wanted: PreTrainedModel) -> bool:
    """All tensors, what is computed included, with their types, and the logits."""
    tensors, others = (
        {**dict(m.named_parameters()), **dict(m.named_buffers(remove_duplicate=False))} for m in (found, wanted)
    )
    alike = tensors.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )
    return alike and not found.training and torch.equal(logits_of(found), logits_of(wanted))


@pytest.fixture(params=["fused", "artefact"])
def folder(request: pytest.FixtureRequest) -> Path:
    """With online rotations, and quantized."""
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("options", [{}, *({"dtype": d} for d in ("auto", "float32", torch.bfloat16, "float16"))])
def test_it_is_the_model_that_load_gives(folder: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    wanted = kurtail_pl.load(folder, **({} if options.get("dtype") == "auto" else options))
    assert are_equal(model, wanted)
    assert model.config.dtype == model.dtype == wanted.dtype
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()


@pytest.mark.parametrize("name", SCHEMES)
def test_whatever_the_scheme(name: str, fused: Path, text: TextSpec, tmp_path: Path) -> None:
    made = quantize(fused, QuantizeSpec(SCHEMES[name], RTN(), text=text), tmp_path / "made")
    for dtype in ("float32", "bfloat16"):
        assert are_equal(AutoModelForCausalLM.from_pretrained(made, dtype=dtype), kurtail_pl.load(made, dtype=dtype))


@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen3_moe", "glm4_moe", "gpt_oss", "apertus", "granite"])
def test_families_that_fuse_projections_or_stack_experts(
    family: str, tiny: Path, text: TextSpec, tmp_path: Path
) -> None:
    tiny_family(family).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    rotated = fuse(checkpoint, random_rotations(checkpoint.config, 0), "quarot", tmp_path / "fused")
    made = quantize(rotated, QuantizeSpec(Scheme(), RTN(), text=text), tmp_path / "made")
    for folder in (rotated, made):
        assert are_equal(AutoModelForCausalLM.from_pretrained(folder), kurtail_pl.load(folder))


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_where_it_goes_does_not_change_it(folder: Path, options: dict[str, Any]) -> None:
    assert are_equal(AutoModelForCausalLM.from_pretrained(folder, **options), kurtail_pl.load(folder))


def test_other_ways_to_the_same(folder: Path) -> None:
    wanted, config = kurtail_pl.load(folder), AutoConfig.from_pretrained(folder)
    before = config.to_dict()
    for model in (
        LlamaForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, config=config),
        AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
    ):
        assert are_equal(model, wanted)
    assert config.to_dict() == before


def test_a_padded_batch_generates_what_load_generates(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    texts, settings = ["The old king found", "A dragon"], {"do_sample": False, "max_new_tokens": 8}
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert 0 in batch["attention_mask"]
    wanted = kurtail_pl.load(folder).generate(**batch, **settings)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).generate(**batch, **settings), wanted)
    serve = pipeline("text-generation", model=str(folder), tokenizer=tokenizer)
    answers = [found[0]["generated_text"] for found in serve(texts, batch_size=2, **settings)]
    assert answers == tokenizer.batch_decode(wanted, skip_special_tokens=True)


def test_the_harness_own_class_of_models(artefact: Path) -> None:
    models = pytest.importorskip("lm_eval.models.huggingface")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It hands the folder's quantization_config back to transformers, and more.
        harness = models.HFLM(pretrained=str(artefact), device="cpu", dtype="float32")
    assert are_equal(harness.model, kurtail_pl.load(artefact))


def test_saving_copies_the_folder(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    model.save_pretrained(tmp_path / "saved")
    names = sorted(path.name for path in folder.iterdir())
    assert filecmp.cmpfiles(folder, tmp_path / "saved", names, shallow=False)[0] == names
    assert are_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="bfloat16"), model)
    model.lm_head.weight[0] += 1
    with pytest.raises(ArtefactError, match=r"lm_head.weight is not what .* holds"):
        model.save_pretrained(tmp_path / "changed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, r"dtype is torch.float64; choose float32"),
        ({"attn_implementation": "eager"}, r"attn_implementation is 'eager', .* leave it out"),
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, r"device_map puts parts on cpu and disk"),
        ({"use_kernels": True}, r"use_kernels is true"),
        ({"tp_plan": "auto"}, r"tp_plan or distributed_config is given"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, r"quantized with KurtailConfig"),
    ],
)
@pytest.mark.filterwarnings("ignore:Passing `tp_plan`")
def test_what_cannot_be_honoured_is_refused_in_a_line(artefact: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(artefact, **options)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_head_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"LlamaModel has no head .* use AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)


def test_another_configuration_than_the_weights_have_is_refused(artefact: Path) -> None:
    """transformers alone would leave a layer out with a warning."""
    with pytest.raises(CheckpointError, match=r"do not fit the configuration at model.layers.3"):
        AutoModelForCausalLM.from_pretrained(artefact, num_hidden_layers=3)


def test_nothing_else_is_quantized_by_our_name(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny, quantization_config={"quant_method": "kurtail"})


@pytest.mark.parametrize("damage", ["gone", "byte"])
def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    listed = json.loads((folder / "kurtail.json").read_text())["sha256"]
    for name in listed:
        copy = shutil.copytree(folder, tmp_path / name)
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1
        (copy / name).unlink()
        if damage == "byte":
            (copy / name).write_bytes(data)
        # Without a configuration transformers does not know whose folder it is.
        with pytest.raises((OSError, ValueError) if name == "config.json" else ArtefactError, match=name):
            AutoModelForCausalLM.from_pretrained(copy)


def test_weights_beyond_float16_are_refused(artefact: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(artefact, tmp_path / "copy")
    path = next(
        p for p in copy.glob("*.safetensors") if p.name != "rotations.safetensors" and "lm_head.weight" in load_file(p)
    )
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    tensors["lm_head.weight"][5, 3] = 7e4
    save_file(tensors, path, metadata={"format": "pt"})
    card = json.loads((copy / "kurtail.json").read_text())
    card["sha256"][path.name] = sha256_of(path)
    (copy / "kurtail.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match=r"float16, and lm_head.weight is beyond its range"):
        AutoModelForCausalLM.from_pretrained(copy, dtype="float16")


LOGITS = """
import sys
import torch

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.tensor([[3, 1, 4, 1, 5]])).logits, sys.argv[2])
"""


def logits_elsewhere(imports: str, name: str, place: Path, **environment: str) -> Tensor:
    """What a process of its own gets, by transformers' loader, with as many threads as here."""
    threads = str(torch.get_num_threads())
    code, environment = f"{imports}\n{LOGITS}", {**os.environ, "OMP_NUM_THREADS": threads, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, name, place / "logits"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    logits: Tensor = torch.load(place / "logits", weights_only=True)
    return logits


ORDERS = {
    "ours first": "import kurtail_pl, transformers",
    "transformers first": "import transformers, kurtail_pl",
    "a model first": "from transformers import LlamaForCausalLM, PreTrainedModel; import kurtail_pl, transformers",
    "the table first": "import transformers.quantizers.auto, kurtail_pl",
    "by a module of ours": "from kurtail_pl.errors import KurtailError; import transformers",
}


@pytest.fixture(scope="module")
def wanted(artefact: Path) -> Tensor:
    logits: Tensor = kurtail_pl.load(artefact)(torch.tensor([[3, 1, 4, 1, 5]])).logits
    return logits


@pytest.mark.parametrize("order", ORDERS)
def test_whichever_is_imported_first(order: str, artefact: Path, wanted: Tensor, tmp_path: Path) -> None:
    assert torch.equal(logits_elsewhere(ORDERS[order], str(artefact), tmp_path), wanted)


def test_a_name_on_the_hub(artefact: Path, wanted: Tensor, tmp_path: Path) -> None:
    """transformers downloads the configuration and the weights, and leaves card and rotations there."""
    with served(artefact, "someone/artefact") as address:
        found = logits_elsewhere(
            "import kurtail_pl, transformers", "someone/artefact", tmp_path, HF_ENDPOINT=address, HF_HOME=str(tmp_path)
        )
    assert torch.equal(found, wanted)
