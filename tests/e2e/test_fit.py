"""`kurtail fit`: what it refuses before any work, what it replaces, and the configuration that it keeps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer
from walks import perplexity_of

import kurtail_pl
from kurtail_pl.errors import ConfigError
from kurtail_pl.lit.callbacks import Evaluation, Fusion, RotationWriter, WeightQuantization
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.surgery.online import OnlineHadamard

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings(r"ignore:.isinstance\(treespec, LeafSpec\). is deprecated"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
Kurtail = Callable[..., None]
ARTEFACT = "artifacts/tied-kurtail-w4a4kv4"


def refused(kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path, *arguments: object) -> str:
    """The one line that a refused run leaves."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        kurtail(recipe.parent, "fit", "--config", recipe, *arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kurtail ")]
    return line


def edit(recipe: Path, change: Callable[[dict[str, Any]], None]) -> None:
    settings = yaml.safe_load(recipe.read_text())
    change(settings)
    recipe.write_text(yaml.safe_dump(settings, sort_keys=False))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of all files but TensorBoard's, which every run opens anew."""
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def trained(recipe: Path) -> bool:
    return any((recipe.parent / "runs" / made).exists() for made in ("rotations.safetensors", "checkpoints", "fused"))


def test_an_existing_folder_is_refused_before_training_and_replaced_when_asked(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    artefact = recipe.parent / ARTEFACT
    artefact.mkdir(parents=True)
    (artefact / "mine.txt").write_text("keep me")
    line = refused(kurtail, capsys, recipe)
    assert ARTEFACT in line
    assert "--overwrite" in line
    assert snapshot(artefact) == {"mine.txt": b"keep me"}
    assert not trained(recipe)

    kurtail(recipe.parent, "fit", "--config", recipe, "--overwrite")
    first = snapshot(recipe.parent)
    assert f"{ARTEFACT}/kurtail.json" in first
    assert f"{ARTEFACT}/mine.txt" not in first
    refused(kurtail, capsys, recipe)
    assert snapshot(recipe.parent) == first


def test_evaluation_text_that_is_too_short_is_refused_before_training(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    line = refused(kurtail, capsys, recipe, "--evaluation.text.windows", 10**5)
    assert "100000 were asked for" in line
    assert not trained(recipe)


def test_calibration_text_that_does_not_exist_is_refused_before_anything(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert "nowhere.txt" in refused(kurtail, capsys, recipe, "--data.init_args.capture.text.source", "nowhere.txt")
    assert {path.name for path in recipe.parent.iterdir()} <= {recipe.name, "runs"}
    assert not trained(recipe)


def test_gptq_text_that_is_too_short_is_refused_before_training(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert "100000 were asked for" in refused(kurtail, capsys, recipe, "--quantization.text.windows", 10**5)
    assert not trained(recipe)


@pytest.mark.parametrize(
    ("order", "refusal"),
    [
        ("RotationWriter Fusion Evaluation", "Evaluation needs WeightQuantization before it"),
        ("RotationWriter Fusion Evaluation WeightQuantization", "Evaluation needs WeightQuantization before it"),
        ("RotationWriter WeightQuantization Evaluation", "WeightQuantization needs Fusion before it"),
        ("Fusion WeightQuantization Evaluation", "WeightQuantization needs RotationWriter before it"),
    ],
)
def test_callbacks_of_an_own_trainer_without_what_they_need_are_refused_before_training(
    order: str, refusal: str, own_trainer: Callable[..., None], recipe: Path
) -> None:
    settings = yaml.safe_load(recipe.read_text())
    made = {
        "RotationWriter": RotationWriter(),
        "Fusion": Fusion(),
        "WeightQuantization": WeightQuantization(text=TextSpec(**settings["quantization"]["text"])),
        "Evaluation": Evaluation(TextSpec(**settings["evaluation"]["text"])),
    }
    with pytest.raises(ConfigError, match=refusal):
        own_trainer(*(made[name] for name in order.split()))
    assert not trained(recipe)


def fuse_with(settings: dict[str, Any], part: str, windows: int) -> None:
    """Scale channels, or choose signs."""
    text = settings["evaluation"]["text"] | {"windows": windows, "seqlen": 32}
    asked = {"scales": {"parts": ["values", "mlp_hidden", "keys", "mlp_input"]}, "signs": {"candidates": 3}}[part]
    settings["fusion"][part] = {**asked, "text": text, "seed": 0}


@pytest.mark.parametrize("part", ["scales", "signs"])
def test_a_text_too_short_for_fusion_is_refused_before_training(
    part: str, kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    edit(recipe, lambda s: fuse_with(s, part, 100_000))
    assert "100000 were asked for" in refused(kurtail, capsys, recipe)
    assert not trained(recipe)


def test_scales_signs_searched_clips_and_sinks_together(kurtail: Kurtail, recipe: Path) -> None:
    """Perplexity is that of the model loaded back, which has all four."""

    def switch(settings: dict[str, Any]) -> None:
        fuse_with(settings, "scales", 4)
        fuse_with(settings, "signs", 4)
        quantization = settings["quantization"]
        quantization |= {"quantized_activations": True, "clips": {"class_path": "kurtail_pl.methods.SearchedClips"}}
        quantization["scheme"]["cache"] = {"init_args": {"sinks": {"tokens": 2, "bits": 8}}}

    edit(recipe, switch)
    kurtail(recipe.parent, "fit", "--config", recipe)
    folder = recipe.parent / ARTEFACT
    fused, card, results = (
        json.loads(path.read_text())
        for path in (recipe.parent / "runs/fused/kurtail.json", folder / "kurtail.json", folder / "results.json")
    )
    assert fused["recipe"]["scales"]["parts"] == ["values", "mlp_hidden", "keys", "mlp_input"]
    assert [len(errors) for errors in card["rotations"]["signs"]["errors"].values()] == [3, 3]
    assert card["scheme"]["cache"]["settings"]["sinks"] == {"tokens": 2, "bits": 8}
    assert [len(clips) for clips in card["clips"]] == [9, 9, 9, 9]
    evaluation = results["evaluation"]
    text, windows, length = Path(evaluation["source"]), evaluation["windows"], evaluation["seqlen"]
    own = perplexity_of(kurtail_pl.load(folder), AutoTokenizer.from_pretrained(folder), text, windows, length)
    assert evaluation["perplexity"] == pytest.approx(own, rel=1e-5)


def test_rotations_alone_can_be_learned(own_trainer: Callable[..., None], recipe: Path) -> None:
    own_trainer(RotationWriter())
    assert (recipe.parent / "runs" / "rotations.safetensors").is_file()
    assert not (recipe.parent / "artifacts").exists()


def test_a_store_of_another_origin_is_refused(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    kurtail(recipe.parent, "fit", "--config", recipe)
    before = snapshot(recipe.parent / "runs" / "store")
    line = refused(kurtail, capsys, recipe, "--overwrite", "--data.init_args.capture.seed", 1)
    assert "seed is 0, wanted 1" in line
    assert snapshot(recipe.parent / "runs" / "store") == before


def test_printed_configuration_runs_and_gives_the_same_rotations(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path, tmp_path: Path
) -> None:
    kurtail(tmp_path, "fit", "--config", recipe)
    rotations = load_file(tmp_path / "runs" / "rotations.safetensors")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        kurtail(tmp_path, "fit", "--config", recipe, "--print_config")
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    (saved,) = tmp_path.rglob("config.yaml")
    for config in (tmp_path / "printed.yaml", saved):
        kurtail(tmp_path, "fit", "--config", config, "--overwrite")
        assert_equal(load_file(tmp_path / "runs" / "rotations.safetensors"), rotations)


@pytest.mark.parametrize("logger", [[], ["--trainer.logger", "false"]], ids=["tensorboard", "no logger"])
def test_a_resume_keeps_its_configuration_beside_the_first_one(
    kurtail: Kurtail, recipe: Path, logger: list[str]
) -> None:
    place = recipe.parent
    kurtail(place, "fit", "--config", recipe, *logger)
    (first,) = place.rglob("config*.yaml")
    content = first.read_bytes()
    assert yaml.safe_load(content)["ckpt_path"] is None
    last = place / "runs" / "checkpoints" / "last.ckpt"
    resume = ["--config", recipe, *logger, "--ckpt_path", last, "--overwrite"]
    for _ in range(2):
        kurtail(place, "fit", *resume)
    resumed = sorted(path for path in place.rglob("config*.yaml") if path != first)
    assert [path.name.split("-")[0] for path in resumed] == ["config.resume", "config.resume"]
    assert {yaml.safe_load(path.read_text())["ckpt_path"] for path in resumed} == {str(last)}
    assert first.read_bytes() == content
    if logger:
        assert [path.name for path in resumed] == ["config.resume-1.yaml", "config.resume-2.yaml"]
    kurtail(place, "fit", "--config", recipe, *logger, "--overwrite")  # a fresh run, not a resume
    assert {yaml.safe_load(path.read_text())["ckpt_path"] for path in place.rglob("config.yaml")} == {None}


def test_another_seed_gives_other_rotations(kurtail: Kurtail, recipe: Path) -> None:
    kurtail(recipe.parent, "fit", "--config", recipe)
    first = load_file(recipe.parent / "runs" / "rotations.safetensors")
    kurtail(recipe.parent, "fit", "--config", recipe, "--overwrite", "--model.init_args.rotation_seed", 1)
    second = load_file(recipe.parent / "runs" / "rotations.safetensors")
    assert not any(torch.equal(first[name], second[name]) for name in ("residual", "value"))


def test_validate_reports_the_kurtosis_of_a_checkpoint(
    kurtail: Kurtail, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    kurtail(recipe.parent, "fit", "--config", recipe, "--overwrite")
    before = snapshot(recipe.parent / "artifacts")
    capsys.readouterr()
    checkpoint = recipe.parent / "runs" / "checkpoints" / "last.ckpt"
    kurtail(recipe.parent, "validate", "--config", recipe, "--ckpt_path", checkpoint)
    printed = capsys.readouterr().out
    assert "kurtosis/validation/mean" in printed
    assert "kurtosis_site/layer003.ffn_in" in printed
    assert snapshot(recipe.parent / "artifacts") == before


def test_a_training_stopped_early_stays_stopped(kurtail: Kurtail, recipe: Path) -> None:
    """Also when the same command is given again: what came after it is made anew from the same rotations."""

    def stop_at_the_second_look(settings: dict[str, Any]) -> None:
        settings["data"]["init_args"]["steps"] = 10
        settings["trainer"]["val_check_interval"] = 2
        stop = {"monitor": "error/validation", "min_delta": 1.0, "patience": 1}
        early = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stop}
        settings["trainer"]["callbacks"] = [early]

    edit(recipe, stop_at_the_second_look)
    file, card = recipe.parent / "runs" / "rotations.safetensors", recipe.parent / ARTEFACT / "kurtail.json"
    kurtail(recipe.parent, "fit", "--config", recipe)
    assert json.loads(card.read_text())["rotations"]["steps"] == 4
    rotations = load_file(file)
    shutil.rmtree(recipe.parent / ARTEFACT)
    file.unlink()
    kurtail(recipe.parent, "fit", "--config", recipe)
    assert json.loads(card.read_text())["rotations"]["steps"] == 4
    assert_equal(load_file(file), rotations)


def test_fuse_keeps_the_name_of_the_method(kurtail: Kurtail, recipe: Path) -> None:
    kurtail(recipe.parent, "fit", "--config", recipe, "--model.method", "mine")
    model = yaml.safe_load(recipe.read_text())["data"]["init_args"]["capture"]["model"]
    rotations = recipe.parent / "runs" / "rotations.safetensors"
    kurtail(recipe.parent, "fuse", "--model", model, "--rotations", rotations, "--out", "alone")
    card = json.loads((recipe.parent / "alone" / "kurtail.json").read_text())
    assert card["method"] == "mine"


def test_rotations_at_run_time_can_be_left_out(
    kurtail: Kurtail, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = recipe.parent
    kurtail(place, "fit", "--config", recipe, "--fusion.online", "[query_key]")
    model = yaml.safe_load(recipe.read_text())["data"]["init_args"]["capture"]["model"]
    rotations = place / "runs" / "rotations.safetensors"
    kurtail(place, "fuse", "--model", model, "--rotations", rotations, "--online", "[query_key]", "--out", "alone")
    (artefact,) = (place / "artifacts").glob("tied-kurtail-w4a4kv4*")
    for folder in (artefact, place / "alone"):
        names = {name.partition(".")[0] for name in load_file(folder / "rotations.safetensors")}
        assert names == {"residual", "value", "query_key"}
    loaded = kurtail_pl.load(artefact)
    hadamards = {name.rpartition(".")[2] for name, each in loaded.named_modules() if isinstance(each, OnlineHadamard)}
    assert hadamards == {"query_key_rotation"}
    line = refused(kurtail, capsys, recipe, "--fusion.online", "[]", "--fusion.signs", "{candidates: 2}")
    assert "fusion.online is []; write fusion.signs: null" in line
