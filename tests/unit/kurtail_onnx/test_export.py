"""The export folder: what it holds, that its bytes repeat, and what is refused before or instead of writing it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from exports import has_torchs_logits
from families import tiny_family
from kurtail_onnx.exporter import ONNX
from kurtail_onnx.run.folder import Export
from safetensors.torch import load_file, save_file

import kurtail_pl
from kurtail_pl.errors import (
    ArtefactError,
    CheckFailed,
    ConfigError,
    DiskFull,
    KurtailError,
    UnsupportedArchitecture,
)
from kurtail_pl.maths.quantizers import Quantizer
from kurtail_pl.methods import (
    CacheFormat,
    FloatZero,
    Int4PerTokenHead,
    Normal,
    PerTokenHead,
    Progressive,
    Q4_0Cache,
    Sinks,
    Sparse,
    Uniform,
)
from kurtail_pl.stages.export import export
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.storage.card import scheme_of
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.storage.rotation_file import read_rotations
from kurtail_pl.surgery.rotations import Rotations

MakeArtefact = Callable[..., Path]


def description_of(folder: Path) -> dict[str, Any]:
    description: dict[str, Any] = json.loads((folder / "kurtail_export.json").read_text())
    return description


def test_the_folder_is_complete(exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("model.onnx", "model.onnx.data", "kurtail_export.json", "README.md", "config.json"),
        *("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    } - ({"generation_config.json"} - names)
    assert "not checked" in (exported / "README.md").read_text()
    assert list(exported.parent.glob(".*")) == []


def test_the_same_bytes_again(artefact: Path, exported: Path, tmp_path: Path) -> None:
    again = export(artefact, tmp_path / "again", ONNX(), check=False)
    for path in exported.iterdir():
        if path.suffix in (".onnx", ".data", ".json"):
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_opset_versions_and_readable_names(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert model.ir_version == 10
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 23, "kurtail": 1}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    for name in (
        "/model/layers.2/mlp/down_proj/MatMul",
        "/model/layers.2/mlp/mlp_hidden_R5/Hadamard",
        "/model/layers.0/self_attn/attention_output_R4/Hadamard",
        "/model/layers.0/self_attn/qkv_in/act_q/QuantizeLinear",
        "/model/layers.0/self_attn/kv_cache/key_value/Concat",
    ):
        assert name in names
    assert "model.layers.2.mlp.down_proj.codes" in {i.name for i in model.graph.initializer}


def test_the_io_table_is_the_sessions(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    for table, values in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
        described = [(row["name"], f"tensor({row['dtype']})", row["shape"]) for row in description_of(exported)[table]]
        assert described == [(value.name, value.type, value.shape) for value in values]


def test_the_description_says_where_everything_comes_from(artefact: Path, exported: Path) -> None:
    description, card = description_of(exported), json.loads((artefact / "kurtail.json").read_text())
    assert description["source"] == {"artefact": artefact.name, "method": "quarot", **card["source"]}
    assert {
        name: description["rotations"][name]["paper"] for name in ("query_key", "attention_output", "mlp_hidden")
    } == {
        "query_key": "R3",
        "attention_output": "R4",
        "mlp_hidden": "R5",
    }
    rotations = read_rotations(artefact / "rotations.safetensors")
    assert rotations.mlp_hidden is not None
    assert description["rotations"]["mlp_hidden"]["construction"] == rotations.mlp_hidden.construction
    assert description["rotations"]["origin"] == {"seed": 0}
    for name, digest in description["sha256"].items():
        assert sha256_of(exported / name) == digest
    assert set(description["session"]) == {"exact", "fast"}


def test_formulas_can_be_computed(exported: Path) -> None:
    """The lines of the key quantizer are Python once its words are functions."""
    formula = description_of(exported)["quantizers"]["keys"]["formula"]
    x = np.random.default_rng(0).normal(size=16)

    def larger(a: Any, b: float | None = None) -> Any:
        return np.max(a) if b is None else np.maximum(a, b)

    def smaller(a: Any, b: float | None = None) -> Any:
        return np.min(a) if b is None else np.minimum(a, b)

    words = {"x": x, "min": smaller, "max": larger, "clip": np.clip, "round_half_even": np.round}
    for line in formula:
        if " where " not in line:
            exec(line, words)
    low, high = 0.95 * x.min(), 0.95 * x.max()
    values = np.clip(np.round(x / ((high - low) / 15)) + np.round(-low / ((high - low) / 15)), 0, 15)
    np.testing.assert_array_equal(words["code"], values)
    assert np.abs(words["value"] - np.clip(x, low, high)).max() <= (high - low) / 30 + 1e-12 + (high - low) / 15 / 2


def test_quantized_linears_take_a_quarter(story_artefact: Path, tmp_path: Path) -> None:
    folder = export(story_artefact, tmp_path / "onnx", ONNX(), check=False)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    codes = {i.name: i for i in model.graph.initializer if i.name.endswith(".codes")}
    assert len(codes) == 35
    length = {name: {e.key: int(e.value) for e in i.external_data if e.key != "location"} for name, i in codes.items()}
    stored = sum(entry["length"] for entry in length.values())
    assert stored <= 0.27 * 2 * sum(int(np.prod(i.dims)) for i in codes.values())


@pytest.mark.parametrize("damage", ["missing", "changed", "newer", "foreign"])
def test_damaged_artefacts_are_refused(damage: str, artefact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "artefact"
    shutil.copytree(artefact, copy)
    shard = copy / "model.safetensors"
    if damage == "missing":
        shard.unlink()
    elif damage == "changed":
        shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    elif damage == "newer":
        card = json.loads((copy / "kurtail.json").read_text())
        (copy / "kurtail.json").write_text(json.dumps(card | {"format": 99}))
    else:
        (copy / "kurtail.json").unlink()
    with pytest.raises(ArtefactError):
        export(copy, tmp_path / "onnx", ONNX())
    assert [path.name for path in tmp_path.iterdir()] == ["artefact"]


REFUSED: dict[str, tuple[ONNX, dict[str, Any], str]] = {
    "3-bit-weights": (ONNX(), {"weights": Uniform(3)}, "weights have 3 bits"),
    "6-bit-activations": (ONNX(), {"activations": Quantizer(6)}, "activations have 6 bits"),
    "2-bit-keys": (ONNX(), {"cache": PerTokenHead(Quantizer(2, False))}, "keys have 2 bits"),
    "cache-groups": (
        ONNX(),
        {"cache": PerTokenHead(values=Quantizer(4, False, group_size=8))},
        "values have groups of 8",
    ),
    "kernel-groups": (ONNX(weights="matmulnbits"), {"weights": Uniform(group_size=4)}, "groups of 4"),
    "integer-two-levels": (ONNX(weights="integer"), {"weights": Progressive(4)}, "--to.weights integer"),
    "integer-groups": (ONNX(weights="integer"), {"weights": Uniform(group_size=4)}, "--to.weights integer"),
    "integer-asymmetric": (ONNX(weights="integer"), {"activations": Quantizer(4, False)}, "--to.weights integer"),
    "integer-heads": (ONNX(weights="integer"), {"attention_output": "head"}, "attention_output 'head'"),
    "sinks": (ONNX(), {"cache": PerTokenHead(sinks=Sinks(2, 8))}, "the first 2 tokens in 8 bits, and a .*all.* alike"),
    "side": (ONNX(), {"side": Sparse(0.1)}, "10 % of the weights in 16 bits, .* quantize with side: null"),
    "uneven-levels": (
        ONNX(),
        {"weights": Normal()},
        "levels of the normal.* spaced integers",
    ),
    "zero-points-in-floating-point": (
        ONNX(),
        {"weights": FloatZero(group_size=4)},
        "zero points in floating point.* integer zero points",
    ),
    "floating-point-inputs": (
        ONNX(),
        {"activations": Quantizer(group_size=4, levels="e2m1", scales="e8m0")},
        "activations are 4-bit floating point .*E2M1.*, and a graph rounds to integers with float scales alone",
    ),
    "floating-point-cache": (
        ONNX(),
        {"cache": PerTokenHead(keys=Quantizer(levels="e2m1", scales="e4m3"))},
        "keys are 4-bit floating point .*levels: integer and scales: float32",
    ),
    "integer-double": (ONNX("fp64", weights="integer"), {}, "--to.weights integer has no doubles"),
    "kernel-double": (ONNX("fp64", weights="matmulnbits"), {}, "--to.weights matmulnbits has no doubles"),
    "integer-float": (ONNX(weights="integer", act="none"), {}, "--to.weights integer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_onnx_cannot_say_is_refused(case: str, tiny: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    spec, quantizers, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        export(make_artefact(tiny, **quantizers), tmp_path / "onnx", spec)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cache", [Int4PerTokenHead(), Q4_0Cache()], ids=lambda cache: cache.label)
def test_caches_of_other_runtimes_are_refused(
    cache: CacheFormat, make_family: Callable[..., Path], make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    artefact = make_artefact(make_family("phi3"), cache=cache)
    assert scheme_of(artefact).cache == cache
    with pytest.raises(ConfigError, match=r"the cache keeps keys and values in .*, and a graph keeps all tokens"):
        export(artefact, tmp_path / "onnx", ONNX())
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("name", "factor"),
    [("model.embed_tokens", 3e5), ("model.embed_tokens", 1e-7), ("model.layers.1.mlp.down_proj", 1e-6)],
)
def test_what_float16_does_not_hold_is_exported_in_float32_alone(
    name: str, factor: float, tiny: Path, make_artefact: MakeArtefact, tmp_path: Path
) -> None:
    """An embedding beyond float16, one that vanishes in it, and a linear whose scales do."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[f"{name}.weight"] *= factor
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    artefact = make_artefact(model, activations=None, cache=None)
    with pytest.raises(ConfigError, match=rf"{name}\.(weight|scale) has values of .* --to.dtype fp32"):
        export(artefact, tmp_path / "half", ONNX("fp16"))
    assert not (tmp_path / "half").exists()
    folder = export(artefact, tmp_path / "single", ONNX(), check=True)
    assert has_torchs_logits(kurtail_pl.load(artefact), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0}},
            "'proportional', expected one of default",
        ),
    ],
)
def test_unknown_parts_are_refused(changes: dict[str, Any], message: str, tied: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_family("qwen3", **changes).save_pretrained(model)
    for file in tied.glob("tokenizer*"):
        shutil.copy(file, model)
    fused = fuse(Checkpoint(model), Rotations(), "none", tmp_path / "fused")
    with pytest.raises(UnsupportedArchitecture, match=message):
        export(fused, tmp_path / "onnx", ONNX())
    assert not (tmp_path / "onnx").exists()


def test_values_that_grow_beyond_float16_fail(tiny: Path, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    """Weights that float16 holds, and a product that it does not."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 3e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    artefact = make_artefact(model, weights=None, activations=None, cache=None)
    with pytest.raises(CheckFailed, match=r"decoder layer 1 .* in fp16.*--to.dtype fp32"):
        export(artefact, tmp_path / "half", ONNX("fp16"), check=True)
    assert not (tmp_path / "half").exists()
    export(artefact, tmp_path / "single", ONNX(), check=True)


def test_an_existing_folder_stays(artefact: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "precious.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="--overwrite"):
        export(artefact, tmp_path / "onnx", ONNX())
    assert (tmp_path / "onnx" / "precious.txt").read_text() == "mine"
    export(artefact, tmp_path / "onnx", ONNX(), check=False, overwrite=True)
    assert (tmp_path / "onnx" / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()
    assert not (tmp_path / "onnx" / "precious.txt").exists()


def test_a_full_disk_leaves_nothing(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull):
        export(artefact, tmp_path / "onnx", ONNX())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["model.onnx", "model.onnx.data", "kurtail_export.json", "format"])
def test_damaged_exports_are_not_run(damage: str, exported: Path, tmp_path: Path) -> None:
    copy = tmp_path / "onnx"
    shutil.copytree(exported, copy)
    if damage == "format":
        (copy / "kurtail_export.json").write_text(json.dumps(description_of(copy) | {"format": 99}))
    else:
        (copy / damage).write_bytes((copy / damage).read_bytes()[:-9])
    with pytest.raises(KurtailError) as error:
        Export(copy)
    assert isinstance(error.value, ArtefactError)
