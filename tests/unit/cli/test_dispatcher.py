"""The dispatcher: help, exit codes, and what an import costs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kurtail_pl
from kurtail_pl.cli.main import VERBS, main, sentence

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")


def exit_code(*arguments: str) -> object:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_verb_by_its_docstring(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    main(arguments)
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    functions = []
    for verb, _ in listed:
        module, function = VERBS[verb].split(":")
        functions.append(getattr(importlib.import_module(module), function))
    assert [text for _, text in listed] == [(function.__doc__ or "").splitlines()[0] for function in functions]
    verbs = {"fit", "validate", "compare", "capture", "fuse", "quantize", "eval", "report"}
    assert {verb for verb, _ in listed} == set(VERBS) >= verbs


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert exit_code(verb, "--help") == 0
    printed = capsys.readouterr().out
    usage, description = (block.split() for block in printed.split("\n\n")[:2])
    assert {"usage:", "kurtail", verb} <= set(usage)
    assert " ".join(description).startswith(sentence(verb))
    required = {
        "fit": "--config",
        "validate": "--ckpt_path",
        "compare": "--overwrite",
        "capture": "--spec.text.seqlen",
        "recipes": "--help",
        "completion": "--help",
        "inspect": "path",
    }
    assert required.get(verb, "--config") in printed


@pytest.mark.parametrize("verb", ["", "fits", "--verbose", "Fit"])
def test_unknown_verbs_are_named_with_exit_code_2(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert exit_code(verb) == 2
    error = capsys.readouterr().err
    assert repr(verb) in error
    assert "quantize" in error


ERRORS = {
    "no-model": ["eval", "--model", "./nowhere"],
    "no-gguf": ["capture", "--spec.model", "nowhere.gguf", "--spec.rows", "8", "--out", "store"],
    "too-many-rows": [
        *("capture", "--spec.model", "./nowhere", "--out", "store"),
        *("--spec.rows", "9", "--spec.text.windows", "1", "--spec.text.seqlen", "8"),
    ],
    "no-folder": ["report", "--artefact", "nowhere"],
    "no-fused-model": ["quantize", "--artefact", "nowhere", "--out", "out"],
    "rotations-missing": ["fuse", "--model", "./nowhere", "--out", "out"],
    "rotations-superfluous": ["fuse", "--model", "m", "--out", "o", "--rotations", "r", "--method", "quarot"],
}


@pytest.mark.parametrize("arguments", ERRORS.values(), ids=ERRORS)
def test_user_errors_are_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    assert exit_code(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kurtail {arguments[0]}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["report"], "artefact"),
        (["report", "--artefact", "x", "--colour", "red"], "no setting colour"),
        (["eval", "--model", "x", "--text.windows", "0"], "windows is 0"),
        (["eval", "--model", "x", "--text.seqlen", "1"], "seqlen is 1"),
        (["quantize", "--artefact", "x", "--out", "y", "--spec.rounder", "magic"], "rounder is magic"),
        (["quantize", "--artefact", "x", "--out", "y", "--spec.scheme.weights.bits", "many"], "bits is 'many'"),
        (["fuse", "--model", "x", "--out", "y", "--method", "magic"], "method is magic"),
        (["capture", "--spec.model", "x", "--spec.rows", "1.5", "--out", "s"], "rows is 1.5"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], named: str
) -> None:
    assert exit_code(*arguments) in (1, 2)
    error = capsys.readouterr().err
    assert named in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_module_runs_as_the_command() -> None:
    done = python("-m", "kurtail_pl", "--version")
    assert (done.returncode, done.stdout) == (0, f"kurtail {kurtail_pl.__version__}\n")
    unknown = python("-m", "kurtail_pl", "fits")
    assert (unknown.returncode, unknown.stdout, unknown.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("statement", ["import kurtail_pl", "from kurtail_pl.cli.main import main; main(['--help'])"])
def test_package_and_help_load_no_heavy_library(statement: str) -> None:
    heavy = "{'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'}"
    done = python("-c", f"{statement}\nimport sys\nassert not {heavy} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_package_gives_load_and_nothing_unknown() -> None:
    assert kurtail_pl.load.__module__ == "kurtail_pl.artefact.load"
    with pytest.raises(AttributeError, match="unload"):
        kurtail_pl.unload  # noqa: B018
