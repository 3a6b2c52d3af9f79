"""Texts by their names on the Hugging Face hub, kept as JSONL in the cache folder once they were read."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from kurtail_pl.errors import TextError, reason
from kurtail_pl.storage.files import cache_folder, write_text
from kurtail_pl.storage.lock import alone_with

log = logging.getLogger(__name__)

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class HubText:
    """Where a data set lies on the hub.

    Args:
        path: its repository.
        splits: the split that is for calibration and the one that is for evaluation.
        name: its configuration.
        files: the files of each split, where the repository's own choice is not wanted.
        revision: a branch of the repository.
        column: the column that holds the text.
        rows: how many rows are read; None reads the whole split.
    """

    path: str
    splits: dict[Split, str]
    name: str | None = None
    files: dict[str, str] | None = None
    revision: str | None = None
    column: str = "text"
    rows: dict[Split, int | None] = field(default_factory=dict)


HUB = {
    "wikitext": HubText(
        "Salesforce/wikitext", {"calibration": "train", "evaluation": "test"}, name="wikitext-2-raw-v1"
    ),
    # The first shard of each split, as GPTQ's code takes it; its evaluation reads 1100 documents. 8192 documents have
    # about four million tokens, twice what 1024 windows of 2048 need.
    "c4": HubText(
        "allenai/c4",
        {"calibration": "train", "evaluation": "validation"},
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        rows={"calibration": 8192, "evaluation": 1100},
    ),
    # The repository itself holds a program; its conversion to Parquet lies on a branch.
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        {"calibration": "train", "evaluation": "test"},
        files={"train": "penn_treebank/train/*.parquet", "test": "penn_treebank/test/*.parquet"},
        revision="refs/convert/parquet",
        column="sentence",
    ),
    # It has one split; `sources` keeps every fourth row for evaluation.
    "alpaca": HubText("tatsu-lab/alpaca", {"calibration": "train", "evaluation": "train"}),
}
"""Usual identifiers, configurations and splits of the field."""


def from_hub(name: str, split: Split) -> Path:
    """A JSONL file with the rows of one split, downloaded when it is not in the cache folder yet.

    Raises:
        TextError: when the package `datasets` is missing, or the hub does not give the data set.
    """
    text = HUB[name]
    file = cache_folder() / "text" / f"{name}-{text.splits[split]}.jsonl"
    with alone_with(file):
        if not file.is_file():
            _download(name, split, file)
    return file


def _download(name: str, split: Split, file: Path) -> None:
    text = HUB[name]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(
            f"text {name!r} comes from the Hugging Face hub through the package datasets, which is not installed; "
            "run: pip install 'kurtail-pl[eval]'"
        ) from error
    log.info("reading %s of %s from the Hugging Face hub", text.splits[split], text.path)
    try:
        # Streaming reads no more of C4 than is asked for.
        rows = load_dataset(
            text.path, text.name, data_files=text.files, revision=text.revision, split=text.splits[split],
            streaming=True,
        )  # fmt: skip
        lines = [json.dumps({"text": row[text.column]}) for row in islice(rows, text.rows.get(split))]
    except Exception as error:  # Its own kinds, the hub client's, those of HTTP and of every file format.
        raise TextError(
            f"text {name!r} cannot be had from the Hugging Face hub ({text.path}: {reason(error)}); "
            f"set KURTAIL_TEXT to a folder with a folder {name}, or name a file"
        ) from error
    write_text(file, "\n".join(lines) + "\n")
