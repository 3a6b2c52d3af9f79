"""Fused folders against transformers' own logits; wrong rotations and folds stop at the gate and leave nothing."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from logits import change
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from kurtail_pl.errors import ArtefactError, DiskFull, GateError, KurtailError, UnsupportedArchitecture
from kurtail_pl.maths.hadamard import HadamardFactors
from kurtail_pl.methods.scheme import FLOAT
from kurtail_pl.stages.fusion.passes import Fuser
from kurtail_pl.stages.fusion.scales import ScaleSpec
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.storage.rotation_file import FILE
from kurtail_pl.storage.weights import INDEX
from kurtail_pl.surgery import folding
from kurtail_pl.surgery.rotations import Rotations, random_rotations

PARTS = ("residual", "value", "query_key", "attention_output", "mlp_hidden")


@pytest.mark.parametrize("which", ["tiny", "tied", "stories"])
def test_logits_are_the_originals(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder: Path = request.getfixturevalue(which)
    rotations = random_rotations(AutoConfig.from_pretrained(folder), 5)
    assert change(folder, fuse(Checkpoint(folder), rotations, "quarot", tmp_path / "fused")) < 1e-4


@pytest.mark.parametrize("kept", [(), *[(part,) for part in PARTS], ("value", "query_key", "mlp_hidden")])
def test_each_rotation_alone(tiny: Path, rotations: Rotations, tmp_path: Path, kept: tuple[str, ...]) -> None:
    chosen = Rotations(**{part: getattr(rotations, part) for part in kept})
    assert change(tiny, fuse(Checkpoint(tiny), chosen, "test", tmp_path / "fused")) < 1e-4


def test_value_rotations_of_each_kv_head(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    value = rotations.value
    assert value is not None
    per_head = torch.stack([value, value.flip(0)], 1)
    chosen = replace(rotations, value=per_head)
    assert change(tiny, fuse(Checkpoint(tiny), chosen, "test", tmp_path / "fused")) < 1e-4


def test_without_rotations_the_weights_are_the_originals(tied: Path, tmp_path: Path) -> None:
    original, fused = Checkpoint(tied), Checkpoint(fuse(Checkpoint(tied), Rotations(), "rtn", tmp_path / "fused"))
    assert set(fused.names) == {*original.names, "lm_head.weight"}
    assert original.config.tie_word_embeddings
    assert not fused.config.tie_word_embeddings
    for name in original.names:
        assert torch.equal(fused.tensor(name), original.tensor(name)), name
    assert torch.equal(fused.tensor("lm_head.weight"), original.tensor("model.embed_tokens.weight"))


def test_the_embedding_is_rotated_and_not_centred(tiny: Path, fused: Path, rotations: Rotations) -> None:
    embedding = Checkpoint(tiny).tensor("model.embed_tokens.weight").double()
    assert embedding.mean(-1).abs().min() > 0.01
    written = Checkpoint(fused).tensor("model.embed_tokens.weight")
    assert torch.equal(written, (embedding @ rotations.residual).float())


def test_norms_are_folded_and_weights_float32(fused: Path) -> None:
    checkpoint = Checkpoint(fused)
    norms = [name for name in checkpoint.names if "norm" in name]
    assert len(norms) == 9
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        assert tensor.dtype == torch.float32
        assert name not in norms or torch.equal(tensor, torch.ones(48))


def test_files(fused: Path, tiny: Path) -> None:
    files = {path.name for path in fused.iterdir()}
    assert files >= {"model.safetensors", "config.json", "kurtail.json", FILE, "tokenizer.json"}
    assert "generation_config.json" in files
    assert not [name for name in files if name.startswith(("model-", "part-", ".")) or name == INDEX]
    assert [path.name for path in fused.parent.iterdir()] == ["fused"]
    config = AutoConfig.from_pretrained(fused)
    assert (config.tie_word_embeddings, config.dtype) == (False, torch.float32)
    text = "The old king found a dragon."
    assert (
        AutoTokenizer.from_pretrained(fused)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(tiny)(text)["input_ids"]
    )


def test_card(fused: Path, tiny: Path, rotations: Rotations) -> None:
    card = json.loads((fused / "kurtail.json").read_text())
    checkpoint = Checkpoint(tiny)
    assert card["method"] == "quarot"
    assert card["scheme"] == FLOAT.to_dict()
    assert card["source"] == {"model": "tiny", "sha256": checkpoint.sha256}
    assert card["tokenizer_sha256"] == checkpoint.tokenizer_sha256()
    assert card["rotations"] == rotations.origin
    assert card["rotations_sha256"] == sha256_of(fused / FILE)
    assert card["sha256"] == {p.name: sha256_of(p) for p in fused.iterdir() if p.name != "kurtail.json"}
    assert 0 < card["gate"]["float64"] < 1e-8
    assert card["gate"]["float64"] < card["gate"]["float32"] < 1e-4
    assert card["cost"]["fuse"]["peak_bytes"] > 0
    assert card["versions"]["torch"] == torch.__version__


def test_an_existing_folder_is_refused_or_overwritten(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    folder.mkdir()
    (folder / "old").write_text("mine")
    with pytest.raises(ArtefactError, match="fused exists"):
        fuse(Checkpoint(tiny), rotations, "test", folder)
    assert [path.name for path in folder.iterdir()] == ["old"]
    fuse(Checkpoint(tiny), rotations, "test", folder, overwrite=True)
    assert not (folder / "old").exists()
    assert change(tiny, folder) < 1e-4


def scaled(factors: HadamardFactors | None) -> HadamardFactors:
    assert factors is not None
    return HadamardFactors(factors.left * 1.001, factors.right, factors.construction)


def wrong(rotations: Rotations, part: str) -> Rotations:
    """One rotation that is none."""
    residual, value = rotations.residual, rotations.value
    assert residual is not None
    assert value is not None
    value = value.clone()
    value[2] *= 1 + 1e-6
    nan = residual.clone()
    nan[3, 5] = float("nan")
    changes: dict[str, dict[str, Tensor | HadamardFactors]] = {
        "R1": {"residual": residual * (1 + 1e-6)},
        "R1 nan": {"residual": nan},
        "R2": {"value": value},
        "R3": {"query_key": scaled(rotations.query_key)},
        "R4": {"attention_output": scaled(rotations.attention_output)},
        "R5": {"mlp_hidden": scaled(rotations.mlp_hidden)},
    }
    return replace(rotations, **changes[part])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("R1", r"rotating the residual stream \(R1\) in model.layers.0 changed"),
        ("R2", r"rotating the values \(R2\) in model.layers.2 changed"),
        ("R3", r"rotating online in model.layers.0 changed"),
        ("R4", r"rotating online in model.layers.0 changed"),
        ("R5", r"rotating online in model.layers.0 changed"),
    ],
)
def test_a_matrix_that_is_no_rotation_leaves_nothing(
    tiny: Path, rotations: Rotations, tmp_path: Path, part: str, message: str
) -> None:
    with pytest.raises(GateError, match=message):
        fuse(Checkpoint(tiny), wrong(rotations, part), "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_a_matrix_of_no_numbers_leaves_nothing(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    with pytest.raises(KurtailError):
        fuse(Checkpoint(tiny), wrong(rotations, "R1 nan"), "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_a_fold_the_wrong_way_round_is_seen(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old folder stands, too."""
    right = folding.rotate_output
    monkeypatch.setattr(folding, "rotate_output", lambda linear, rotation: right(linear, rotation.T))
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "old").write_text("kept")
    with pytest.raises(GateError, match=r"\(R1\) in model.layers.0"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused", overwrite=True)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["fused", "fused/old"]


def test_a_fold_that_forgets_a_norm_is_seen(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = folding.fold_norm
    monkeypatch.setattr(folding, "fold_norm", lambda norm, readers, offset: right(norm, list(readers)[:1], offset))
    with pytest.raises(GateError, match=r"folding the norms in model.layers.0"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_a_head_rotated_the_wrong_way_is_seen(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, weights = Fuser._into_residual, []

    def only_the_embedding(self: Fuser, x: Tensor) -> Tensor:
        if x.ndim == 2:
            weights.append(x)
        return x @ rotations.residual.T if len(weights) == 2 else right(self, x)  # type: ignore[union-attr]

    monkeypatch.setattr(Fuser, "_into_residual", only_the_embedding)
    with pytest.raises(GateError, match=r"the fused model changed"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    tiny: Path, rotations: Rotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(DiskFull, match="fused needs"):
        fuse(Checkpoint(tiny), rotations, "test", tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_is_refused(tiny: Path, rotations: Rotations, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "model")
    config = (copy / "config.json").read_text().replace('"llama"', '"bert"')
    (copy / "config.json").write_text(config)
    with pytest.raises(UnsupportedArchitecture, match="bert"):
        fuse(Checkpoint(copy), rotations, "test", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("other", ["nothing", "chat_template.jinja", "scales"])
def test_a_model_is_fused_anew_when_anything_that_decides_it_has_changed(
    tiny: Path, rotations: Rotations, text: TextSpec, tmp_path: Path, other: str
) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    fuse(Checkpoint(model), rotations, "quarot", tmp_path / "fused")
    written = (tmp_path / "fused" / "kurtail.json").stat().st_mtime_ns
    scales = ScaleSpec(["values"], text) if other == "scales" else None
    if other == "chat_template.jinja":
        (model / other).write_text("{{ messages }}")
    if other == "nothing":
        # Another cost, another place.
        rotations = replace(rotations, origin={**rotations.origin, "cost": {"seconds": 9.0}})
        model = model.rename(tmp_path / "renamed")
        fuse(Checkpoint(model), rotations, "quarot", tmp_path / "fused")
        assert (tmp_path / "fused" / "kurtail.json").stat().st_mtime_ns == written
        return
    with pytest.raises(ArtefactError, match="exists"):
        fuse(Checkpoint(model), rotations, "quarot", tmp_path / "fused", scales=scales)
    fuse(Checkpoint(model), rotations, "quarot", tmp_path / "fused", overwrite=True, scales=scales)
    assert (tmp_path / "fused" / "kurtail.json").stat().st_mtime_ns > written
    if other != "scales":
        assert (tmp_path / "fused" / other).read_text() == "{{ messages }}"
