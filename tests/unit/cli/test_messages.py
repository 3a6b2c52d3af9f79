"""Whatever is wrong with options or a recipe: one line that names the setting, its value and what was expected."""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from kurtail_pl.cli import verbs
from kurtail_pl.cli.arguments import prepared
from kurtail_pl.cli.failures import BUG, LINE_LENGTH, failure
from kurtail_pl.cli.main import main
from kurtail_pl.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")

SMOKE = Path(__file__).parents[3] / "configs" / "smoke.yaml"
Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one line that a command ends with."""

    def refusal(*arguments: object, code: int = 2) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"kurtail {arguments[0]}: ")
        assert len(line) <= LINE_LENGTH
        assert stopped.value.code == code
        return line

    return refusal


def changed(path: str, value: Any) -> str:
    """A recipe of one setting, to go over the smoke recipe."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return yaml.safe_dump(value)


SETTINGS = [
    ("data.init_args.capture.rows", "many", "data.capture.rows is many, expected a whole number or 'all'"),
    ("data.init_args.capture.rowz", 3, "data: there is no setting capture.rowz; did you mean rows?"),
    ("data.init_args.stepz", 3, "there is no setting stepz; did you mean steps?"),
    ("data.init_args.compute.device", "tpu", "compute.device is tpu, expected one of 'auto', 'cpu', 'cuda'"),
    ("data.init_args.capture.text", "pydoc", "data.capture.text is pydoc, expected settings"),
    ("data.init_args.store", 3, "data.store is 3, expected text or null"),
    ("data", [1], "data is [1], expected a StoredModel (class_path and init_args)"),
    ("trainre", 3, "there is no setting trainre; did you mean trainer?"),
    ("trainer", None, "has 'null' as its trainer: expected settings in line"),
    ("trainer.max_epoch", 3, "there is no setting trainer.max_epoch; did you mean max_epochs?"),
    ("trainer.precision", "12", "trainer.precision is 12, expected one of 64, 32, 16"),
    ("trainer.callbacks", [5], "trainer.callbacks is 5, expected a Callback (class_path and init_args)"),
    ("trainer.callbacks", [{"class_path": "lightning.pytorch.callbacks.Timr"}], "did you mean Timer?"),
    ("fusoin", {"scales": None}, "there is no setting fusoin.scales; did you mean fusion?"),
    (
        "quantization.rounder.class_path",
        "gtpq",
        "rounder is gtpq, expected one of GPTQ, HQQ, RTN; did you mean GPTQ?",
    ),
    ("quantization.rounder", "RNT", "quantization.rounder is RNT, expected one of GPTQ, HQQ, RTN; did you mean RTN?"),
    ("quantization.clips", "searchclips", "expected one of LearnedClips, SearchedClips; did you mean SearchedClips?"),
    ("quantization.bits", "sensitive", "quantization.bits is sensitive, expected one of SensitiveBits"),
    ("quantization.matching", "matched", "matching is matched, expected one of Matching; did you mean Matching?"),
    (
        "quantization.scheme.side",
        "lowrank",
        "quantization.scheme.side is lowrank, expected one of LowRank, Sparse; did you mean LowRank?",
    ),
    ("quantization.scheme.weights", "mxfp", "quantization.scheme.weights is mxfp, expected one of FloatZero, MXFP4"),
    ("quantization.scheme.weights.init_args.bitz", 4, "there is no setting bitz; did you mean bits?"),
    (
        "model.class_path",
        "kurtail_pl.lit.KurtailModule",
        "kurtail_pl.lit has no KurtailModule; did you mean KurTailMod",
    ),
    ("model.class_path", "kurtai.lit.KurTailModule", "there is no module kurtai; check the class_path"),
    ("model.class_path", "torch.nn.Linear", "model: torch.nn.Linear is not a RotationModule"),
    ("model.init_args.optimizer.init_args.lr", "fast", "model.optimizer.lr is fast, expected a number"),
    ("seed_everything", "abc", "seed_everything is abc, expected true or false or a whole number"),
]


