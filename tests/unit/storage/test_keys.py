"""Every entry of a key both ways: what decides an output changes it, what does not leaves it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from kurtail_pl.errors import ConfigError
from kurtail_pl.methods import GPTQ, MXFP4, NVFP4, RTN, Mixed, Normal, PerTokenHead, Progressive, Skim, Uniform
from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.stages.evaluation.tasks.spec import TaskSpec
from kurtail_pl.stages.fusion.stage import fuse
from kurtail_pl.stages.quantization import QuantizeSpec, quantize
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import Origin
from kurtail_pl.storage.card import write_card
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.keys import (
    companions_sha256,
    folder_sha256,
    model_key,
    require_learned_on,
    settings_key,
    tokens_sha256,
)
from kurtail_pl.surgery.rotations import Rotations, random_rotations


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def scale_head(folder: Path) -> None:
    path = next(p for p in folder.glob("model*.safetensors") if "lm_head.weight" in load_file(p))
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 2}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [scale_head, lambda folder: edit(folder / "config.json", rms_norm_eps=1e-4)],
    ids=["weights", "configuration"],
)
def test_a_plain_model_is_its_weights_and_configuration(
    tiny: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "elsewhere"))
    assert model_key(Checkpoint(copy)) == model_key(Checkpoint(tiny))
    change(copy)
    assert model_key(Checkpoint(copy)) != model_key(Checkpoint(tiny))


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two artefacts of equal weights, one of them made twice, and one of other online rotations."""
    place = tmp_path_factory.mktemp("made")
    config = AutoConfig.from_pretrained(tiny)

    def folder(name: str, cost: float, seed: int, scheme: Scheme) -> Path:
        fixed = random_rotations(config, 0)
        other = random_rotations(config, seed)
        rotations = replace(fixed, query_key=other.query_key, origin={"cost": {"seconds": cost}})
        fused = fuse(Checkpoint(tiny), rotations, "quarot", place / f"{name}-fused")
        return quantize(fused, QuantizeSpec(scheme=scheme, rounder=RTN()), place / name)

    four, sixteen = Scheme(), Scheme(activations=None, cache=None)
    return {
        "one": folder("one", 1.0, 0, four),
        "again": folder("again", 2.0, 0, four),
        "scheme": folder("scheme", 1.0, 0, sixteen),
        "online": folder("online", 1.0, 1, four),
    }


def test_a_folder_of_ours_counts_without_its_cost(made: dict[str, Path]) -> None:
    assert json.loads((made["one"] / "kurtail.json").read_text()) != json.loads(
        (made["again"] / "kurtail.json").read_text()
    )
    assert folder_sha256(made["one"]) == folder_sha256(made["again"])


@pytest.mark.parametrize("other", ["scheme", "online"])
def test_scheme_and_online_rotations_count_where_weights_are_equal(made: dict[str, Path], other: str) -> None:
    one, two = (sorted(made[name].glob("model*.safetensors")) for name in ("one", other))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert model_key(Checkpoint(made["one"])) != model_key(Checkpoint(made[other]))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json"])
def test_every_file_of_a_folder_of_ours_counts(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(made["one"], tmp_path / "copy"))
    assert folder_sha256(copy) == folder_sha256(made["one"])
    edit(copy / name, something=1)
    card = json.loads((copy / "kurtail.json").read_text())
    (copy / "kurtail.json").unlink()
    write_card(copy, {key: value for key, value in card.items() if key not in ("format", "sha256")})
    assert folder_sha256(copy) != folder_sha256(made["one"])


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "tokenizer.json"])
def test_files_that_are_copied_along_count(tiny: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / "notes.txt").write_text("copied by nobody")
    assert companions_sha256(Checkpoint(copy)) == companions_sha256(Checkpoint(tiny))
    with (copy / name).open("a") as file:
        file.write("\n")
    assert companions_sha256(Checkpoint(copy)) != companions_sha256(Checkpoint(tiny))


def test_settings_count_and_the_names_of_files_do_not() -> None:
    spec = QuantizeSpec(text=TextSpec("./a.txt", windows=3, seqlen=8))
    assert settings_key(spec) == settings_key(replace(spec, text=replace(spec.text, source="/elsewhere/a.txt")))
    others = [
        replace(spec, seed=1),
        replace(spec, rounder=RTN()),
        replace(spec, text=replace(spec.text, seqlen=9)),
        replace(spec, scheme=Scheme(cache=PerTokenHead(None))),
    ]
    assert len({json.dumps(settings_key(each)) for each in [spec, *others]}) == 5
    assert settings_key(TaskSpec(folder="a")) == settings_key(TaskSpec(folder="b"))
    assert settings_key(TaskSpec(limit=1)) != settings_key(TaskSpec(limit=2))


ORIGIN = Origin("model", "m" * 64, "t" * 64, "text", "x" * 64, 3, 8, 20, 0)


@pytest.mark.parametrize("name", asdict(ORIGIN))
def test_a_store_is_what_it_was_made_from(name: str) -> None:
    value = getattr(ORIGIN, name)
    other = replace(ORIGIN, **{name: value + (1 if isinstance(value, int) else "x")})
    assert (other.key == ORIGIN.key) == (name in ("model", "text"))


def test_tokens_count_with_their_shape() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert tokens_sha256(tokens) == tokens_sha256(tokens.clone().T.contiguous().T)
    changed = tokens.clone()
    changed[1, 2] += 1
    assert len({tokens_sha256(each) for each in (tokens, tokens.view(3, 2), changed, tokens[:1])}) == 4


@pytest.mark.parametrize("nested", [True, False], ids=["activations", "windows"])
def test_rotations_of_another_model_are_refused(nested: bool) -> None:
    data: dict[str, Any] = {"model_sha256": "a" * 64}
    rotations = Rotations(origin={"data": {"activations": data} if nested else data})
    require_learned_on(rotations, "a" * 64, Path("model"))
    require_learned_on(Rotations(), "b" * 64, Path("model"))
    with pytest.raises(ConfigError, match="learned on another model than that of model"):
        require_learned_on(rotations, "b" * 64, Path("model"))


def test_methods_count_by_their_kinds() -> None:
    """Two kinds may have the same settings, or none."""
    weights = [MXFP4(), NVFP4(), Uniform(group_size=32), Normal(group_size=32), Progressive(32), Mixed(), Skim()]
    rounders = [RTN(), GPTQ()]
    keys = [str(settings_key(QuantizeSpec(Scheme(each), rounder))) for each in weights for rounder in rounders]
    assert len(set(keys)) == len(keys)
