"""The documents: their links lead somewhere, they keep to their lengths, and the verbs and recipes in them exist."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from kurtail_pl.cli.main import VERBS
from kurtail_pl.cli.recipes import shipped

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?:\[[^\]]*\]\(|^\[[^\]]+\]: )([^)\s]+)", re.M)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def listed() -> list[Path]:
    """All pages of the checkout."""
    places = ("*.md", "docs/**/*.md", "configs/**/*.md", "export/**/*.md", "benchmarks/*.md", ".github/**/*.md")
    return sorted({path for place in places for path in ROOT.glob(place)})


PAGES = [str(path.relative_to(ROOT)) for path in listed()]
SITE = [name for name in PAGES if not name.startswith(".github") and name != "CHANGELOG.md"]
"""Pages that are read; a changelog is looked up."""


def prose(text: str) -> str:
    """A page without its code blocks."""
    return FENCED.sub("", text)


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page may end in."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(prose(page.read_text())):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name} links to {link}"
        assert target.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}"


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    # Numbers that are no part of a name, a version or a link.
    numbers = re.findall(r"(?<![\w./-])\d+(?:[.,]\d+)*", re.sub(r"\]\([^)]*\)|^\[\w+\]: .*$", "]", text, flags=re.M))
    assert len(numbers) <= 40


@pytest.mark.parametrize("name", SITE)
def test_a_page_is_read_in_one_sitting(name: str) -> None:
    assert len((ROOT / name).read_text().split()) <= 1500


@pytest.mark.parametrize("name", SITE)
def test_lines_are_short_but_for_tables_and_commands(name: str) -> None:
    lines = prose((ROOT / name).read_text()).splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_no_command_of_a_page_goes_without_its_test() -> None:
    """Those that `test_readme` runs; other pages of docs mark what needs files of the reader's own as plain text."""
    tested = re.search(r"^PAGES = \((.*?)\)$", (ROOT / "tests/e2e/test_readme.py").read_text(), re.M | re.S)
    assert tested
    pages = ["README.md", *(name for name in PAGES if name.startswith("docs/"))]
    with_commands = {
        name
        for name in pages
        for language, block in FENCED.findall((ROOT / name).read_text())
        if language == "bash" and re.search(r"^kurtail ", block, re.M)
    }
    assert with_commands == set(re.findall(r'"(.*?)"', tested[1]))


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_verbs_and_recipes_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    commands = re.findall(r"(?:^|`)kurtail ([a-z]+)([^`\n#]*)", text, re.M)
    assert {verb for verb, _ in commands} <= set(VERBS)
    options = " ".join(given for _, given in commands)
    recipes = re.findall(r"--(?:config|with) ([a-z][\w./*-]*)", options)
    known = {*shipped(), *(Path(recipe).name for recipe in shipped())}
    assert {recipe for recipe in recipes if not recipe.endswith(".yaml")} <= known


def test_the_site_has_every_page_of_docs() -> None:
    def pages(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for each in (part.values() if isinstance(part, dict) else part) for page in pages(each)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")} <= set(pages(site["nav"]))


def test_no_page_names_a_folder_of_its_author() -> None:
    found = subprocess.run(
        ["git", "grep", "-lE", "/(home|work|Users|root)/", "--", "*.md", "*.yml", "*.cff"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode > 1:
        pytest.skip("this is no checkout of git")
    assert found.stdout == ""


def test_badges_say_what_the_project_file_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    badges = re.findall(r"img\.shields\.io/badge/([^)]*)\)", (ROOT / "README.md").read_text())
    oldest, licence = project["requires-python"].removeprefix(">="), project["license"].replace("-", "_")
    assert badges == [f"licence-{licence}-blue", f"python-{oldest}_and_newer-blue", "arXiv-2503.01483-b31b1b"]