@pytest.mark.parametrize(("path", "value", "message"), SETTINGS, ids=[f"{path}={value}" for path, value, _ in SETTINGS])
def test_a_setting_its_value_and_what_was_expected(
    refusal: Refusal, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(changed(path, value))
    assert message in refusal("fit", "--config", SMOKE, "--config", recipe)
    assert list(tmp_path.iterdir()) == [recipe]


def test_what_lightning_cannot_use_is_one_line(refusal: Refusal, stories: Path) -> None:
    model = f"--data.init_args.capture.model={stories}"
    for option, message in (
        ("--trainer.strategy=nonsense", "trainer: You selected an invalid strategy name"),
        ("--trainer.profiler=nonsense", "When passing string value for the `profiler`"),
        ("--trainer.val_check_interval=-1", "You have passed invalid value -1 for val_check_interval"),
    ):
        line = refusal("fit", "--config", SMOKE, model, option, code=1)
        assert message in line
        assert line.endswith("; correct the trainer in the recipe")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quantization.scheme.weights.init_args.bits", 4.5, "bits is 4.5: Input should be a valid integer"),
        ("checkpoints.every_n_train_steps", 0, "checkpoints.every_n_train_steps is 0; give a positive number"),
        ("trainer.max_epochs", -1, "trainer.max_epochs is -1, without an end"),
        ("trainer.accumulate_grad_batches", 0, "trainer.accumulate_grad_batches is 0; give a positive number"),
        ("trainer.default_root_dir", "wrong.yaml", "wrong.yaml is a file; name a folder"),
        ("quantization.out", "wrong.yaml/a", "wrong.yaml is a file; name a folder"),
    ],
)
def test_what_would_fail_after_the_training_is_refused_before_it(
    refusal: Refusal, tmp_path: Path, stories: Path, path: str, value: Any, message: str
) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(changed(path, value))
    assert message in refusal(
        "fit", "--config", SMOKE, "--config", recipe, f"--data.init_args.capture.model={stories}", code=1
    )
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("verb", ["fit", "plan"])
@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quantization.scheme", [1], "a value is list, expected settings (name: value)"),
    ],
)
def test_what_jsonargparse_finds_late_is_one_line(
    refusal: Refusal, tmp_path: Path, stories: Path, verb: str, path: str, value: Any, message: str
) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text(changed(path, value))
    assert message in refusal(verb, "--config", SMOKE, "--config", recipe, f"--data.init_args.capture.model={stories}")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_numpy_does_not_take(refusal: Refusal, seed: int) -> None:
    line = refusal("fit", "--config", SMOKE, f"--seed_everything={seed}", code=1)
    assert f"seed_everything is {seed}; give a number from 0 to 4294967295" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["fuse", "--model", "./m", "--out", "f", "--method", "quarot", "--signs.seed", "-1"],
        ["fuse", "--model", "./m", "--out", "f", "--method", "quarot", "--scales.seed", "4294967296"],
        ["capture", "--out", "s", "--spec.model", "./m", "--spec.rows", "8", "--spec.seed", "-1"],
        ["quantize", "--artefact", "f", "--out", "g", "--spec.seed", "99999999999999999999"],
    ],
    ids=" ".join,
)
def test_seeds_that_no_generator_takes(refusal: Refusal, arguments: list[str]) -> None:
    assert f"seed is {arguments[-1]}; give a number from 0 to 4294967295" in refusal(*arguments, code=1)


