"""Log-likelihoods: by hand from transformers' logits, and the harness's own model; whatever the batches."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW, tiny_family
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kurtail_pl
from kurtail_pl.errors import NotFinite, TextError
from kurtail_pl.stages.evaluation.tasks import model as model_module
from kurtail_pl.stages.evaluation.tasks.harness import parts_of
from kurtail_pl.stages.evaluation.tasks.model import LoadedModel, batches
from kurtail_pl.stages.evaluation.tasks.spec import TaskSpec

FLOAT = 1e-3
"""Ten tokens of logits about ten, each rounded some hundred times to 24 bits, 6e-8. Another token has another 0.1."""
QUANTIZED = 0.5
"""Of the answers, at least: in one text of ten a value lies on the border of two codes, and other batches round it
otherwise."""
NAMES = ("boolq", "hellaswag", "winogrande", "mmlu")


@pytest.fixture(scope="module", params=["tiny", "artefact"])
def loaded(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Any, float]:
    """A model, its tokenizer, and the least share of log-likelihoods that must agree."""
    folder: Path = request.getfixturevalue(request.param)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if request.param == "artefact":
        return kurtail_pl.load(folder), tokenizer, QUANTIZED
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer, 1.0


Answers = list[tuple[float, bool]]
"""Log-likelihoods, and whether each answer is what greedy decoding writes."""


def share_of_equal(found: Answers, expected: Answers) -> float:
    both = list(zip(found, expected, strict=True))
    return sum(abs(f[0] - e[0]) < FLOAT and f[1] == e[1] for f, e in both) / len(both)


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
    model, tokenizer, least = loaded
    requests = requests_of(task_rows, name)
    answers = LoadedModel(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert share_of_equal(answers, [by_hand(model, tokenizer, *request.args) for request in requests]) >= least
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
    assert share_of_equal(answers, theirs) >= least


def test_a_beginning_that_is_shared_across_longropes_border_is_not_kept(tied: Path) -> None:
    """What begins inputs of both sides, of 40 tokens where the border is 32 or 50: longer inputs turn it otherwise."""
    tokenizer, draw = AutoTokenizer.from_pretrained(tied), torch.Generator().manual_seed(0)
    shared = torch.randint(2, 300, (40,), generator=draw).tolist()
    for border in (32, 42, 50, 200):
        model = tiny_family("phi3", original_max_position_embeddings=border)
        model.config.rope_parameters["original_max_position_embeddings"] = border
        requests = [(None, shared + [3 + n] * n, [7, 8]) for n in range(1, 6)]
        answers = LoadedModel(model, tokenizer)._loglikelihood_tokens(requests)
        for (_, context, answer), (total, _) in zip(requests, answers, strict=True):
            logits = model(torch.tensor([context + answer[:-1]])).logits[0, -2:].double().log_softmax(-1)
            assert total == pytest.approx((logits[0, 7] + logits[1, 8]).item(), abs=FLOAT)


def test_answers_of_no_likelihood_and_answers_too_long(tiny: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    with pytest.raises(TextError, match="an answer has 257 tokens and the model has 256 positions"):
        LoadedModel(model, tokenizer)._loglikelihood_tokens([(None, [5], [6] * 257)])
    model.lm_head.weight.data[7] = float("inf")
    with pytest.raises(NotFinite, match="log-likelihood of an answer is nan"):
        LoadedModel(model, tokenizer)._loglikelihood_tokens([(None, [5, 6], [7])])


@pytest.mark.parametrize("tokens", [1, 200, 100_000])
def test_batches_do_not_change_the_numbers(
    loaded: tuple[PreTrainedModel, Any, float], task_rows: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, least = loaded
    requests = requests_of(task_rows, "hellaswag")
    usual = LoadedModel(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(model_module, "BATCH_TOKENS", tokens)
    assert share_of_equal(LoadedModel(model, tokenizer).loglikelihood(requests, disable_tqdm=True), usual) >= least


def test_batches_hold_every_input_once_and_one_length_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "BATCH_TOKENS", 12)
    inputs = [tuple(range(i, i + length)) for i, length in enumerate([3, 5, 3, 3, 20, 3, 3, 5, 1])]
    found = list(batches(inputs))
    assert sorted(tokens for batch in found for tokens in batch) == sorted(inputs)
    assert [[len(tokens) for tokens in batch] for batch in found] == [[20], [5, 5], [3, 3, 3, 3], [3], [1]]


def test_letters_share_one_run(tiny: Path, task_rows: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows: list[int] = []
    model.register_forward_hook(lambda _, __, kwargs, ___: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    requests = requests_of(task_rows, "mmlu")[:4]
    LoadedModel(model, AutoTokenizer.from_pretrained(tiny)).loglikelihood(requests, disable_tqdm=True)
    assert rows == [1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shared_beginning_is_run_once(name: str, tiny: Path, task_rows: Path) -> None:
    """In every family: sliding windows shorter than the beginning, experts, layers without RoPE."""
    model, tokenizer = tiny_family(name), AutoTokenizer.from_pretrained(tiny)
    sizes: list[int] = []
    hook = model.register_forward_hook(
        lambda _, __, kwargs, ___: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    (part, *_) = (p for p in parts_of("mmlu", TaskSpec(folder=str(task_rows), mmlu_shots=0)) if p.rows == 8)
    requests = part.requests()
    answers = LoadedModel(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    hook.remove()
    whole = [tokenizer(context + answer)["input_ids"][:-1] for context, answer in (r.args for r in requests[::4])]
    beginning = len(os.path.commonprefix(whole))  # noqa: RUF071 (any sequences)
    assert beginning > WINDOW
    assert sizes[0] == beginning
    assert sum(sizes) == beginning + sum(len(tokens) - beginning for tokens in whole)
    expected = [by_hand(model, tokenizer, *request.args)[0] for request in requests]
    assert [total for total, _ in answers] == pytest.approx(expected, abs=FLOAT)


def test_too_long_inputs_lose_their_beginning(tiny: Path, task_rows: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokenizer, limit = AutoTokenizer.from_pretrained(tiny), model.config.max_position_embeddings
    (request, *_) = requests_of(task_rows, "boolq")
    request.arguments = (("the old king lost the bread and " * 60).strip(), " found the green river")
    lm = LoadedModel(model, tokenizer)
    ((total, _),) = lm.loglikelihood([request], disable_tqdm=True)
    text = tokenizer("".join(request.args))["input_ids"]
    start = len(tokenizer(request.args[0])["input_ids"]) - len(text)
    with torch.no_grad():
        scores = model(torch.tensor([text[-(limit + 1) : -1]])).logits[0].double().log_softmax(-1)
    assert total == pytest.approx(sum(scores[i, text[i]].item() for i in range(start, 0)), abs=FLOAT)
    assert lm.cut == 1
