"""Prepared files of every kind, and what is known of what each runtime makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from kurtail_onnx.exporter import ONNX
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kurtail_pl.cli.main import main
from kurtail_pl.errors import ArtefactError, CheckpointError
from kurtail_pl.methods import LowRank, NUQCache
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.export import export
from kurtail_pl.stages.inspection.facts import facts_of
from kurtail_pl.stages.inspection.runtimes import Verdict, verdicts
from kurtail_pl.stages.inspection.table import inspection
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec

INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
DYNAMIC = {**INT4, "strategy": "token", "dynamic": True}
ROTATED = {"config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
FUSED = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "weight_input"}]}}}
CACHE = {"config_groups": {"R3": {"type": "hadamard", "apply": [{"location": "q_attn"}, {"location": "k_cache"}]}}}


@pytest.fixture
def compressed(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder with a configuration of compressed-tensors."""

    def make(activations: dict[str, Any] | None, transforms: dict[str, Any] | None = None) -> Path:
        groups = {"group_0": {"targets": ["Linear"], "weights": INT4, "input_activations": activations}}
        quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
        if transforms is not None:
            quantization["transform_config"] = transforms
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
        return tmp_path

    return make


@pytest.fixture
def gguf(tmp_path: Path) -> Callable[..., Path]:
    """Make a GGUF file of Q4_0, with more keys."""

    def make(metadata: dict[str, Any] | None = None) -> Path:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **sizes))
        return write_gguf(tmp_path / "model.gguf", model, metadata, kind=GGMLQuantizationType.Q4_0)

    return make


def found(path: Path) -> dict[str, Verdict]:
    return {verdict.runtime: verdict for verdict in verdicts(facts_of(path))}


def results(path: Path) -> dict[str, str]:
    return {runtime: verdict.result for runtime, verdict in found(path).items()}


def test_an_artefact_runs_in_torch_and_transformers(artefact: Path) -> None:
    table = found(artefact)
    assert [name for name, each in table.items() if each.result == "exact"] == ["torch", "transformers"]
    assert table["torch"].rotations == "fused; R3, R4, R5 at run time"
    assert "\n- rotations R3, R4, R5 at run time\n" in inspection(artefact)
    assert "4-bit integers, symmetric, per output channel" in table["torch"].weights
    assert "--to gguf" in table["llama.cpp"].reason


def test_a_fused_model_is_float(fused: Path) -> None:
    assert (facts_of(fused).weights, facts_of(fused).activations, facts_of(fused).cache) == ("float", "float", "float")


