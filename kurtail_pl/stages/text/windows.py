"""Windows of tokens, cut from a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kurtail_pl.errors import ConfigError, TextError
from kurtail_pl.stages.text.hub import Split
from kurtail_pl.stages.text.sources import EMBEDDED, parts_of, read_text
from kurtail_pl.storage.files import sha256_of_text
from kurtail_pl.surgery.positions import require_positions


@dataclass(frozen=True)
class TextSpec:
    """Some text, cut into windows of tokens.

    Args:
        source: ``pydoc`` (the language reference that comes with Python, split in two), ``wikitext``, ``c4``, ``ptb``
            or ``alpaca`` (from the folder that `KURTAIL_TEXT` names, else from the Hugging Face hub), or a file: plain
            text, WikiText's ``.raw``, JSONL or JSON with a field `text` or Alpaca's fields. Several, joined by ``+``,
            give equal numbers of windows; ``combined`` is ``wikitext+c4+ptb+alpaca``. Null is, in a recipe, the text
            that activations are captured from, and ``pydoc`` elsewhere.
        windows: how many windows; null takes all that the text has.
        seqlen: tokens in a window.
        bos: begin each window with the model's BOS token, which counts among its tokens. Gemma needs it.
    """

    source: str | None = None
    windows: int | None = 16
    seqlen: int = 1024
    bos: bool = False

    def __post_init__(self) -> None:
        if self.windows is not None and self.windows < 1:
            raise ConfigError(f"windows is {self.windows}; give a positive number, or null for all of them")
        if self.seqlen < 2:
            raise ConfigError(f"seqlen is {self.seqlen}; a window needs at least 2 tokens")

    @property
    def name(self) -> str:
        """The source that is read."""
        return self.source or EMBEDDED


@dataclass(frozen=True)
class Windows:
    """Windows of tokens and the hash of the text they come from."""

    spec: TextSpec
    """As asked for, with the number of windows there are."""
    tokens: Tensor
    """``[windows, seqlen]`` int64."""
    text_sha256: str


class Reader(Protocol):
    """Whatever reads windows: a model's folder, or an export's."""

    @property
    def positions(self) -> int:
        """The longest text that it takes, in tokens."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""


def cut_windows(model: Reader, spec: TextSpec, split: Split, seed: int | None = None) -> Windows:
    """Tokenise each text of a source once, without special tokens, and take non-overlapping windows.

    Where the windows begin with BOS, each has as many tokens of the text less.

    Of k texts each gives the k-th part of the windows, in their order; where k does not divide their number, the first
    ones give one more. All windows of several texts are as many of each as the shortest has.

    Args:
        model: what will read the windows.
        spec: source, number and length of the windows.
        split: which part of a text by name.
        seed: windows of each text drawn without replacement by this seed; None takes the first ones (the perplexity
            protocol).

    Raises:
        ConfigError: when the windows are longer than the model's positions, or there is no BOS that is asked for.
        TextError: when a text has fewer windows than asked for.
    """
    require_positions(spec.seqlen, model.positions)
    tokenizer, parts = model.tokenizer(), parts_of(spec.name)
    head = _head(tokenizer, spec)
    length = spec.seqlen - len(head)
    texts = [read_text(part, split) for part in parts]
    tokens = [_tokens(tokenizer, text) for text in texts]
    available = [len(ids) // length for ids in tokens]
    counts = [max(1, min(available))] * len(parts)
    if spec.windows is not None:
        each, rest = divmod(spec.windows, len(parts))
        counts = [each + (index < rest) for index in range(len(parts))]
    chosen = []
    for part, ids, there, count in zip(parts, tokens, available, counts, strict=True):
        if there < count:
            raise TextError(
                f"text {part!r} ({split}) has {len(ids)} tokens, {there} windows of {length}, and {count} were "
                "asked for; ask for fewer or shorter windows, or give a longer text"
            )
        windows = ids[: there * length].view(there, length)
        if seed is not None:
            windows = windows[torch.randperm(there, generator=torch.Generator().manual_seed(seed))]
        chosen.append(windows[:count])
    return Windows(
        replace(spec, source=spec.name, windows=sum(counts)),
        torch.cat([head.expand(sum(counts), -1), torch.cat(chosen)], 1),
        sha256_of_text("\n\n".join(texts)),
    )


def said(found: Mapping[str, Any]) -> str:
    """Number and length of the windows that results were measured on, and their BOS, in words."""
    return (
        f"{found['windows']} windows of {found['seqlen']} tokens{', the first of each BOS' if found.get('bos') else ''}"
    )


def _head(tokenizer: PreTrainedTokenizerBase, spec: TextSpec) -> Tensor:
    """What each window begins with: BOS, or nothing."""
    if not spec.bos:
        return torch.empty(0, dtype=torch.long)
    if tokenizer.bos_token_id is None:
        raise ConfigError("bos is true and the model's tokenizer has no BOS token; write bos: false")
    return torch.tensor([tokenizer.bos_token_id])


@lru_cache(maxsize=4)
def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Numbers of a text's tokens, ``[tokens]`` int64; several stages of a run cut windows from the same text."""
    # verbose=False: a text longer than the model's context is what we want to cut.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
