"""Every recipe under configs/ lies over base.yaml, every setting has a flag; sizes and unknown keys are refused."""

import inspect
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from kurtail_pl.cli.main import main
from kurtail_pl.cli.recipes import recipe_file, shipped, summary
from kurtail_pl.cli.trainer import SECTIONS
from kurtail_pl.lit import ActivationDataModule, KurTailModule
from kurtail_pl.lit.callbacks import Checkpoints, Evaluation, Figures, Fusion
from kurtail_pl.optim import CayleyAdam
from kurtail_pl.stages.quantization import QuantizeSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

CONFIGS = Path(__file__).parents[3] / "configs"
BASE = CONFIGS / "base.yaml"
SETTINGS: dict[str, Any] = yaml.safe_load(BASE.read_text())
OVERLAYS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path != BASE]
LINES = {"models": 12, "texts": 15, "methods": 15, "bits": 15, "protocols": 15, "paper": 15, "ablation": 15}
"""Of the files of each folder, at most."""


def exit_code(*arguments: object) -> object:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a recipe with its place."""
    if not isinstance(node, dict) or not node:
        yield path.removeprefix("."), node
        return
    for key, child in node.items():
        yield from leaves(child, f"{path}.{key}")


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert exit_code("fit", *arguments, "--print_config") == 0
    return capsys.readouterr().out


def test_files_are_short_and_all_say_what_they_are_for() -> None:
    assert len(OVERLAYS) >= 50
    for path in OVERLAYS:
        text = path.read_text()
        assert len(text.splitlines()) <= LINES.get(path.parent.name, 15), path
        assert text.startswith("# "), path
        assert summary(path).endswith("."), path
    assert sum(len(path.read_text().splitlines()) for path in (BASE, *OVERLAYS)) <= 1000


def test_base_holds_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """And their defaults are those of the code: what is printed without a recipe is what base.yaml says."""
    printed = yaml.safe_load(printed_config(capsys))
    for section in ("model", "data", *SECTIONS):
        assert dict(leaves(printed[section])) == dict(leaves(SETTINGS[section])), section
    assert {name: printed["trainer"][name] for name in SETTINGS["trainer"]} == SETTINGS["trainer"]
    assert printed["seed_everything"] == SETTINGS["seed_everything"]


def plain(value: Any) -> Any:
    """A default of the code as YAML would have it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def defaults_of(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {each.name: plain(each.default) for each in parameters if each.default is not inspect.Parameter.empty}


def test_defaults_in_code_are_those_of_base() -> None:
    """For whoever makes module, data module and callbacks without a recipe."""
    model = dict(SETTINGS["model"]["init_args"])
    optimizer = model.pop("optimizer")
    code = defaults_of(KurTailModule)
    assert (code.pop("optimizer"), code.pop("aim")) == (CayleyAdam, None)
    assert model == code
    assert optimizer["init_args"] == defaults_of(CayleyAdam)
    data = defaults_of(ActivationDataModule)
    data["capture"]["text"]["source"] = "pydoc"  # Null there is the same.
    assert SETTINGS["data"]["init_args"] == data
    quantization = {name: value for name, value in SETTINGS["quantization"].items() if name != "out"}
    quantization["rounder"] = quantization["rounder"]["init_args"]
    classes = {name: quantization["scheme"][name]["init_args"] for name in ("weights", "cache")}
    quantization["scheme"] = quantization["scheme"] | classes
    spec = {
        each.name: plain(each.default if each.default_factory is MISSING else each.default_factory())
        for each in fields(QuantizeSpec)
    }
    assert spec.pop("target") == SETTINGS["target"]
    assert quantization == spec
    kinds = {"checkpoints": Checkpoints, "fusion": Fusion, "figures": Figures, "evaluation": Evaluation}
    assert {name: SETTINGS[name] for name in kinds} == {name: defaults_of(kind) for name, kind in kinds.items()}


@pytest.mark.parametrize("recipe", OVERLAYS, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_a_recipe_changes_its_own_settings_and_its_print_runs_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recipe: Path
) -> None:
    printed = printed_config(capsys, "--config", recipe)
    found, own = dict(leaves(yaml.safe_load(printed))), dict(leaves(yaml.safe_load(recipe.read_text())))
    assert {path: found.get(path, "missing") for path in own} == own
    if "model.class_path" not in own and "data.class_path" not in own:
        under = dict(leaves(SETTINGS))
        opened = {path for path in under if any(name.startswith(f"{path}.") for name in own)}  # Null before.
        closed = {path for path in under if any(path.startswith(f"{name}.") for name in own)}  # Null now.
        exchanged = tuple(path.replace("class_path", "init_args") for path in own if path.endswith(".class_path"))
        kept = {path for path in under.keys() - own.keys() - opened - closed if not path.startswith(exchanged)}
        assert {path: found[path] for path in kept} == {path: under[path] for path in kept}
        if recipe.parent.name == "ablation" and "Goes over" not in recipe.read_text():
            assert any(under.get(path, "missing") != value for path, value in own.items())
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert yaml.safe_load(printed_config(capsys, "--config", again)) == yaml.safe_load(printed)


def test_a_recipe_that_sets_up_a_rounder_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Over another rounder its settings would be unknown ones."""
    for path in OVERLAYS:
        rounder = (yaml.safe_load(path.read_text()).get("quantization") or {}).get("rounder") or {}
        assert "class_path" in rounder or "init_args" not in rounder, path
    printed = yaml.safe_load(
        printed_config(capsys, *(each for name in ("rtn", "kurtail-plus", "columns-in-order") for each in ("-c", name)))
    )
    assert printed["quantization"]["rounder"]["class_path"] == "kurtail_pl.methods.GPTQ"
    settings = printed["quantization"]["rounder"]["init_args"]
    assert (settings["refine"], settings["act_order"]) == (3, False)
    for last in ("rtn", "hqq"):
        found = yaml.safe_load(printed_config(capsys, "--config", "kurtail-plus", "--config", last))
        assert found["quantization"]["rounder"]["class_path"].lower() == f"kurtail_pl.methods.{last}"


def another(path: str, value: Any) -> tuple[str, Any]:
    """A flag's value for a setting that is not its own, as written and as read."""
    words = {
        "target": "vllm",
        "model.class_path": "kurtail_pl.lit.FixedRotations",
        "data.class_path": "kurtail_pl.lit.WindowDataModule",
        "model.init_args.optimizer.class_path": "kurtail_pl.optim.CayleySGD",
        "model.init_args.scheduler": "torch.optim.lr_scheduler.ConstantLR",
        "model.init_args.objective.site_weights": "effect",
        "data.init_args.capture.values": "attended",
        "data.init_args.compute.device": "cpu",
        "data.init_args.compute.dtype": "bfloat16",
        "fusion.block_size": "widest",
        "quantization.scheme.attention_output": "head",
        "quantization.scheme.activation_scales": "static",
        "quantization.rounder.class_path": "kurtail_pl.methods.RTN",
        "quantization.scheme.weights.class_path": "kurtail_pl.methods.MXFP4",
        "quantization.scheme.cache.class_path": "kurtail_pl.methods.Q4_0Cache",
        "quantization.rounder.init_args.correction": "foem",
        "quantization.clips": "kurtail_pl.methods.SearchedClips",
        "quantization.matching": "kurtail_pl.methods.Matching",
        "quantization.transforms": "kurtail_pl.methods.BlockTransforms",
        "quantization.bits": "kurtail_pl.methods.SensitiveBits",
        "quantization.scheme.side": "kurtail_pl.methods.LowRank",
    }
    written: dict[str, tuple[str, Any]] = {
        "trainer.logger": ("false", False),
        "trainer.callbacks": ("[]", []),
        "quantization.scheme.prefix": ("[1]", [1]),
        "quantization.scheme.layer_bits": ("[3]", [3]),
        "figures.layers": ("[1]", [1]),
        "fusion.online": ("[mlp_hidden]", ["mlp_hidden"]),
        "model.init_args.optimizer.init_args.betas": ("[0.5, 0.5]", [0.5, 0.5]),
    }
    if path in words:
        return words[path], words[path]
    if path in written:
        return written[path]
    if path.endswith(".clip.kind"):
        return "quantile", "quantile"
    if path.endswith(("activations.levels", "keys.levels", "values.levels")):
        return "e2m1", "e2m1"
    if path.endswith(("activations.scales", "keys.scales", "values.scales")):
        return "e8m0", "e8m0"
    if isinstance(value, bool):
        return str(not value).lower(), not value
    if isinstance(value, float):
        return str(value / 2 or 0.5), value / 2 or 0.5
    if isinstance(value, int):
        return str(value + 1), value + 1
    if value is None and path.endswith(("group_size", "init_args.block")):
        return "4", 4
    return "elsewhere", "elsewhere"


CLASSES = (
    "model.init_args.scheduler", "quantization.matching", "quantization.clips", "quantization.bits",
    "quantization.scheme.side", "quantization.transforms",
)  # fmt: skip
"""Settings that are null, and may be an object of a class."""
OPTIONAL = {
    "fusion.scales": "seed", "fusion.signs": "candidates", 
    "quantization.scheme.cache.init_args.sinks": "tokens", "evaluation.tasks": "limit",
}  # fmt: skip
"""Settings that are null, and one of those that they may have."""


def test_every_setting_has_a_flag_and_may_stand_in_a_later_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every one by a flag of its own, all at once but for those that exchange a class, and by files the same."""
    changes = {path: another(path, value) for path, value in leaves(SETTINGS) if path not in OPTIONAL}
    changes |= {f"{path}.{name}": ("5", 5) for path, name in OPTIONAL.items()}
    classes = {path: change for path, change in changes.items() if "class_path" in path or path in CLASSES}
    others = {path: change for path, change in changes.items() if path not in classes}
    assert len(changes) >= 80
    flags = [flag for path, (text, _) in others.items() for flag in (f"--{path}", text)]
    found = dict(leaves(yaml.safe_load(printed_config(capsys, *flags))))
    assert {path: found[path] for path in others} == {path: value for path, (_, value) in others.items()}
    for path, (text, _) in classes.items():
        found = dict(leaves(yaml.safe_load(printed_config(capsys, f"--{path.removesuffix('.class_path')}", text))))
        assert found.get(path, found.get(f"{path}.class_path")) == text
    later = tmp_path / "later.yaml"
    nested: dict[str, Any] = {}
    for path, (_, value) in others.items():
        place = nested
        *parents, last = path.split(".")
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    later.write_text(yaml.safe_dump(nested))
    found = dict(leaves(yaml.safe_load(printed_config(capsys, "--config", later))))
    assert {path: found[path] for path in others} == {path: value for path, (_, value) in others.items()}


def test_recipes_are_found_by_name_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == [path.stem for path in shipped().values()]
    assert ["smoke", summary(CONFIGS / "smoke.yaml")] in lines
    assert recipe_file("kurtail-plus") == recipe_file("methods/kurtail-plus")
    assert recipe_file("kurtail-plus").samefile(CONFIGS / "methods/kurtail-plus.yaml")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kurtail-pus", "there is no recipe 'kurtail-pus'; did you mean kurtail-plus?"),
        ("nothing-like-it-at-all", "kurtail recipes lists them"),
        ("nowhere.yaml", "nowhere.yaml does not exist"),
        ("", "--config names no file"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "plan", "compare"])
def test_a_recipe_that_does_not_exist_is_refused(
    capsys: pytest.CaptureFixture[str], verb: str, name: str, said: str
) -> None:
    assert exit_code(verb, "--config", name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("callback", "remedy"),
    [
        ("kurtail_pl.lit.callbacks.WeightQuantization", "move its settings to the section quantization at the top"),
        ("kurtail_pl.lit.callbacks.Fusion", "move its settings to the section fusion at the top"),
        ("lightning.pytorch.callbacks.ModelCheckpoint", "move its settings to the section checkpoints at the top"),
        ("kurtail_pl.lit.callbacks.RotationWriter", "leave it out"),
    ],
)
def test_the_old_form_is_refused_with_where_its_settings_went(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, callback: str, remedy: str
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": callback, "init_args": {}}]}}))
    assert exit_code("fit", "--config", old) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"lists {callback.rpartition('.')[2]} in trainer.callbacks in line 3: {remedy}" in line


@pytest.mark.parametrize("name", ["keys", "values", "sinks", "centre_keys"])
def test_settings_of_the_cache_in_the_scheme_are_refused_with_where_they_went(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(f"quantization:\n  scheme: {{centre: true, {name}: null}}\n")
    assert exit_code("fit", "--config", old) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"has {name} in quantization.scheme in line 2: move it to quantization.scheme.cache.init_args" in line


def test_a_quantizer_of_the_cache_changes_key_by_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It may be null, and stands in a class's settings: what a file leaves out stays as it is in the one before."""
    later = tmp_path / "later.yaml"
    later.write_text("quantization: {scheme: {cache: {init_args: {keys: {bits: 3}, values: {clip: {amount: 0.5}}}}}}")
    flags = ("--quantization.scheme.cache.keys.symmetric", "true", "--quantization.scheme.cache.values.bits", "8")
    printed = yaml.safe_load(printed_config(capsys, "--config", later, *flags))
    cache = SETTINGS["quantization"]["scheme"]["cache"]["init_args"]
    assert printed["quantization"]["scheme"]["cache"]["init_args"] == {
        **cache,
        "keys": {**cache["keys"], "bits": 3, "symmetric": True},
        "values": {**cache["values"], "bits": 8, "clip": {"kind": "ratio", "amount": 0.5}},
    }
    printed = yaml.safe_load(printed_config(capsys, "--quantization.scheme.cache.keys", "null"))
    assert printed["quantization"]["scheme"]["cache"]["init_args"] == {**cache, "keys": None}
    printed = yaml.safe_load(printed_config(capsys, "--quantization.scheme.cache", "null"))
    assert printed["quantization"]["scheme"]["cache"] is None


SIZES = '{"layers": 3, "hidden_size": 48, "head_dim": 16, "kv_heads": 2, "rms_norm_eps": 0.1}'


@pytest.mark.parametrize(
    ("verb", "size", "value"), [("fit", "sizes", SIZES), ("compare", "sizes", SIZES), ("fit", "aim", "{}")]
)
def test_a_size_given_by_hand_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str, size: str, value: str
) -> None:
    assert exit_code(verb, "--config", "smoke", f"--model.init_args.{size}", value) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kurtail")]
    assert f"{size} is set to" in line
    assert list(tmp_path.iterdir()) == []


