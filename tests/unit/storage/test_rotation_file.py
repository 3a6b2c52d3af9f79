"""Rotations that are damaged, of another kind, or of another model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

import kurtail_pl
from kurtail_pl.cli import verbs
from kurtail_pl.cli.main import main
from kurtail_pl.errors import CheckpointError
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.storage.card import read_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.rotation_file import FILE, read_rotations, require_rotations_of, write_rotations
from kurtail_pl.surgery.rotations import Rotations, random_rotations

CONFIG = LlamaConfig(
    hidden_size=48,
    intermediate_size=172,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
)
"""The sizes of the tiny model."""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_rotations(tmp_path / FILE, random_rotations(CONFIG, 0))
    return tmp_path / FILE


def rewrite(path: Path, description: Any = ..., **tensors: Any) -> None:
    """Change a file's description or tensors; `...` removes one."""
    kept = {**load_file(path), **tensors}
    text = json.dumps({"origin": {}, "constructions": {}}) if description is ... else description
    save_file({key: value for key, value in kept.items() if value is not ...}, path, {"rotations": text})


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_files_cut_short(written: Path, keep: int) -> None:
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{FILE} is damaged \(.*\); copy the file again, or run") as error:
        read_rotations(written)
    assert len(str(error.value)) < 300


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"rotations .*{FILE} do not exist; name the {FILE} that kurtail fit"):
        read_rotations(tmp_path / FILE)


def test_weights_are_no_rotations(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.safetensors holds no rotations: its metadata has no 'rotations'"):
        read_rotations(tiny / "model.safetensors")


@pytest.mark.parametrize(
    "description",
    [
        *("", "[]", "{}", "[" * 10_000, '{"constructions": {}}', '{"origin": 5, "constructions": {}}'),
        *('{"origin": {}, "constructions": {"none": "x"}}', '{"origin": {}, "constructions": {"residual": "x"}}'),
    ],
)
def test_descriptions_that_say_something_else(written: Path, description: str) -> None:
    rewrite(written, description)
    with pytest.raises(CheckpointError, match=rf"{FILE} lacks part of its rotations") as error:
        read_rotations(written)
    assert len(str(error.value)) < 300


SIZES = [
    ({"num_hidden_layers": 7}, "value is [4, 16, 16], the model wants [7, 16, 16]"),
    ({"num_attention_heads": 4}, "attention_output has size 96, the model wants 64"),
    ({"intermediate_size": 96}, "mlp_hidden has size 172, the model wants 96"),
    ({"hidden_size": 96}, "residual is [48, 48], the model wants [96, 96]"),
    ({"head_dim": 8}, "query_key has size 16, the model wants 8"),
]


@pytest.mark.parametrize(("sizes", "message"), SIZES, ids=[str(sizes) for sizes, _ in SIZES])
def test_rotations_of_another_model_are_refused(sizes: dict[str, int], message: str) -> None:
    other = LlamaConfig(**{**CONFIG.to_dict(), **sizes})
    with pytest.raises(CheckpointError, match=f"belong to another model: .*{re.escape(message)}.*; give those"):
        require_rotations_of(other, random_rotations(CONFIG, 0), "the rotations")


@pytest.mark.parametrize("per_head", [False, True])
def test_rotations_of_this_model_are_taken(per_head: bool) -> None:
    rotations = random_rotations(CONFIG, 0)
    assert rotations.value is not None
    value = rotations.value.unsqueeze(1).expand(4, 2, 16, 16) if per_head else rotations.value
    require_rotations_of(CONFIG, replace(rotations, value=value), "the rotations")
    require_rotations_of(CONFIG, Rotations(), "no rotations")


def test_factors_that_are_not_square_fit_no_model(written: Path) -> None:
    rotations = random_rotations(CONFIG, 0)
    assert rotations.mlp_hidden is not None
    cut = replace(rotations.mlp_hidden, left=rotations.mlp_hidden.left[:, :3])
    with pytest.raises(CheckpointError, match="mlp_hidden has size 0"):
        require_rotations_of(CONFIG, replace(rotations, mlp_hidden=cut), "the rotations")


def test_fuse_refuses_them_and_leaves_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = random_rotations(LlamaConfig(**{**CONFIG.to_dict(), "num_hidden_layers": 7}), 0)
    with pytest.raises(CheckpointError, match="belong to another model"):
        fuse(Checkpoint(tiny), other, "kurtail", tmp_path / "fused")
    write_rotations(tmp_path / FILE, other)
    with pytest.raises(SystemExit, match="1"):
        main(["fuse", "--model", str(tiny), "--rotations", str(tmp_path / FILE), "--out", str(tmp_path / "fused")])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"rotations {tmp_path / FILE} belong to another model" in line
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize("method", ["spinquant", "kurtail-plus"])
def test_fuse_files_rotations_under_the_method_of_their_file(tiny: Path, tmp_path: Path, method: str) -> None:
    drawn = random_rotations(CONFIG, 0)
    write_rotations(tmp_path / FILE, replace(drawn, origin={"method": method}))
    verbs.fuse(str(tiny), tmp_path / "fused", tmp_path / FILE)
    verbs.fuse(str(tiny), tmp_path / "again", tmp_path / "fused" / FILE)
    assert [read_card(tmp_path / folder)["method"] for folder in ("fused", "again")] == [method, method]


def test_fuse_files_random_hadamards_under_quarot_and_refuses_what_has_no_name(tiny: Path, tmp_path: Path) -> None:
    verbs.fuse(str(tiny), tmp_path / "fused", method="quarot")
    verbs.fuse(str(tiny), tmp_path / "again", tmp_path / "fused" / FILE)
    cards = [read_card(tmp_path / folder) for folder in ("fused", "again")]
    assert [card["method"] for card in cards] == ["quarot", "quarot"]
    assert cards[0]["rotations_sha256"] == cards[1]["rotations_sha256"]
    write_rotations(tmp_path / FILE, random_rotations(CONFIG, 0))
    with pytest.raises(CheckpointError, match="does not name the method that learned it; run kurtail fit again"):
        verbs.fuse(str(tiny), tmp_path / "third", tmp_path / FILE)


@pytest.mark.parametrize("content", ['{"temperature": 0.7,', "[]"])
def test_generation_settings_that_nobody_can_read_are_left_out(tiny: Path, tmp_path: Path, content: str) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    (model / "generation_config.json").write_text(content)
    folder = fuse(Checkpoint(model), Rotations(), "none", tmp_path / "fused")
    assert not (folder / "generation_config.json").exists()
    kurtail_pl.load(folder)
