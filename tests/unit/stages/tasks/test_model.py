"""Log-likelihoods: by hand from transformers' logits, and the harness's own model; whatever the batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kurtail_pl
from kurtail_pl.stages.tasks import model as model_module
from kurtail_pl.stages.tasks.harness import parts_of
from kurtail_pl.stages.tasks.model import LoadedModel, batches
from kurtail_pl.stages.tasks.spec import TaskSpec

# Two float32 sums in another order; where they land on two sides of a quantizer's step, one code differs.
FLOAT, QUANTIZED = 1e-4, 2e-2
NAMES = ("boolq", "hellaswag", "winogrande", "mmlu")


@pytest.fixture(scope="module", params=["tiny", "artefact"])
def loaded(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Any, float]:
    """A model, its tokenizer, and how far its log-likelihoods may be off."""
    folder: Path = request.getfixturevalue(request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if request.param == "artefact":
        return kurtail_pl.load(folder), tokenizer, QUANTIZED
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, FLOAT


def requests_of(task_rows: Path, name: str) -> list[Any]:
    return [r for part in parts_of(name, TaskSpec(folder=str(task_rows), mmlu_shots=0)) for r in part.requests()]


def by_hand(model: PreTrainedModel, tokenizer: Any, context: str, answer: str) -> tuple[float, bool]:
    """One text at a time, in float64 from the logits on; no text is longer than the model's context."""
    text, start = tokenizer(context + answer)["input_ids"], len(tokenizer(context)["input_ids"])
    assert len(text) <= model.config.max_position_embeddings
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0].double()
    chosen = [logits[i - 1].log_softmax(-1)[text[i]].item() for i in range(start, len(text))]
    greedy = all(logits[i - 1].argmax() == text[i] for i in range(start, len(text)))
    return sum(chosen), greedy


@pytest.mark.parametrize("name", NAMES)
def test_by_hand_and_by_the_harness(loaded: tuple[PreTrainedModel, Any, float], task_rows: Path, name: str) -> None:
    model, tokenizer, tolerance = loaded
    requests = requests_of(task_rows, name)
    answers = LoadedModel(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    expected = [by_hand(model, tokenizer, *request.args) for request in requests]
    assert [total for total, _ in answers] == pytest.approx([total for total, _ in expected], abs=tolerance)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
    assert [total for total, _ in answers] == pytest.approx([total for total, _ in theirs], abs=tolerance)


@pytest.mark.parametrize("tokens", [1, 200, 100_000])
def test_batches_do_not_change_the_numbers(
    loaded: tuple[PreTrainedModel, Any, float], task_rows: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, tolerance = loaded
    requests = requests_of(task_rows, "hellaswag")
    usual = [total for total, _ in LoadedModel(model, tokenizer).loglikelihood(requests, disable_tqdm=True)]
    monkeypatch.setattr(model_module, "BATCH_TOKENS", tokens)
    other = [total for total, _ in LoadedModel(model, tokenizer).loglikelihood(requests, disable_tqdm=True)]
    assert other == pytest.approx(usual, abs=tolerance)


def test_batches_hold_every_input_once_and_one_length_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "BATCH_TOKENS", 12)
    inputs = [tuple(range(i, i + length)) for i, length in enumerate([3, 5, 3, 3, 20, 3, 3, 5, 1])]
    found = list(batches(inputs))
    assert sorted(tokens for batch in found for tokens in batch) == sorted(inputs)
    assert [[len(tokens) for tokens in batch] for batch in found] == [[20], [5, 5], [3, 3, 3, 3], [3], [1]]


def test_letters_share_one_run(tiny: Path, task_rows: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows = []
    model.register_forward_hook(lambda _, __, kwargs, ___: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    requests = requests_of(task_rows, "mmlu")
    LoadedModel(model, AutoTokenizer.from_pretrained(tiny)).loglikelihood(requests, disable_tqdm=True)
    assert sum(rows) == len(requests) / 4


def test_too_long_inputs_lose_their_beginning(tiny: Path, task_rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer, limit = AutoTokenizer.from_pretrained(tiny), model.config.max_position_embeddings
    (request, *_) = requests_of(task_rows, "boolq")
    request.arguments = (("the old king lost the bread and " * 60).strip(), " found the green river")
    ((total, _),) = LoadedModel(model, tokenizer).loglikelihood([request], disable_tqdm=True)
    text = tokenizer("".join(request.args))["input_ids"]
    start = len(tokenizer(request.args[0])["input_ids"]) - len(text)
    with torch.no_grad():
        scores = model(torch.tensor([text[-(limit + 1) : -1]])).logits[0].double().log_softmax(-1)
    assert total == pytest.approx(sum(scores[i, text[i]].item() for i in range(start, 0)), abs=FLOAT)
    assert "1 of 1 inputs exceed" in caplog.text