FILES = {
    "empty": (b"", "holds no settings"),
    "list": (b"- a", "holds no settings"),
    "word": (b"x" * 10_000, "holds no settings"),
    "syntax": (b"a: 1\nb: [1,\nc: 2", "is not YAML in line 3: expected ',' or ']'"),
    "tab": (b"a:\n\tb: 1", "is not YAML in line 2: found character"),
    "twice": (b"a: 1\nb: {c: 1,\n c: 2}", "has 'c' twice in line 2 and in line 3: keep one"),
    "itself": (b"a: 1\nb: &b [*b]", "is nested too deeply or refers to itself in line 2"),
    "laughs": (b"a: &a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(
        b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 10)) for c in range(98, 106)
    ), "is nested too deeply or refers to itself"),
    "deep": (b"[" * 5000, "is not YAML"),
    "number-as-name": (b"1: 2", "has a setting without a name in line 1"),
    "object": (b'a: !!python/object/apply:os.system ["true"]', "has a value of the kind tag:yaml.org,2002:python"),
    "zero": (b"\0\1", "is not YAML"),
    "latin-1": (b"a: 1\n# caf\xe9", "is not UTF-8 at byte 10 (0xe9, in line 2)"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("verb", ["fit", "eval", "compare"])
def test_recipes_that_cannot_be_read(refusal: Refusal, tmp_path: Path, verb: str, content: bytes, message: str) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_bytes(content)
    assert f"{recipe} {message}" in refusal(verb, "--config", recipe)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.yaml", "nowhere.yaml does not exist: name a YAML file"),
        (".", ". cannot be read (Is a directory)"),
        ("", "--config names no file"),
        ("x" * 400 + ".yaml", "File name too long"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "plan", "eval"])
def test_recipes_that_are_not_there(refusal: Refusal, verb: str, path: str, message: str) -> None:
    assert message in refusal(verb, "--config", path, code=1 if len(path) > 300 else 2)


def test_a_recipe_with_a_byte_order_mark_and_windows_lines_is_read(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(b"\xef\xbb\xbf" + SMOKE.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(recipe), "--print_config"])


# --- options


@pytest.mark.parametrize(
    "arguments",
    [
        ["capture", "--out", "A", "--out", "B"],
        ["fuse", "--out=A", "--out", "B"],
        ["eval", "--text.source=A", "--text.source=B"],
        ["quantize", "--overwrite", "--overwrite=false"],
        ["fit", "--config", str(SMOKE), "--data.init_args.steps=3", "--data.init_args.steps=4"],
        ["compare", "--out=A", "--out=B"],
        ["capture", "--dry-run", "--dry_run", "true"],
    ],
    ids=" ".join,
)
def test_an_option_given_twice_is_refused(refusal: Refusal, arguments: list[str]) -> None:
    line = refusal(*arguments)
    assert "is given twice, " in line
    assert line.endswith("; give it once")


def test_each_entry_of_a_list_has_its_own_options() -> None:
    typed = ["--callbacks+=A", "--callbacks.seed=1", "--callbacks+=B", "--callbacks.seed=2", "--config=/dev/null"]
    assert prepared(typed[:4]) == typed[:4]


@pytest.mark.parametrize(
    "typed", [["--scheme.cache.keys.group_size=null"], ["--scheme.cache.keys.group_size", "null"]], ids=" ".join
)
def test_null_within_a_cache_is_part_of_a_mapping(typed: list[str]) -> None:
    others = ["--scheme.cache.values.bits", "4", "--scheme.activations.group_size=null"]
    assert prepared([*typed, *others]) == ["--scheme.cache.keys={group_size: null}", *others]


@pytest.mark.parametrize(
    ("typed", "spelled"),
    [
        (["--dry-run"], ["--dry_run=true"]),
        (["--dry-run", "true"], ["--dry_run=true"]),
        (["--dry_run=true"], ["--dry_run=true"]),
        (["--dry-run", "--out", "s"], ["--dry_run=true", "--out", "s"]),
        (["--overwrite=false", "--check"], ["--overwrite=false", "--check=true"]),
        (["--overwrite", "no"], ["--overwrite=no"]),
        (["--out", "s", "--overwrite"], ["--out", "s", "--overwrite=true"]),
    ],
)
def test_flags_may_have_values(typed: list[str], spelled: list[str]) -> None:
    assert prepared(typed) == spelled


