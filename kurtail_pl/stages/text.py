"""Text for calibration and evaluation, and its windows of tokens."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kurtail_pl.errors import ConfigError, TextError
from kurtail_pl.storage.files import sha256_of_text

Split = Literal["calibration", "evaluation"]
EMBEDDED = "pydoc"


@dataclass(frozen=True)
class TextSpec:
    """Some text, cut into windows of tokens.

    Args:
        source: ``pydoc`` (the language reference that comes with Python, split in two) or a file: plain text,
            WikiText's ``.raw``, JSONL or JSON with a field `text`.
        windows: how many windows.
        seqlen: tokens in a window.
    """

    source: str = EMBEDDED
    windows: int = 16
    seqlen: int = 1024

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ConfigError(f"windows is {self.windows}; give a positive number")
        if self.seqlen < 2:
            raise ConfigError(f"seqlen is {self.seqlen}; a window needs at least 2 tokens")


@dataclass(frozen=True)
class Windows:
    """Windows of tokens and the hash of the text they come from."""

    spec: TextSpec
    tokens: Tensor
    """``[windows, seqlen]`` int64."""
    text_sha256: str


def read_text(source: str, split: Split) -> str:
    """The whole text of a source, its rows joined by blank lines.

    Args:
        source: as in `TextSpec`.
        split: which part of the embedded text; a file is taken whole.

    Raises:
        TextError: when the source is no file and not the embedded text, or its rows have no text.
    """
    if source == EMBEDDED:
        return "\n\n".join(_pydoc_topics(split))
    path = Path(source).expanduser()
    if not path.is_file():
        raise TextError(f"text {source!r} is no file here; name a file (.txt, .raw, .jsonl, .json) or {EMBEDDED!r}")
    try:
        content = path.read_text(encoding="utf-8")
        # Lines end at a newline alone: str.splitlines would also cut at Unicode's separators within a row.
        lines = io.StringIO(content)
        if path.suffix == ".jsonl":
            rows = [_text_of(json.loads(line)) for line in lines if line.strip()]
        elif path.suffix == ".json":
            rows = [_text_of(row) for row in json.loads(content)]
        elif path.suffix == ".raw":
            # The rows of the Hugging Face data set: an empty string for a blank line, else the line with its newline.
            rows = [line if line.strip() else "" for line in lines]
        else:
            rows = [content]
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(f"{path} is not made of rows with a field 'text' in UTF-8 ({error!r}); convert it") from error
    return "\n\n".join(rows)


def _text_of(row: dict[str, str]) -> str:
    if not isinstance(row["text"], str):
        raise TypeError(f"text is {row['text']!r}")
    return row["text"]


def _pydoc_topics(split: Split) -> list[str]:
    """Python's own reference: every fourth topic is for evaluation, the others for calibration."""
    from pydoc_data.topics import topics

    ordered = [topics[name] for name in sorted(topics)]
    if split == "evaluation":
        return ordered[3::4]
    return [topic for index, topic in enumerate(ordered) if index % 4 != 3]


def cut_windows(tokenizer: PreTrainedTokenizerBase, spec: TextSpec, split: Split, seed: int | None = None) -> Windows:
    """Tokenise a text once, without special tokens, and take non-overlapping windows.

    Args:
        tokenizer: of the model.
        spec: source, number and length of the windows.
        split: which part of the embedded text.
        seed: windows drawn without replacement by this seed; None takes the first ones (the perplexity protocol).

    Raises:
        TextError: when the text has fewer windows than asked for.
    """
    text = read_text(spec.source, split)
    # verbose=False: a text longer than the model's context is what we want to cut.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    available = len(ids) // spec.seqlen
    if available < spec.windows:
        raise TextError(
            f"text {spec.source!r} ({split}) has {len(ids)} tokens, {available} windows of {spec.seqlen}, and "
            f"{spec.windows} were asked for; ask for fewer or shorter windows, or give a longer text"
        )
    windows = ids[: available * spec.seqlen].view(available, spec.seqlen)
    if seed is not None:
        windows = windows[torch.randperm(available, generator=torch.Generator().manual_seed(seed))]
    return Windows(spec, windows[: spec.windows].clone(), sha256_of_text(text))