def test_a_file_to_learn_from_is_not_evaluated_on_by_default(
    capsys: pytest.CaptureFixture[str], text_file: Path
) -> None:
    assert exit_code("fit", "--config", "smoke", "--data.init_args.capture.text.source", text_file) == 1
    assert "name a text to evaluate on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("batch_rows:", "batch_row:"),
        ("rotation_seed:", "seed:"),
        ("max_epochs:", "epochs:"),
        ("quantized_activations:", "quantised_activations:"),
        ("seed_everything:", "seed_nothing:"),
        ("KurTailModule", "RotationModel"),
        ("methods.GPTQ", "methods.Magic"),
        ("bits: 4", "bits: four"),
    ],
)
def test_unknown_keys_and_values_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, old: str, new: str
) -> None:
    wrong = tmp_path / "wrong.yaml"
    text = BASE.read_text()
    assert old in text
    wrong.write_text(text.replace(old, new))
    assert exit_code("fit", "--config", wrong) == 2
    error = capsys.readouterr().err
    assert new.split(": ")[-1].rpartition(".")[2].rstrip(":") in error
    assert list(tmp_path.iterdir()) == [wrong]


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
    assert exit_code("fit", "--config", "smoke", f"--{setting}", value) in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if f"{setting.split('.')[-1]} is {value}" in line]
    assert "kurtail" in line or "error" in line
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_lightning_is_refused(capsys: pytest.CaptureFixture[str], stories: Path) -> None:
    """It would take one step and write an artefact as of a whole training."""
    model = f"--data.init_args.capture.model={stories}"
    assert exit_code("fit", "--config", "smoke", model, "--trainer.fast_dev_run", "true") == 1
    assert "fast_dev_run would write an artefact of nothing" in capsys.readouterr().err
