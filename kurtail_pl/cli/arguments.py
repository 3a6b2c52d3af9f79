"""Options as they were typed, before a parser sees them: each once, flags with a value, recipes that can be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import yaml

from kurtail_pl.cli.failures import UsageError
from kurtail_pl.cli.recipes import recipe_file
from kurtail_pl.errors import reason, shortened
from kurtail_pl.storage.reading import Unreadable, read_utf8

FLAGS = ("dry_run", "overwrite", "check", "force")
"""These options may stand without a value, and are then true."""
CONFIGS = ("--config", "-c")
NODES = 100_000
"""A recipe may have this many values; what an anchor names counts each time that it is used."""
DEPTH = 50
OF_A_CACHE = re.compile(r"(--(?:.*\.)?cache(?:\.init_args)?\.(?:keys|values))\.(\w+)")
"""Matches settings of the quantizers of a cache."""
PLAIN = re.compile(r"tag:yaml\.org,2002:\w+$")
"""Matches the tags of values that YAML itself has."""


def prepared(arguments: list[str], repeatable: tuple[str, ...] = ()) -> list[str]:
    """Arguments for a parser: flags spelled out, recipes looked at.

    Args:
        arguments: as typed.
        repeatable: options that may be given several times.

    Raises:
        UsageError: when an option is given twice, or a recipe cannot be read.
    """
    found = list(_with_files(_with_nulls(spelled(arguments, repeatable))))
    for recipe in _values_of(CONFIGS, found):
        check_recipe(Path(recipe))
    return found


def spelled(arguments: list[str], repeatable: tuple[str, ...] = ()) -> list[str]:
    """The same without a look at the recipes; raises UsageError when an option is given twice."""
    found = list(_spelled_out(arguments))
    _refuse_repeated(found, (*CONFIGS, *repeatable))
    return found


def _with_nulls(arguments: list[str]) -> Iterator[str]:
    """Null for a setting of a cache's quantizer in the one form that jsonargparse takes, as a mapping."""
    taken = False
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        setting = OF_A_CACHE.fullmatch(name)
        if taken:
            taken = False
        elif setting is not None and (value if equals else following) == "null":
            taken = not equals
            yield f"{setting[1]}={{{setting[2]}: null}}"
        else:
            yield argument


def _with_files(arguments: Iterable[str]) -> Iterator[str]:
    """Recipes by the paths of their files."""
    waiting = False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if waiting:
            yield str(recipe_file(argument))
        elif option in CONFIGS and equals:
            yield f"{option}={recipe_file(value)}"
        else:
            yield argument
        waiting = not waiting and option in CONFIGS and not equals
    if waiting:
        recipe_file("")


def _spelled_out(arguments: list[str]) -> Iterator[str]:
    """Flags as ``--name=value``: jsonargparse wants a value, and no dash in a name."""
    left = iter(arguments)
    waiting: str | None = None
    for argument in left:
        if waiting is not None:
            taken = not argument.startswith("-")
            yield f"{waiting}={argument if taken else 'true'}"
            waiting = None
            if taken:
                continue
        name, equals, value = argument.partition("=")
        plain = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or plain not in FLAGS:
            yield argument
        elif equals:
            yield f"--{plain}={value}"
        else:
            waiting = f"--{plain}"
    if waiting is not None:
        yield f"{waiting}=true"


