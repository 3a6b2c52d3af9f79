"""The script of `kurtail completion`, as a shell runs it, and the parsers that know what it offers."""

import io
import json
import shutil
import subprocess
from contextlib import redirect_stdout

import pytest
import yaml

from kurtail_pl.cli.api import flat
from kurtail_pl.cli.completion import recipe_options
from kurtail_pl.cli.main import VERBS, main
from kurtail_pl.cli.recipes import BASE, FOLDER

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
SHELL = shutil.which("bash")


@pytest.fixture(scope="module")
def script() -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", ["kurtail"])
        main(["completion"])
    return printed.getvalue()


@pytest.mark.skipif(SHELL is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("typed", "offered", "not_offered"),
    [
        (["in"], {"inspect"}, {"fit"}),
        (["fit", "--config", "kurtail"], {"kurtail-plus", "kurtail-protocol"}, {"rtn"}),
        (["fit", "--quantization.rounder.p"], {"--quantization.rounder.percdamp"}, {"--quantization.rounder"}),
        (["capture", "--d"], {"--dry_run"}, {"--data.steps"}),
        (["export", "--to", ""], {"gguf", "onnx", "vllm"}, {"base"}),
        (["export", "--to.k"], {"--to.kv"}, {"--to.dtype"}),
        (["inspect", ""], set(), {"--help"}),  # Files are the shell's own.
    ],
    ids=lambda words: " ".join(sorted(words)),
)
def test_a_shell_completes(script: str, typed: list[str], offered: set[str], not_offered: set[str]) -> None:
    words = " ".join(f"'{word}'" for word in ("kurtail", *typed))
    program = f"{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _kurtail; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run([str(SHELL), "-uc", f"ZSH_VERSION=\n{program}"], capture_output=True, text=True, check=True)
    found = set(done.stdout.split())
    assert found >= offered
    assert not found & not_offered
    assert done.stderr == ""


def test_each_verb_has_its_options(script: str) -> None:
    for verb in VERBS:
        assert f'{verb}) found="' in script


def test_the_parser_knows_every_option_of_a_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of base.yaml's values, given by the names that are offered, make its recipe again."""
    base = yaml.safe_load((FOLDER / BASE).read_text())
    values = [value for _, value in flat(base)]
    options = [
        f"{option}={value if isinstance(value, str) else json.dumps(value)}"
        for option, value in zip(recipe_options(), values, strict=True)
        if value is not None  # What is null in base.yaml is null already.
    ]
    assert len(options) > 50
    monkeypatch.setattr("sys.argv", ["kurtail"])
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *options, "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    for section in ("data", "fusion", "quantization", "evaluation"):
        assert printed[section] == base[section]
