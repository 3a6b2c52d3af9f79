"""Accuracies: the harness's own run on the same rows, and by hand; resuming; nothing from the network."""

import json
import shutil
import socket
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from task_rows import read_rows
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import kurtail_pl
from kurtail_pl.stages.evaluation.results import evaluate_folder
from kurtail_pl.stages.evaluation.tasks.evaluate import evaluate_models, evaluate_tasks
from kurtail_pl.stages.evaluation.tasks.model import LoadedModel
from kurtail_pl.stages.evaluation.tasks.spec import TASKS, ZERO_SHOT, TaskSpec
from kurtail_pl.stages.text import TextSpec
from kurtail_pl.storage.activations import ActivationStore
from kurtail_pl.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("cache")
HARNESS = Path(str(__import__("lm_eval").__file__)).parent / "tasks"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_accuracies_are_those_of_the_harness(tiny: Path, task_rows: Path, tmp_path: Path) -> None:
    """Its own run of task files that include its own and point at the rows."""
    yaml = {
        "boolq": "super_glue/boolq/default", "hellaswag": "hellaswag/hellaswag", "openbookqa": "openbookqa/openbookqa",
        "piqa": "piqa/piqa", "social_iqa": "siqa/siqa", "winogrande": "winogrande/default", "arc_easy": "arc/arc_easy",
        "arc_challenge": "arc/arc_challenge", "mathqa": "mathqa/mathqa",
    }  # fmt: skip
    for name, included in yaml.items():
        (path,) = (task_rows / name).glob("*.jsonl")
        _write_task(tmp_path, name, included, {path.stem: path}, {"test_split": None, "validation_split": path.stem})
    subjects = sorted({row["subject"] for row in read_rows(task_rows / "mmlu" / "test.jsonl")})
    for subject in subjects:
        files = {split: tmp_path / f"{subject}-{split}.jsonl" for split in ("test", "dev")}
        for split, path in files.items():
            rows = read_rows(task_rows / "mmlu" / f"{split}.jsonl")
            path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["subject"] == subject))
        _write_task(tmp_path, f"mmlu_{subject}", f"mmlu/default/mmlu_{subject}", files, {"num_fewshot": 2})
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny), batch_size=4)
    run = simple_evaluate(lm, tasks=manager.all_subtasks, task_manager=manager, bootstrap_iters=1, log_samples=False)
    expected = run["results"]

    found = evaluate_tasks(Checkpoint(tiny), TaskSpec(folder=str(task_rows), mmlu_shots=2))
    assert list(found["tasks"]) == list(TASKS)
    for name in yaml:
        own, theirs = found["tasks"][name], expected[name]
        assert own["rows"] == run["n-samples"][name]["effective"] == 7
        for metric in ("acc", "acc_norm"):
            assert own.get(metric) == pytest.approx(theirs.get(f"{metric},none"))
            assert own.get(f"{metric}_stderr") == pytest.approx(theirs.get(f"{metric}_stderr,none"))
        assert own["metric"] == ("acc_norm" if "acc_norm,none" in theirs else "acc")
        assert (own["value"], own["stderr"]) == (own[own["metric"]], own[f"{own['metric']}_stderr"])
    sizes = {s: run["n-samples"][f"mmlu_{s}"]["effective"] for s in subjects}
    right = {s: expected[f"mmlu_{s}"]["acc,none"] * sizes[s] for s in subjects}
    mmlu = found["tasks"]["mmlu"]
    assert mmlu["acc"] == found["mmlu"] == pytest.approx(sum(right.values()) / 14)
    assert {group: figures["acc"] for group, figures in mmlu["groups"].items()} == pytest.approx(
        {
            "humanities": right["philosophy"],
            "stem": (right["anatomy"] + right["astronomy"]) / 11,
            "other": right["virology"] / 2,
        }
    )
    assert mmlu["groups"]["humanities"]["acc_stderr"] is None
    assert (mmlu["rows"], mmlu["shots"], mmlu["split"]) == (14, 2, "test")
    assert found["tasks"]["piqa"]["split"] == "validation"
    # Two examples and a question are too long for the tiny model's context.
    assert (found["tasks"]["piqa"]["cut"], found["tasks"]["mmlu"]["cut"]) == (0, 4 * 14)
    eight = [found["tasks"][name] for name in ZERO_SHOT]
    assert found["mean"] == pytest.approx(np.mean([task["value"] for task in eight]))
    assert found["mean_stderr"] == pytest.approx(sqrt(np.sum([task["stderr"] ** 2 for task in eight])) / 8)
    assert found["mathqa"] == found["tasks"]["mathqa"]["acc_norm"]


def _write_task(folder: Path, name: str, included: str, files: dict[str, Path], changes: dict[str, Any]) -> None:
    """A task file in JSON, which is YAML, as the harness's guide has it for local data."""
    data = {split: str(path) for split, path in files.items()}
    config = {
        "include": str(HARNESS / f"{included}.yaml"), "task": name, "dataset_path": "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")}, "training_split": None, **changes,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(config))


