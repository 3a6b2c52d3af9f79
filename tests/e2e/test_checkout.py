"""The checks of `make test` where the documents' commands have been: what they wrote is nobody's module or test."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kurtail_pl.lit.callbacks.quantization import ARTEFACTS
from kurtail_pl.lit.datamodule import RUNS

ROOT = Path(__file__).resolve().parents[2]
COMPARISONS = "comparisons"
DEFAULTS = (COMPARISONS, str(RUNS), str(ARTEFACTS))
"""Where commands write when they are not told."""


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Files of the checkout that git knows."""
    listed = git("ls-files")
    if listed.returncode:
        pytest.skip("this is no checkout of git")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def written(tracked: list[str]) -> list[str]:
    """Folders at the root that the commands of the README and of docs, and the recipes, write to."""
    pages = [(ROOT / name).read_text() for name in tracked if re.fullmatch(r"README\.md|docs/.*\.md", name)]
    lines = r"^kurtail .*--(?:out|folder|store) ([\w-]+)/"
    options = [folder for page in pages for folder in re.findall(lines, page, re.M)]
    recipes = [(ROOT / name).read_text() for name in tracked if re.fullmatch(r"configs/.*\.yaml", name)]
    keys = r"\b(?:default_root_dir|store|out): ([\w-]+)/"
    return sorted({*DEFAULTS, *options, *(folder for recipe in recipes for folder in re.findall(keys, recipe))})


def test_the_commands_write_where_git_does_not_look(written: list[str]) -> None:
    assert set(written) >= {"runs", "artifacts", "exports", COMPARISONS}
    assert [name for name in written if git("check-ignore", "-q", f"{name}/").returncode] == []


def test_what_they_wrote_changes_no_check(tracked: list[str], written: list[str], tmp_path: Path) -> None:
    """In a copy without git's help; each folder is a package, has a test that ends the run, and is badly formatted."""
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in written:
        (tmp_path / name / "model").mkdir(parents=True)
        for file in ("__init__.py", "conftest.py", "model/test_model.py"):
            (tmp_path / name / file).write_text("import   os\nraise SystemExit(3)\n")
    collect = ["pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    for check in (["ruff", "check"], ["ruff", "format", "--check"], collect):
        ended = subprocess.run([sys.executable, "-m", *check], cwd=tmp_path, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