@pytest.mark.parametrize("verb", ["capture", "fit"])
def test_a_flag_with_another_value_is_refused(refusal: Refusal, verb: str) -> None:
    flag = {"capture": "--dry-run", "fit": "--overwrite"}[verb]
    name = flag[2:].replace("-", "_")
    assert f"{name} is perhaps, expected true or false" in refusal(verb, flag, "perhaps")


@pytest.mark.parametrize("flag", [["--overwrite", "false"], ["--overwrite=false"], ["--overwrite"], []])
def test_fit_and_compare_take_flags_as_the_others_do(capsys: pytest.CaptureFixture[str], flag: list[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(SMOKE), *flag, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["overwrite"] is (flag == ["--overwrite"])


@pytest.mark.parametrize(
    "typed", [["--model", "A", "--model", "B"], ["--model=A", "--model=B"], ["--model=A", "--model", "B"]]
)
def test_every_model_is_measured(typed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def note(name: str) -> Any:
        opened.append(name)
        if len(opened) == 2:
            raise ConfigError("both were asked for")

    monkeypatch.setattr(verbs, "open_any", note)
    with pytest.raises(SystemExit, match="1"):
        main(["eval", *typed])
    assert opened == ["A", "B"]


def test_an_option_that_takes_a_list_grows_when_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    others = ["--store", "s", "--rotations", "r", "--out", "f"]
    with pytest.raises(SystemExit, match="0"):
        main(["figures", *others, "--layers", "1", "--layers=[7, 15]", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["layers"] == [1, 7, 15]


def test_a_misspelled_option_names_its_neighbour(refusal: Refusal) -> None:
    assert "there is no setting artefakt; did you mean artefact?" in refusal("report", "--artefakt", "x")
    assert "there is no setting colour; --help lists the settings" in refusal("report", "--colour=red")


# --- everything else that can happen


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied; change its permissions"),
        (OSError(errno.EROFS, "Read-only file system", "/a"), "/a: Read-only file system; name a place"),
        (OSError(errno.EMFILE, "Too many open files", "/a"), "/a: Too many open files; let processes open more"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: Is a directory; name a file"),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000),
            "xxx: File name too long; choose a",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device; free some"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "out of memory (CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory (DefaultCPU"),
    ],
    ids=str,
)
def test_what_the_machine_refuses_is_one_line(error: Exception, message: str) -> None:
    line, code = failure("kurtail fit", error)
    assert message in line
    assert code == 1
    assert len(line) <= LINE_LENGTH


def test_a_bug_says_that_it_is_one() -> None:
    try:
        torch.empty(2).view(3)
    except RuntimeError as error:
        line, code = failure("kurtail fit", error)
    assert code == BUG
    assert line.startswith("kurtail fit: this is a bug: RuntimeError in ")
    assert line.endswith("KURTAIL_TRACEBACK=1 shows all of it; please report it")


def test_long_messages_keep_their_end() -> None:
    differences = "; ".join(f"key{i} is {i}, wanted {i + 1}" for i in range(99))
    line, _ = failure("kurtail fit", ConfigError(f"the store differs:\n{differences}; remove it"))
    assert line.startswith("kurtail fit: the store differs: key0 is 0, wanted 1; ")
    assert line.endswith("...; remove it")
    assert len(line) == LINE_LENGTH


def test_a_bug_is_raised_where_its_traceback_is_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> str:
        raise TypeError("oh")

    monkeypatch.setattr(verbs.report_stage, "report", fail)
    with pytest.raises(TypeError, match="oh"):
        main(["report", "--artefact", "x"])
    monkeypatch.delenv("KURTAIL_TRACEBACK")
    with pytest.raises(SystemExit, match=str(BUG)):
        main(["report", "--artefact", "x"])
    line = capsys.readouterr().err
    assert line.startswith("kurtail report: this is a bug: TypeError in cli/verbs.py line ")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read_are_named(refusal: Refusal, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1")
    recipe.chmod(0)
    assert "recipe.yaml cannot be read (Permission denied)" in refusal("fit", "--config", SMOKE, "--config", recipe)
