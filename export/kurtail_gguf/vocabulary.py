"""A tokenizer in a GGUF file: tokens, their types, merges or scores, and by what rule llama.cpp splits a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from kurtail_pl.artefact.source import Source
from kurtail_pl.errors import ConfigError, shortened
from kurtail_pl.storage.model_config import read_generation_config

ENDING = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    rf"{SHORT_FORMS}|\p{{N}}{{1,3}}{ENDING}": "llama-bpe",
    rf"{SHORT_FORMS}|\p{{N}}{ENDING}": "qwen2",
    TEKKEN: "tekken",
}
"""Expressions by which texts are split before bytes are merged, and llama.cpp's names for them."""
ELSE = "give the artefact a tokenizer.json as GPT-2, SmolLM, Llama, Qwen2 or Mistral have it"
SPACE = "\u2581"


def vocabulary(source: Source) -> dict[str, Any]:
    """Keys of a file that hold an artefact's tokenizer.

    Raises:
        ConfigError: when llama.cpp has no tokenizer that does the same.
    """
    tokenizer: Any = source.checkpoint.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"the tokenizer is a slow {type(tokenizer).__name__}, not a tokenizer.json; {ELSE}")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"the tokenizer's model is {model['type']}, and llama.cpp's of these families BPE; {ELSE}")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if any(kind == "ByteLevel" for kind in _kinds(rules["pre_tokenizer"], "pretokenizers")):
        joined = [" ".join(merge) for merge in merges]
        kind: dict[str, Any] = {"model": "gpt2", "pre": _splitting(rules), "merges": joined}
    else:
        kind = {"model": "llama", "add_space_prefix": _space_first(rules)} | _sentence_piece(model, merges, source)
    pieces = kind["model"] == "llama"
    keys = kind | _tokens(rules, pieces, source.config.vocab_size) | _special(tokenizer, source)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | _template(tokenizer)


def _kinds(step: Mapping[str, Any] | None, inner: str) -> list[str]:
    """Types of a step of the tokenizer, or of all in a sequence."""
    return [each["type"] for each in _steps(step, inner)]


def _steps(step: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [dict(step)]


def _splitting(rules: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits a text.

    Raises:
        ConfigError: when it is none that is known here.
    """
    steps = _steps(rules["pre_tokenizer"], "pretokenizers")
    *before, last = steps
    plain = last["type"] == "ByteLevel" and not last.get("add_prefix_space", False)
    found = None
    if plain and last.get("use_regex", True):
        digits = [step["type"] == "Digits" and step["individual_digits"] for step in before]
        found = {(): "gpt-2", (True,): "smollm"}.get(tuple(digits))
    elif plain and len(before) == 1 and before[0]["type"] == "Split" and before[0]["behavior"] == "Isolated":
        found = None if before[0]["invert"] else SPLITS.get(before[0]["pattern"].get("Regex", ""))
    # What NFC changes llama.cpp leaves as it is, in Qwen's own files too.
    others = [kind for kind in _kinds(rules["normalizer"], "normalizers") if kind != "NFC"]
    if found is None or others:
        shown = shortened(json.dumps(rules["pre_tokenizer"] if found is None else rules["normalizer"]), 120)
        raise ConfigError(f"the tokenizer prepares a text by {shown}, which llama.cpp has no name for here; {ELSE}")
    return found


def _space_first(rules: Mapping[str, Any]) -> bool:
    """Whether a tokenizer of SentencePiece's kind puts a space before a text.

    Raises:
        ConfigError: when it prepares texts in another way.
    """
    steps = _steps(rules["normalizer"], "normalizers")
    before = _steps(rules["pre_tokenizer"], "pretokenizers")
    spaces = [step for step in steps if step["type"] == "Replace" and step["pattern"] == {"String": " "}]
    prefixes = [step for step in steps if step == {"type": "Prepend", "prepend": SPACE}]
    meta = [step for step in before if step["type"] == "Metaspace" and step["replacement"] == SPACE]
    if len(spaces) + len(prefixes) != len(steps) or len(meta) != len(before) or len(spaces) + len(meta) != 1:
        shown = shortened(json.dumps([*steps, *before]), 120)
        raise ConfigError(f"the tokenizer prepares a text by {shown}, which llama.cpp's SentencePiece does not; {ELSE}")
    return bool(prefixes) or any(step["prepend_scheme"] != "never" for step in meta)


def _sentence_piece(model: Mapping[str, Any], merges: Sequence[tuple[str, ...]], source: Source) -> dict[str, Any]:
    """Scores by which llama.cpp merges as a list of merges says: what is made first has the highest.

    Raises:
        ConfigError: when no scores of tokens say the same as the merges.
    """
    first: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        made = left + right
        if made in first and made != last:
            shown = shortened(repr(made), 40)
            raise ConfigError(f"the tokenizer makes {shown} at several ranks, and GGUF has one; {ELSE}")
        first.setdefault(made, rank)
        last = made
    scores = [0.0] * source.config.vocab_size
    for token, number in model["vocab"].items():
        scores[number] = -float(first.get(token, len(merges)))
    return {"scores": scores}


def _tokens(rules: Mapping[str, Any], pieces: bool, size: int) -> dict[str, Any]:
    """Tokens and their types, with a place for each row of the embedding.

    Args:
        rules: content of ``tokenizer.json``.
        pieces: whether they are SentencePiece's, some of which stand for a byte, and one for what has none.
        size: rows of the embedding.
    """
    tokens, types = [f"[PAD{number}]" for number in range(size)], [int(TokenType.UNUSED)] * size
    for token, number in rules["model"]["vocab"].items():
        tokens[number], types[number] = token, int(TokenType.NORMAL)
        if pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = int(TokenType.BYTE)
    for added in rules["added_tokens"]:
        number, special = added["id"], added["special"]
        if number < size:
            tokens[number] = added["content"]
            types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
            if pieces and added["content"] == rules["model"]["unk_token"]:
                types[number] = int(TokenType.UNKNOWN)
    return {"tokens": tokens, "token_type": types}


def _special(tokenizer: PreTrainedTokenizerBase, source: Source) -> dict[str, Any]:
    """Special tokens, and which of them stand around every text."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found: dict[str, Any] = {}
    for ours, theirs in names.items():
        number = getattr(tokenizer, f"{ours}_token_id", None)
        if number is not None and number < source.config.vocab_size:
            found[f"{theirs}_token_id"] = number
    generation = read_generation_config(source.checkpoint.folder)
    ends = getattr(generation, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    others = [each for each in ends if each not in (None, found.get("eos_token_id"))]
    if others:
        found["eot_token_id"] = int(others[0])
    around: Any = tokenizer("a")["input_ids"]
    bare: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = found.get("bos_token_id"), found.get("eos_token_id")
    starts, ended = around[: -len(bare)] == [bos], around[len(bare) :] == [eos] and around[0] == bare[0]
    if around != [*([bos] if starts else []), *bare, *([eos] if ended else [])]:
        raise ConfigError(
            f"the tokenizer puts the tokens {around} for a text of {bare}, and GGUF has BOS and EOS alone; {ELSE}"
        )
    return found | {"add_bos_token": starts, "add_eos_token": ended}


def _template(tokenizer: Any) -> dict[str, Any]:
    """The chat template; of several, the default one."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else {}
