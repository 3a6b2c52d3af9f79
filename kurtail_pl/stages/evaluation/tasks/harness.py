"""The harness's own task objects, on its data sets or on local rows.

Of a task's configuration only where the rows come from is replaced: prompts, metrics and processing are the harness's,
those that published numbers were made with. Local rows go in as objects: nothing is downloaded, and no cache of data
sets is read or written.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from kurtail_pl.errors import ConfigError, TextError, reason, shortened
from kurtail_pl.stages.evaluation.tasks.rows import read_rows
from kurtail_pl.stages.evaluation.tasks.spec import MMLU, TaskSpec, files_of, split_of

FOLDERS = ("super_glue", "hellaswag", "openbookqa", "piqa", "siqa", "winogrande", "arc", "mmlu/default", "mathqa")
"""Where the harness keeps our tasks: reading its whole index of thousands takes seconds."""
GROUPS = ("humanities", "social_sciences", "stem", "other")
"""Groups of MMLU's subjects."""


@dataclass(frozen=True)
class Part:
    """What the harness calls a task: one of those here, or one subject of MMLU.

    Attributes:
        name: in the harness.
        task: the task here that it belongs to.
        group: of MMLU's subjects.
        rows: how many of its first rows are asked; None for all.
    """

    name: str
    task: str
    group: str | None
    harness_task: ConfigurableTask
    rows: int | None

    def requests(self) -> list[Instance]:
        """The questions, one request per answer to choose from."""
        with quiet():
            self.harness_task.build_all_requests(limit=self.rows)
        instances: list[Instance] = self.harness_task.instances
        return instances

    def score(self, requests: list[Instance], answers: list[tuple[float, bool]]) -> dict[str, float]:
        """Rows asked, and for each of the harness's accuracies how many were right."""
        of_row: dict[int, tuple[Any, list[tuple[float, bool]]]] = {}
        for request, answer in zip(requests, answers, strict=True):
            of_row.setdefault(request.doc_id, (request.doc, []))[1].append(answer)
        sums: dict[str, float] = {"rows": len(of_row)}
        for row, found in of_row.values():
            for metric, value in self.harness_task.process_results(row, found).items():
                sums[metric] = sums.get(metric, 0) + value
        return sums


def parts_of(name: str, spec: TaskSpec) -> list[Part]:
    """The harness's tasks that make up a task here, limited to the rows asked for.

    Raises:
        TextError: when local rows cannot be read or lack the harness's fields, or the hub cannot be reached.
        ConfigError: when a subject of MMLU has fewer examples than asked for.
    """
    if name == MMLU:
        return _subjects(spec)
    rows = None if spec.folder is None else {split_of(name): read_rows(files_of(name, spec)[0], name)}
    return [Part(name, name, None, _harness_task(name, 0, rows), spec.limit)]


def _subjects(spec: TaskSpec) -> list[Part]:
    """MMLU's, each with its share of the rows."""
    groups = {part: group for group in GROUPS for part in sorted(_index()[f"mmlu_{group}_tasks"].tags)}
    rows_of = dict.fromkeys(groups) if spec.folder is None else _by_subject(spec, set(groups))
    built = {part: _harness_task(part, spec.mmlu_shots, rows_of[part]) for part in groups if part in rows_of}
    sizes = [len(task.eval_docs) for task in built.values()]
    shares = sizes if spec.limit is None else deal(spec.limit, sizes)
    return [
        Part(part, MMLU, groups[part], task, rows)
        for (part, task), rows in zip(built.items(), shares, strict=True)
        if rows
    ]


def deal(total: int, sizes: list[int]) -> list[int]:
    """Split a number over parts in proportion to their sizes: whole shares, then the largest remainders, first wins."""
    whole = sum(sizes)
    total = min(total, whole)
    shares = [total * size // whole for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _by_subject(spec: TaskSpec, known: set[str]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Local rows of MMLU: name in the harness -> split -> rows, for each subject that has rows to ask."""
    subjects: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in reversed(files_of(MMLU, spec)):
        for row in read_rows(path, MMLU):
            part = f"mmlu_{row['subject']}"
            if part not in known:
                subject = shortened(row["subject"], 40)
                raise TextError(f"{path} has a row of the subject {subject!r}, which MMLU does not have; correct it")
            subjects.setdefault(part, {"dev": [], "test": []})[path.stem].append(row)
    asked = {part: splits for part, splits in subjects.items() if splits["test"]}
    for part, splits in asked.items():
        if len(splits["dev"]) < spec.mmlu_shots:
            raise ConfigError(
                f"mmlu_shots is {spec.mmlu_shots}, but {part} has {len(splits['dev'])} examples; ask for fewer"
            )
    return asked


def _harness_task(name: str, shots: int, local: dict[str, list[dict[str, Any]]] | None) -> ConfigurableTask:
    config = {**load_yaml(_index()[name].yaml_path), "num_fewshot": shots}
    if local is not None:
        missing = [key for key in ("training_split", "validation_split") if config.get(key) not in local]
        config |= {"custom_dataset": lambda **_: _data_sets(local), **dict.fromkeys(missing)}
    try:
        with quiet():
            return ConfigurableTask(config=config)
    except Exception as error:  # Its own kinds, the hub client's, those of HTTP and of every file format.
        if local is not None:
            raise TextError(f"the local rows of {name} are not as the harness reads them ({reason(error)})") from error
        raise TextError(
            f"the rows of {name} cannot be had from the Hugging Face hub ({reason(error)}); give a folder of local ones"
        ) from error


def _data_sets(local: dict[str, list[dict[str, Any]]]) -> dict[str, Dataset]:
    return {split: Dataset.from_list(rows) for split, rows in local.items()}


@cache
def _index() -> dict[str, Any]:
    """The harness's entries of our tasks."""
    root = Path(lm_eval.tasks.__file__).parent
    with quiet():
        index: dict[str, Any] = TaskManager(
            include_defaults=False, include_path=[root / folder for folder in FOLDERS]
        ).task_index
    return index


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness's own bars and remarks off the screen; errors are raised, and shown, all the same."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.setLevel(before)