def _refuse_repeated(arguments: list[str], repeatable: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in repeatable:
            continue
        if name.endswith("+"):
            # What follows belongs to the entry that is added here.
            seen = {key: kept for key, kept in seen.items() if not key.startswith(f"{name[:-1]}.")}
            continue
        shown = value if equals else following
        if name in seen:
            raise UsageError(f"{name} is given twice, {seen[name]} and {shown}; give it once")
        seen[name] = shown


def _values_of(names: tuple[str, ...], arguments: list[str]) -> Iterator[str]:
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name in names:
            yield value if equals else following


def check_recipe(path: Path) -> None:
    """Raise UsageError, naming file and line, unless a file is YAML with names for settings, none of them twice."""
    try:
        if not path.exists():
            raise Unreadable("does not exist: name a YAML file, or a recipe that kurtail recipes lists")
        node = yaml.compose(read_utf8(path), Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise Unreadable("holds no settings: expected lines such as 'seed_everything: 0'")
        for place, (_, value) in _named_nodes(node).items():
            if place == "trainer" and not isinstance(value, yaml.MappingNode):
                raise Unreadable(f"has {value.value!r} as its trainer: expected settings{_at(value)}")
        _check_node(node, 0, [0])
        _refuse_old_form(node)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path} is not YAML{line}: {error.problem or reason(error)}; correct it") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is not YAML: {reason(error)}; correct it") from None
    except Unreadable as error:
        raise UsageError(f"{path} {error}") from None


def _check_node(node: yaml.Node, depth: int, count: list[int]) -> None:
    count[0] += 1
    if depth > DEPTH or count[0] > NODES:
        raise Unreadable(f"is nested too deeply or refers to itself{_at(node)}: write it out")
    if not PLAIN.match(node.tag):
        raise Unreadable(f"has a value of the kind {shortened(node.tag, 60)}{_at(node)}: write plain YAML")
    if isinstance(node, yaml.MappingNode):
        for _, value in _named_nodes(node).values():
            _check_node(value, depth + 1, count)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_node(value, depth + 1, count)


MOVED = {
    "WeightQuantization": "quantization", "Fusion": "fusion", "Figures": "figures", "Evaluation": "evaluation",
    "ModelCheckpoint": "checkpoints", "RotationWriter": None,
}  # fmt: skip
"""Callbacks that earlier recipes listed, and the section of the recipe that has their settings now."""


CACHE = ("keys", "values", "sinks", "centre_keys")
"""Settings of the cache that earlier recipes had in the scheme itself."""


def _refuse_old_form(recipe: yaml.MappingNode) -> None:
    """Raise Unreadable when a recipe has settings where they were in earlier versions."""
    _refuse_listed(recipe)
    scheme = _section(recipe, "quantization", "scheme")
    for name, (key, _) in scheme.items():
        if name in CACHE:
            raise Unreadable(
                f"has {name} in quantization.scheme{_at(key)}: move it to quantization.scheme.cache.init_args, as in "
                "configs/base.yaml"
            )


def _refuse_listed(recipe: yaml.MappingNode) -> None:
    """Raise Unreadable when a recipe lists the callbacks of the pipeline, which have sections of their own."""
    callbacks = _section(recipe, "trainer").get("callbacks")
    listed = callbacks[1].value if callbacks is not None and isinstance(callbacks[1], yaml.SequenceNode) else []
    for node in listed:
        named = _named_nodes(node).get("class_path") if isinstance(node, yaml.MappingNode) else None
        name = str(named[1].value).rpartition(".")[2] if named is not None else ""
        if name not in MOVED:
            continue
        section = MOVED[name]
        remedy = f"move its settings to the section {section} at the top" if section else "leave it out"
        raise Unreadable(f"lists {name} in trainer.callbacks{_at(node)}: {remedy}, as in configs/base.yaml")


def _section(recipe: yaml.Node, *names: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The settings of a section by name; none where there is no such section."""
    for name in names:
        found = _named_nodes(recipe).get(name) if isinstance(recipe, yaml.MappingNode) else None
        if found is None:
            return {}
        recipe = found[1]
    return _named_nodes(recipe) if isinstance(recipe, yaml.MappingNode) else {}


def _named_nodes(node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The settings of a mapping by name."""
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise Unreadable(f"has a setting without a name{_at(key)}: expected lines such as 'seed_everything: 0'")
        if key.value in found and key.value != "<<":
            raise Unreadable(f"has {key.value!r} twice{_at(found[key.value][0])} and{_at(key)}: keep one")
        found[key.value] = key, value
    return found


def _at(node: yaml.Node) -> str:
    return f" in line {node.start_mark.line + 1}"
