"""Puts what the command line says of itself into the site's pages, where they ask for it.

A page asks by a line such as ``<!-- kurtail fit --help -->``: what stands in the site is then what the verb prints.
"""

from __future__ import annotations

import os
import re
from functools import cache

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from kurtail_pl.cli.completion import WITH_RECIPES, help_of
from kurtail_pl.cli.main import main_help, sentence

ASKED = re.compile(r"^<!-- kurtail ([a-z]*)(.*?) ?--help -->$", re.M)
BOILERPLATE = re.compile(
    r"  -h, --help .*\n|  --print_config.*\n(?: {20,}.*\n)*|  --[\w.]+ CONFIG\s+Path to a configuration file\.\n"
)
"""What each help repeats."""
WIDTH = "82"
"""Characters in a line: so many fit beside the navigation."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the lines that ask for a help by it."""
    return ASKED.sub(lambda asked: f"```text\n{_help(asked[1], *asked[2].split())}\n```", markdown)


@cache
def _help(verb: str, *arguments: str) -> str:
    os.environ["COLUMNS"] = WIDTH
    if not verb:
        return main_help()
    _, description, *sections = BOILERPLATE.sub("", help_of(verb, *arguments)).strip().split("\n\n")
    if verb in WITH_RECIPES:
        description = sentence(verb)
        sections = [each for each in sections if each.startswith(("options:", "Other options"))]
    return "\n\n".join([description, *sections])
