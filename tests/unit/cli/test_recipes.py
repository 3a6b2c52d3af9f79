"""Every recipe under configs/ is understood, key for key, by the command; sizes and unknown keys are refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kurtail_pl.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
OVERLAYS = [path for path in FILES if "trainer" not in yaml.safe_load(path.read_text())]
"""Some knobs alone, to go over a recipe."""
RECIPES = [path for path in FILES if path not in OVERLAYS]
ABLATED = (CONFIGS / "ablation" / "smollm2-135m.yaml", CONFIGS / "paper" / "llama-3.2-3b.yaml")
SMOKE = CONFIGS / "smoke" / "smollm2-135m.yaml"


def exit_code(*arguments: object) -> object:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a YAML document with its place."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield path, node
        return
    for key, child in items:
        yield from leaves(child, f"{path}.{key}")


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert exit_code("fit", *arguments, "--print_config") == 0
    return capsys.readouterr().out


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 37
    assert len(OVERLAYS) >= 8
    assert {path.parent.name for path in FILES} == {"configs", "ablation", "paper", "protocols", "smoke"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_recipe_is_understood_and_its_print_is_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: Path
) -> None:
    printed = printed_config(capsys, "--config", recipe)
    understood, written = dict(leaves(yaml.safe_load(printed))), dict(leaves(yaml.safe_load(recipe.read_text())))
    assert {path: understood.get(path, "missing") for path in written} == written
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert yaml.safe_load(printed_config(capsys, "--config", again)) == yaml.safe_load(printed)


@pytest.mark.parametrize("base", ABLATED, ids=lambda path: path.stem)
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_changes_its_own_knobs_and_no_others(
    capsys: pytest.CaptureFixture[str], overlay: Path, base: Path
) -> None:
    under = dict(leaves(yaml.safe_load(printed_config(capsys, "--config", base))))
    over = dict(leaves(yaml.safe_load(printed_config(capsys, "--config", base, "--config", overlay))))
    own = dict(leaves(yaml.safe_load(overlay.read_text())))
    assert {path: over[path] for path in own} == own
    others = {path for path in under.keys() & over.keys() if path not in own}
    assert {path: over[path] for path in others} == {path: under[path] for path in others}
    if overlay.parent.name == "ablation":
        assert under.keys() == over.keys()
        assert all(under[path] != value for path, value in own.items())


def test_trainer_defaults_stand_where_a_recipe_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(printed_config(capsys, "--config", SMOKE))
    trainer = config["trainer"]
    assert (trainer["precision"], trainer["log_every_n_steps"], trainer["deterministic"]) == ("32-true", 1, True)
    assert (trainer["max_epochs"], config["overwrite"], config["ckpt_path"]) == (1, False, None)


def test_a_flag_overrides_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.init_args.steps", 7, "--model.init_args.optimizer.init_args.lr", 0.25, "--trainer.precision", 64]
    config = yaml.safe_load(printed_config(capsys, "--config", SMOKE, *flags))
    assert config["data"]["init_args"]["steps"] == 7
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.25
    assert config["trainer"]["precision"] in (64, "64", "64-true")


@pytest.mark.parametrize(
    ("verb", "size", "value"), [("fit", "hidden_size", 48), ("fit", "rms_norm_eps", 0.1), ("compare", "layers", 3)]
)
def test_a_size_given_by_hand_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, size: str, value: float
) -> None:
    assert exit_code(verb, "--config", SMOKE, f"--model.init_args.{size}", value) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kurtail")]
    assert f"{size} is set to {value}" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch_rows:", "batch_row:"),
        ("rotation_seed:", "seed:"),
        ("max_epochs:", "epochs:"),
        ("quantized_activations:", "quantised_activations:"),
        ("seed_everything:", "seed_nothing:"),
        ("KurTailModule", "RotationModel"),
        ("method: rtn", "method: magic"),
        ("bits: 4", "bits: four"),
    ],
)
def test_unknown_keys_and_values_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, old: str, new: str
) -> None:
    wrong = tmp_path / "wrong.yaml"
    text = SMOKE.read_text()
    assert old in text
    wrong.write_text(text.replace(old, new))
    assert exit_code("fit", "--config", wrong) == 2
    error = capsys.readouterr().err
    assert new.split(": ")[-1].rstrip(":") in error
    assert list(tmp_path.iterdir()) == [wrong]


def test_a_recipe_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("fit", "--config", "nowhere.yaml") == 2
    assert "nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.init_args.batch_rows", 5000),
        ("data.init_args.steps", 0),
        ("data.init_args.capture.rows", 5000),
        ("data.init_args.capture.text.windows", 0),
    ],
)
def test_settings_out_of_range_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, setting: str, value: int
) -> None:
    assert exit_code("fit", "--config", SMOKE, f"--{setting}", value) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if f"{setting.split('.')[-1]} is {value}" in line]
    assert "kurtail" in line or "error" in line
    assert list(tmp_path.iterdir()) == []
