"""The site: it builds without a complaint, asks for nothing from elsewhere, and has a place for every method."""

import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from kurtail_pl.cli.main import VERBS
from kurtail_pl.cli.recipes import shipped
from kurtail_pl.errors import KurtailError
from kurtail_pl.methods import BitTuner, CacheFormat, ClipTuner, Format, Rounder, Side, TransformTuner, WeightTuner
from kurtail_pl.methods.method import Method
from kurtail_pl.methods.targets import TARGETS
from kurtail_pl.storage.card import read_card

ROOT = Path(__file__).resolve().parents[2]
METHODS = "\n".join(path.read_text() for path in sorted((ROOT / "docs/methods").rglob("*.md")))
BASELINES = {"unrotated", "float", "rtn", "gptq"}
PARTS = ["What it does", "When to use it", "What it costs", "Its figure", "Settings", "What differs"]
"""Of a system's page."""
SEAMS: list[type[Method]] = [Format, CacheFormat, Rounder, Side, ClipTuner, TransformTuner, BitTuner, WeightTuner]
INLINE = re.compile(r"</?(?:a|b|code|em|i|span|strong)\b[^>]*>")
LOOKED_UP = {"project/changelog.html"}
"""Pages that nobody reads from beginning to end."""


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.__name__)
def test_every_method_has_its_settings_on_a_page(seam: type[Method]) -> None:
    ours = [kind for kind in seam.kinds().values() if kind.__module__.startswith("kurtail_pl.")]
    assert ours
    missing = [kind.__name__ for kind in ours if f"::: kurtail_pl.methods.{kind.__name__}\n" not in METHODS]
    assert missing == [], "add them to the page of their seam in docs/methods"


def test_every_target_is_on_its_page() -> None:
    for name, target in TARGETS.items():
        kind = type(target)
        assert f"::: {kind.__module__}.{kind.__name__}\n" in METHODS
        assert re.search(rf"^\| `{re.escape(name)}` \| `{kind.__name__}` \|", METHODS, re.M)


def test_recipes_of_methods_exist() -> None:
    named = set(re.findall(r"`--config ([\w.-]+)`", METHODS))
    assert len(named) > 15
    assert named <= {name.rpartition("/")[2] for name in shipped()}


def test_every_system_has_a_page() -> None:
    """With the same parts, in the table of all, and its recipe named on it."""
    overview, found = (ROOT / "docs/methods/systems.md").read_text(), set(BASELINES)
    for path in sorted((ROOT / "docs/methods/systems").glob("*.md")):
        parts = re.findall(r"^## (.*)$", page := path.read_text(), re.M)
        assert [part.split(" from ")[0] for part in parts] == PARTS, path.name
        assert f"(systems/{path.name})" in overview
        found |= set(re.findall(r"`--config ([\w.-]+)`", page))
    targets = {target.recipe for target in TARGETS.values()}
    assert {name.partition("/")[2] for name in shipped() if name.startswith("methods/")} - targets <= found


def test_every_verb_shows_its_help() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    assert set(re.findall(r"^<!-- kurtail ([a-z]+).* --help -->$", pages, re.M)) == set(VERBS)


def test_the_format_of_artefacts_names_every_file_and_every_entry_of_the_card(artefact: Path) -> None:
    page = (ROOT / "docs/reference/artefact.md").read_text()
    entries = set(re.findall(r"`(\w+)`", page))
    assert set(read_card(artefact)) - entries == set()
    patterns = [name.replace("*", ".*") for name in re.findall(r"`([\w*.-]+)`", page)]
    for path in artefact.iterdir():
        assert any(re.fullmatch(pattern, path.name) for pattern in patterns), path.name


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    for module in ("material", "mkdocs", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip("the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r"""(?:<(?:script|img|iframe)[^>]*\ssrc|<link[^>]*\shref)=["']?(?:https?:)?//[^"'\s>]+""")
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    assert {found for page in pages for found in loaded.findall(page.read_text())} == set()
    styles = [path.read_text() for path in site.rglob("*.css")]
    assert [style for style in styles if re.search(r"url\(['\"]?(?:https?:)?//", style)] == []


def test_a_page_of_the_site_is_read_in_one_sitting(site: Path) -> None:
    """With what the hooks and mkdocstrings put in."""
    long = {}
    for page in site.rglob("*.html"):
        article = re.search(r"<article.*?</article>", page.read_text(), re.S)
        text = INLINE.sub("", article[0] if article else "")
        words = len(unescape(re.sub(r"<[^>]+>", " ", text)).split())
        name = page.relative_to(site).as_posix()
        if words > 1500 and name not in LOOKED_UP:
            long[name] = words
    assert long == {}


def test_help_and_settings_are_the_real_ones(site: Path) -> None:
    help_of, rounders, recipe = (
        unescape(re.sub(r"<[^>]+>", "", (site / f"{name}.html").read_text()))
        for name in ("reference/quantize", "methods/rounders", "reference/recipe")
    )
    assert "--spec.rounder" in help_of
    assert "percdamp" in rounders
    assert "Raises" in rounders
    assert "rotation_seed: 0" in recipe
    for page in site.rglob("*.html"):
        assert str(ROOT) not in page.read_text()


def test_errors_are_listed(site: Path) -> None:
    page = (site / "reference/classes.html").read_text()
    ours = [kind for kind in KurtailError.__subclasses__() if kind.__module__ == KurtailError.__module__]
    assert len(ours) > 5
    assert [kind.__name__ for kind in ours if f'id="kurtail_pl.errors.{kind.__name__}"' not in page] == []