def test_a_quantized_cache_alone_is_quantized(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    scheme = Scheme(weights=None, activations=None, cache=NUQCache())
    folder = quantize(fused, QuantizeSpec(scheme, text=text), tmp_path / "cache")
    assert "not quantized yet" in inspection(fused)
    assert "not quantized yet" not in inspection(folder)


def test_what_only_torch_computes_is_named(fused: Path, text: TextSpec, tmp_path: Path) -> None:
    spec = QuantizeSpec(Scheme(centre=True, prefix=[1]), text=text)
    assert facts_of(quantize(fused, spec, tmp_path / "centred")).own == ("centres", "a prefix")
    spec = QuantizeSpec(Scheme(side=LowRank(4)), text=text)
    (side,) = facts_of(quantize(fused, spec, tmp_path / "side")).own
    assert side.startswith("a side of rank 4 in 16 bits")


def test_a_plain_model(tied: Path) -> None:
    assert results(tied) == {
        "torch": "exact", "transformers": "exact", "vLLM": "exact", "SGLang": "exact", "llama.cpp": "does not load",
        "ONNX Runtime": "does not load",
    }  # fmt: skip


def test_a_graph_runs_in_onnx_runtime(artefact: Path, tmp_path: Path) -> None:
    folder = export(artefact, tmp_path / "graph", ONNX(), check=False)
    table = found(folder)
    assert [name for name, each in table.items() if each.result == "exact"] == ["ONNX Runtime"]
    assert table["ONNX Runtime"].weights == table["ONNX Runtime"].activations == "4-bit integers"


def test_a_gguf_file(gguf: Callable[..., Path]) -> None:
    table = found(gguf())
    assert (table["llama.cpp"].result, table["llama.cpp"].weights) == ("exact", "7 Q4_0")
    assert table["llama.cpp"].activations == "8-bit integers in blocks of 32"
    assert table["transformers"].result == "exact"
    assert table["vLLM"].result == "does not load"


@pytest.mark.parametrize("key", ["prism.hadamard.version", "kurtail.online"])
def test_a_gguf_file_whose_weights_expect_a_rotation_is_garbage(gguf: Callable[..., Path], key: str) -> None:
    table = found(gguf({key: 1}).parent)
    assert (table["llama.cpp"].result, table["transformers"].result) == ("garbage", "garbage")
    assert key in table["llama.cpp"].reason


def test_weights_alone_are_exact_wherever_the_layout_is_read(compressed: Callable[..., Path]) -> None:
    assert results(compressed(None, FUSED)) == {
        "torch": "does not load", "transformers": "exact", "vLLM": "exact", "SGLang": "exact",
        "llama.cpp": "approximate", "ONNX Runtime": "does not load",
    }  # fmt: skip


def test_four_bit_activations_want_a_kernel_by_name(compressed: Callable[..., Path]) -> None:
    table = found(compressed(DYNAMIC))
    default, humming = table["vLLM, as it starts by default"], table["vLLM --linear-backend humming"]
    assert (default.result, default.activations) == ("approximate", "float")
    assert (humming.result, humming.activations) == ("exact", "4-bit integers, per token")
    assert (table["transformers"].result, table["SGLang"].result) == ("exact", "approximate")


def test_a_rotation_at_run_time_is_garbage_where_nobody_reads_it(compressed: Callable[..., Path]) -> None:
    table = found(compressed(DYNAMIC, ROTATED))
    assert {name for name, each in table.items() if each.result == "garbage"} == {"transformers", "SGLang", "llama.cpp"}
    assert "transform_config" in table["transformers"].reason
    assert table["vLLM --linear-backend humming"].rotations == "fused; the input of linears rotated at run time"


def test_a_rotation_of_the_cache_changes_no_score(compressed: Callable[..., Path]) -> None:
    table = found(compressed(None, CACHE))
    assert table["vLLM"].result == table["transformers"].result == "exact"
    assert "left out, which changes no score" in table["vLLM"].rotations


def test_transformers_refuses_an_artefact_alone(artefact: Path) -> None:
    """As the table says; `kurtail_pl` is imported here, so that its loader is asked by a name that it has not."""
    assert "without it, it refuses" in found(artefact)["transformers"].reason
    settings = json.loads((artefact / "config.json").read_text())
    assert settings["quantization_config"]["quant_method"] == "kurtail"
    assert AutoModelForCausalLM.from_pretrained(artefact).config.model_type == "llama"


def test_the_verb_prints_a_row_for_each_runtime(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(artefact)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{artefact}: artefact"
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + len(found(artefact))
    assert len({len(row) for row in rows}) == 1


def test_what_is_no_model_is_refused(artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "cardless").mkdir()
    (tmp_path / "cardless" / "config.json").write_bytes((artefact / "config.json").read_bytes())
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF")
    for name, message in {
        "nothing": "does not exist; give an artefact",
        "empty": "holds no model",
        "notes.txt": "is no GGUF file",
        "cut.gguf": "cut off within its header",
        "gptq": "was quantized by 'gptq', whose files are not read here",
        "cardless": "artefact without its card",
        "list": "holds [1], expected a JSON object",
        "two": "has 2 GGUF files; name one",
    }.items():
        with pytest.raises((CheckpointError, ArtefactError)) as refused:
            facts_of(tmp_path / name)
        assert message in str(refused.value), name
        assert len(str(refused.value)) < 300
