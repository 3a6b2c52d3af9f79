"""Texts, rows of tasks, recipes."""

import contextlib
import io
import random
from functools import reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path

import yaml
from fuzz.mutations import as_json, damaged, edited, foreign, json_files, places
from fuzz.registry import Target, target
from fuzz.samples import Samples
from hypothesis import strategies as st
from task_rows import question

from kurtail_pl.cli.failures import USAGE, USER
from kurtail_pl.cli.main import main
from kurtail_pl.errors import KurtailError
from kurtail_pl.stages.evaluation.tasks.harness import parts_of
from kurtail_pl.stages.evaluation.tasks.spec import MMLU, TASKS, TaskSpec, split_of
from kurtail_pl.stages.text import read_text

RECIPE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
BOMB = "\n".join(f"{name}: &{name} [{', '.join([f'*{inner}'] * 8)}]" for inner, name in pairwise("abcdefgh"))
"""Eight to the seventh values in a few lines."""
YAML = [
    b"a: &a [*a]",
    b"!!python/object/apply:os.system [exit]",
    f"a: &a [1]\n{BOMB}".encode(),
    b"model:\n\t- 1",
    b"model: {class_path: os.system, init_args: {command: exit}}",
    b"model: {class_path: kurtail_pl.lit.KurTailModule, init_args: {rotation_seed: 1, rotation_seed: 2}}",
    b"config: recipe.yaml",
    b"? [a]\n: b",
    b"- 1\n- 2",
    b"a: 1\n---\nb: 2",
    b"%YAML 9.9\n---\na: 1",
    b"<<: *x",
]
"""What YAML can say and no recipe does."""


@target
def jsonl(samples: Samples, place: Path) -> Target:
    file = place / "rows.jsonl"
    rows = [{"text": "One."}, {"instruction": "Say", "input": "", "output": "two"}, {"text": "Three", "meta": {"a": 1}}]
    lines = st.lists(
        st.one_of(st.sampled_from(rows).map(as_json), edited(rows[1]).map(as_json), foreign()), max_size=5
    ).map(b"\n".join)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_text(str(file), "calibration")

    return Target(1000, st.one_of(lines, damaged(b"\n".join(map(as_json, rows)))), read)


@target
def json_rows(samples: Samples, place: Path) -> Target:
    file = place / "rows.json"
    rows = [{"text": "One."}, {"instruction": "Say", "input": "", "output": "two"}]

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_text(str(file), "calibration")

    return Target(800, json_files(rows), read)


@target
def plain_text(samples: Samples, place: Path) -> Target:
    def read(content: bytes) -> None:
        for suffix in (".txt", ".raw"):
            file = place / f"text{suffix}"
            file.write_bytes(content)
            read_text(str(file), "calibration")

    return Target(1000, st.one_of(damaged("Ein König\nfand “Brot”.\r\n".encode()), foreign()), read)


@target
def tasks(samples: Samples, place: Path) -> Target:
    """Rows of a task, behind its name, to the harness's questions and the score."""
    random_rows = random.Random(0)
    rows = {name: [question(random_rows, name) for _ in range(2)] for name in TASKS if name != MMLU}
    files = {name: place / name / f"{split_of(name)}.jsonl" for name in rows}
    for file in files.values():
        file.parent.mkdir()

    @st.composite
    def inputs(draw: st.DrawFn) -> bytes:
        name = draw(st.sampled_from(sorted(rows)))
        lines = as_json(draw(edited(rows[name][0]))) + b"\n" + as_json(rows[name][1])
        return name.encode() + b"\0" + draw(st.one_of(st.just(lines), st.just(lines), damaged(lines), foreign()))

    def read(content: bytes) -> None:
        task, _, lines = content.partition(b"\0")
        name = task.decode()
        files[name].write_bytes(lines)
        for part in parts_of(name, TaskSpec((name,), str(place))):
            requests = part.requests()
            part.score(requests, [(-1.0 * number, False) for number in range(len(requests))])

    return Target(400, inputs(), read)


def command(*arguments: str) -> None:
    """Run a verb; what it refuses becomes an error with what it prints."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            main(list(arguments))
    except SystemExit as stop:
        if stop.code in (USER, USAGE):
            raise KurtailError(said.getvalue().strip()) from stop
        raise


@target
def recipe(samples: Samples, place: Path) -> Target:
    """A recipe in YAML, to its plan."""
    settings = yaml.safe_load(RECIPE.read_text())
    settings["data"]["init_args"]["capture"] |= {"model": str(samples.model), "rows": 12}
    for path in list(places(settings)):
        if path[-1:] == ("text",):
            parent = reduce(getitem, path[:-1], settings)
            parent["text"] = {"source": str(samples.text), "windows": 2, "seqlen": 8}
    valid = yaml.safe_dump(settings, sort_keys=False).encode()
    file, under = place / "recipe.yaml", place / "under.yaml"
    # What an input leaves out is the default, but for the model: reading the packaged one takes long.
    under.write_text(yaml.safe_dump({"data": {"init_args": {"capture": {"model": str(samples.model)}}}}))
    changed = edited(settings).map(as_json)
    inputs = st.one_of(changed, changed, changed, damaged(valid), st.sampled_from(YAML), foreign())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        command("plan", "--config", str(under), "--config", str(file))

    return Target(100, inputs, read)
