"""Which tasks, on what rows."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from kurtail_pl.errors import ConfigError, HarnessMissing, TextError

ZERO_SHOT = ("boolq", "hellaswag", "openbookqa", "piqa", "social_iqa", "winogrande", "arc_easy", "arc_challenge")
"""The eight whose mean is the paper's column *0-shot*."""
MMLU, MATHQA = "mmlu", "mathqa"
TASKS = (*ZERO_SHOT, MMLU, MATHQA)
"""All tasks, by the harness's names, in the order of the tables."""

TEST_SPLIT = ("openbookqa", "arc_easy", "arc_challenge", MMLU, MATHQA)
"""Those whose test split the harness evaluates; of the others the answers are public for the validation split only."""


@dataclass(frozen=True)
class TaskSpec:
    """Tasks of the lm-evaluation-harness.

    All but MMLU are asked without examples. Rows are always the first ones and MMLU's examples the first of its dev
    split, so there is nothing to draw and no seed.

    Args:
        names: tasks, as a list or with commas between; None for all of them, less those with no file in the folder.
        folder: local rows, ``TASK/SPLIT.jsonl`` with the fields of the harness's own data sets; None takes those data
            sets from the Hugging Face hub.
        limit: rows of each task; None for all. MMLU's are dealt out over its subjects by their size.
        mmlu_shots: examples before each question of MMLU, from the dev split of its subject; 5 is the convention.
    """

    names: tuple[str, ...] | str | None = None
    folder: str | None = None
    limit: int | None = None
    mmlu_shots: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            object.__setattr__(self, "names", tuple(name.strip() for name in self.names.split(",")))
        for name in self.names or ():
            if name not in TASKS:
                raise ConfigError(f"task {name!r} is unknown; choose from {', '.join(TASKS)}")
        if self.names is not None and (not self.names or len(set(self.names)) < len(self.names)):
            raise ConfigError(f"names is {self.names}; name each task once, or none for all of them")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is {self.limit}; give a positive number of rows, or none for all")
        if self.mmlu_shots < 0:
            raise ConfigError(f"mmlu_shots is {self.mmlu_shots}; give 0 or more")


def chosen_tasks(spec: TaskSpec) -> tuple[list[str], dict[str, str]]:
    """Names of the tasks to be run, in the tables' order, and why others are not.

    Raises:
        HarnessMissing: when the harness is not installed.
        TextError: when there is no such folder, or it lacks a file of a task that was asked for by name.
    """
    _require_harness()
    names = [name for name in TASKS if name in (spec.names or TASKS)]
    skipped = {} if spec.folder is None else _lacking(names, spec)
    return [name for name in names if name not in skipped], skipped


def _lacking(names: list[str], spec: TaskSpec) -> dict[str, str]:
    """Tasks that the folder has no rows of, and which file it lacks."""
    assert spec.folder is not None
    if not Path(spec.folder).expanduser().is_dir():
        raise TextError(f"tasks folder {spec.folder} does not exist; name a folder with TASK/SPLIT.jsonl")
    skipped = {name: f"no file {path}" for name in names for path in files_of(name, spec) if not path.is_file()}
    if skipped and spec.names is not None:
        raise TextError("; ".join(f"{name}: {why}" for name, why in skipped.items()))
    if len(skipped) == len(names):
        raise TextError(f"{spec.folder} holds no task; expected files such as {files_of(names[0], spec)[0]}")
    return skipped


def _require_harness() -> None:
    for package in ("lm_eval", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise HarnessMissing(f"tasks need the package {package}; run: pip install 'kurtail-pl[eval]'")


def split_of(name: str) -> str:
    """The split that is evaluated."""
    return "test" if name in TEST_SPLIT else "validation"


def files_of(name: str, spec: TaskSpec) -> list[Path]:
    """The local files of a task: its rows, and MMLU's examples."""
    assert spec.folder is not None
    folder = Path(spec.folder).expanduser() / name
    examples = [folder / "dev.jsonl"] if name == MMLU and spec.mmlu_shots else []
    return [folder / f"{split_of(name)}.jsonl", *examples]