@pytest.mark.parametrize("which", ["tiny", "artefact"])
def test_accuracy_by_hand(which: str, request: pytest.FixtureRequest, task_rows: Path) -> None:
    place: Path = request.getfixturevalue(which)
    load = kurtail_pl.load if which == "artefact" else AutoModelForCausalLM.from_pretrained
    model, tokenizer = load(place), Tokenizer.from_file(str(place / "tokenizer.json"))
    right = []
    for row in read_rows(task_rows / "piqa" / "validation.jsonl"):
        totals, context = [], f"Question: {row['goal']}\nAnswer:"
        start = len(tokenizer.encode(context).ids)
        for answer in (row["sol1"], row["sol2"]):
            ids = torch.tensor(tokenizer.encode(f"{context} {answer}").ids)
            with torch.no_grad():
                scores = model(ids.unsqueeze(0)).logits[0].double().log_softmax(-1)
            totals.append(sum(scores[i - 1, ids[i]].item() for i in range(start, len(ids))) / len(answer))
        right.append(totals.index(max(totals)) == row["label"])
    found = evaluate_tasks(Checkpoint(place), TaskSpec(names="piqa", folder=str(task_rows)))
    assert found["tasks"]["piqa"]["acc_norm"] == np.mean(right)
    assert found["tasks"]["piqa"]["acc_norm_stderr"] == pytest.approx(np.std(right, ddof=1) / sqrt(len(right)))
    assert (found["mean"], found["mmlu"], found["mathqa"]) == (None, None, None)
    assert found["cost"]["seconds"] > 0


def test_packed_weights_give_the_same_answers(artefact: Path, task_rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short they are dequantized at every use."""
    spec = TaskSpec(names="hellaswag,arc_easy", folder=str(task_rows))
    usual = evaluate_tasks(Checkpoint(artefact), spec)
    monkeypatch.setattr("kurtail_pl.stages.evaluation.tasks.evaluate.free_memory", lambda: 1)
    assert evaluate_tasks(Checkpoint(artefact), spec)["tasks"] == usual["tasks"]


class Killed(BaseException):
    """What no handler expects."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counts the harness's questions to a model; after `left` of them the process dies."""
    counter: dict[str, Any] = {"calls": 0, "left": None}
    real = LoadedModel.loglikelihood

    def count(self: LoadedModel, *arguments: Any, **named: Any) -> Any:
        if counter["calls"] == counter["left"]:
            raise Killed
        counter["calls"] += 1
        return real(self, *arguments, **named)

    monkeypatch.setattr(LoadedModel, "loglikelihood", count)
    return counter


def test_killed_and_run_again(tiny: Path, task_rows: Path, asked: dict[str, Any], cache: Path) -> None:
    spec = TaskSpec(names="piqa,arc_easy,mmlu", folder=str(task_rows), mmlu_shots=1)
    undisturbed = evaluate_tasks(Checkpoint(tiny), spec)
    assert asked["calls"] == 6  # four subjects of MMLU
    asked |= {"calls": 0, "left": 4}
    with pytest.raises(Killed):
        evaluate_tasks(Checkpoint(tiny), spec)
    asked |= {"calls": 0, "left": 2}
    again = evaluate_tasks(Checkpoint(tiny), spec)
    assert asked["calls"] == 2
    assert {**again, "cost": None} == {**undisturbed, "cost": None}
    assert list((cache / "work").iterdir()) == []


@pytest.mark.parametrize("change", ["limit", "shots", "rows", "model"])
def test_other_settings_start_anew(
    change: str, tiny: Path, tied: Path, task_rows: Path, asked: dict[str, Any], tmp_path: Path
) -> None:
    rows = shutil.copytree(task_rows, tmp_path / "rows")
    settings: dict[str, Any] = {"names": "piqa,mmlu", "folder": str(rows), "limit": 4, "mmlu_shots": 1}
    whole = 1 + 3  # MMLU's 4 or 5 rows fall to three of its four subjects
    asked["left"] = 3
    with pytest.raises(Killed):
        evaluate_tasks(Checkpoint(tiny), TaskSpec(**settings))
    asked |= {"calls": 0, "left": None}
    if change == "rows":
        path = rows / "mmlu" / "dev.jsonl"
        path.write_text(path.read_text().replace("the", "a"))
    settings |= {"limit": {"limit": 5}, "shots": {"mmlu_shots": 2}}.get(change, {})
    evaluate_tasks(Checkpoint(tied if change == "model" else tiny), TaskSpec(**settings))
    assert asked["calls"] == whole


def test_results_are_written_when_all_is_measured(
    tiny: Path, store: ActivationStore, text: TextSpec, task_rows: Path, asked: dict[str, Any], tmp_path: Path
) -> None:
    spec = TaskSpec(names="piqa,boolq", folder=str(task_rows))
    asked["left"] = 1
    with pytest.raises(Killed):
        evaluate_folder(Checkpoint(tiny), tmp_path, text, store, 20, spec)
    assert not (tmp_path / "results.json").exists()
    asked |= {"calls": 0, "left": None}
    results = evaluate_folder(Checkpoint(tiny), tmp_path, text, store, 20, spec)
    assert asked["calls"] == 1
    assert list(results["tasks"]["tasks"]) == ["boolq", "piqa"]
    assert evaluate_folder(Checkpoint(tiny), tmp_path, text, store, 20)["tasks"] == results["tasks"]


def test_finished_models_are_not_repeated(tiny: Path, tied: Path, task_rows: Path, asked: dict[str, Any]) -> None:
    spec = TaskSpec(names="piqa,boolq", folder=str(task_rows))
    models = [Checkpoint(tiny), Checkpoint(tied)]
    expected = [evaluate_tasks(model, spec)["tasks"] for model in models]
    assert expected[0] != expected[1]
    asked |= {"calls": 0, "left": 3}
    with pytest.raises(Killed):
        evaluate_models(models, spec)
    asked |= {"calls": 0, "left": 1}
    assert [found["tasks"] for found in evaluate_models(models, spec)] == expected
    assert asked["calls"] == 1
