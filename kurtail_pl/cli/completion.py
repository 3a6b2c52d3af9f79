"""`kurtail completion`: what a shell needs to complete verbs, options and recipes.

A shell asks at every press of a key, and to make the parsers takes seconds: the script holds their options itself.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress

import yaml

from kurtail_pl.cli.api import flat
from kurtail_pl.cli.export import exporters
from kurtail_pl.cli.main import VERBS, main
from kurtail_pl.cli.recipes import BASE, FOLDER, shipped
from kurtail_pl.cli.usage import SettingsParser

WITH_RECIPES = ("plan", "fit", "validate", "compare", "demo")
"""These verbs take every setting of a recipe as an option."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.]*")
SCRIPT = """\
# Completes the kurtail command in bash, and in zsh after compinit.
if [ -n "$ZSH_VERSION" ]; then autoload -Uz bashcompinit && bashcompinit; fi
_kurtail() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" found=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        found="{verbs}"
    else
        case "$before:$word" in
            --config:* | -c:* | --with:* | --weights:*) found="{recipes}" ;;
            --to:*) found="{runtimes}" ;;
            *:-*) case "${{COMP_WORDS[1]}}" in
{options}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$found" -- "$word"))
}}
complete -o default -F _kurtail kurtail
"""


def completion(arguments: list[str]) -> None:
    """Print a script that completes this command in bash and zsh."""
    SettingsParser("kurtail completion", description=completion.__doc__).parse_args(arguments)
    recipes = {part for name in shipped() for part in (name, name.rpartition("/")[2])}
    options = [f'                {verb}) found="{" ".join(options_of(verb))}" ;;' for verb in VERBS]
    words = {"verbs": VERBS, "recipes": sorted(recipes), "runtimes": exporters()}
    print(SCRIPT.format(options="\n".join(options), **{name: " ".join(each) for name, each in words.items()}), end="")


def help_of(verb: str, *arguments: str) -> str:
    """What a verb's `--help` prints, as wide as the variable COLUMNS says."""
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        main([verb, *arguments, "--help"])
    return printed.getvalue()


def options_of(verb: str) -> list[str]:
    """All options of a verb, in the order of the alphabet."""
    runs = [("--to", name) for name in exporters()] if verb == "export" else [()]
    found = {"--help", *(option for run in runs for option in OPTION.findall(help_of(verb, *run).split("\n\n")[0]))}
    if verb in WITH_RECIPES:
        found |= {"--config", *recipe_options()}
    return sorted(found)


def recipe_options() -> Iterator[str]:
    """Every setting of base.yaml as an option, without the parts of its name that may be left out."""
    base = yaml.safe_load((FOLDER / BASE).read_text(encoding="utf-8"))
    for name, _ in flat(base):
        yield f"--{name.replace('.init_args', '').removesuffix('.class_path')}"
