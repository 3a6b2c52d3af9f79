"""`--check`: the file's numbers, and llama.cpp's tokens and probabilities where it is installed."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kurtail_gguf.families import family_of
from kurtail_gguf.verify.file import AGAIN, Written, compare
from kurtail_gguf.verify.mirror import float_model, round_inputs
from kurtail_gguf.verify.runtime import Likeliest, Runtime, import_runtime
from kurtail_gguf.write import MODEL
from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import CheckFailed
from kurtail_pl.stages.export import small_enough

log = logging.getLogger(__name__)

TEXTS = (
    "Once upon a time, there was a little girl who didn't like the sea.",
    "In 1984 the 3 cats weighed 12345.67 kg; that's 100% true (so they'd say)!",
    "def halve(x):\n    # Two lines,\n\treturn [x / 2 for _ in range(10)]\n\n\nprint(halve(3))  # and spaces",
    "Stra\u00dfe, na\u00efve caf\u00e9, \u041c\u043e\u0441\u043a\u0432\u0430, \u6771\u4eac, \U0001f600!",
)
"""What tokenizers split in different ways: short forms, digits, spaces, lines, letters of other alphabets."""
TOKENS, LIKELIEST = 64, 64
NOISE = 2.0
"""How much of int8's own noise llama.cpp may be away from torch's mirror of it.

Both round the same numbers to int8. Where they add in another order some fall on the other side; were it all of them,
the two would be as far apart as any two roundings, each of which is one noise away from the float model: sqrt(2).
"""


def check(source: Source, folder: Path) -> dict[str, Any]:
    """Check an export.

    Args:
        source: the artefact.
        folder: of the export, finished.

    Returns:
        What is proven, for ``checks.json``.

    Raises:
        CheckFailed: when a tensor is not the artefact's, or llama.cpp reads or computes something else.
    """
    written = Written(folder / MODEL, source, family_of(source))
    checks: dict[str, Any] = {"gguf": version("gguf"), **compare(source, written), "llama.cpp": None}
    package = import_runtime()
    if package is None:
        log.info("xllamacpp is not installed, so llama.cpp was not run; pip install 'kurtail-pl[gguf]'")
    # The mirror needs all of the model in memory.
    elif small_enough(folder):
        checks["llama.cpp"] = _run(source, written, folder / MODEL, package)
    return checks


def _run(source: Source, written: Written, path: Path, package: ModuleType) -> dict[str, Any]:
    """Tokens of some texts, and the likeliest behind each token of one, by both runtimes."""
    runtime, tokenizer = Runtime(package, path), source.checkpoint.tokenizer()
    for text in TEXTS:
        expected, told = list(tokenizer(text)["input_ids"]), runtime.tokens(text)
        if told != expected:
            raise CheckFailed(
                f"llama.cpp makes the tokens {told[:8]} of {text[:20]!r} and the artefact's tokenizer {expected[:8]}; "
                "the file's tokenizer.ggml keys do not say what tokenizer.json does: report it with that"
            )
    ids = list(tokenizer(TEXTS[0])["input_ids"])[: min(TOKENS, source.checkpoint.positions)]
    said = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    count = min(LIKELIEST, source.config.vocab_size)
    found = [runtime.likeliest(ids[: place + 1], count, said) for place in range(len(ids))]
    agreement = _compare(source, written, ids, found)
    return {"xllamacpp": package.__version__, "equal_texts": len(TEXTS), **agreement}


def _compare(source: Source, written: Written, ids: list[int], found: list[Likeliest]) -> dict[str, Any]:
    """How far llama.cpp's logarithms of probabilities are from torch's, which round to int8, and these from float."""
    model = float_model(source, written)
    floats = _logarithms(model, ids)
    round_inputs(model, source, written)
    mirrored = _logarithms(model, ids)
    likeliest = torch.stack([torch.from_numpy(each.tokens) for each in found])
    theirs = torch.stack([torch.from_numpy(each.logarithms) for each in found])
    error = _rms(theirs - mirrored.gather(1, likeliest))
    noise = _rms((mirrored - floats).gather(1, likeliest))
    # Not a number is no agreement.
    if not error <= NOISE * noise:
        raise CheckFailed(
            f"llama.cpp's logarithms of probabilities are {error:.3g} from torch's in int8, which are {noise:.3g} from "
            f"those in float; at most {NOISE:g} times that was expected; {AGAIN}"
        )
    return {
        "tokens": len(ids),
        "equal_tokens": int((likeliest[:, 0] == mirrored.argmax(1)).sum()),
        "error": error,
        "int8_noise": noise,
        "tolerance": NOISE * noise,
    }


@torch.no_grad()
def _logarithms(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """Of all tokens' probabilities behind each token of a text, ``[tokens, vocabulary]`` float64."""
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits.double().log_softmax(-1)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
