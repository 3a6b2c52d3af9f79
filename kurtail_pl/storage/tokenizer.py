"""A folder's tokenizer, and whether it goes with a model's embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kurtail_pl.errors import CheckpointError, reason
from kurtail_pl.storage.files import sha256_of
from kurtail_pl.storage.records import read_object

FAST = "tokenizer.json"
FILES = (FAST, "tokenizer.model", "vocab.json", "tokenizer_config.json")
READ = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "config.json")
"""How the names of files begin that decide what a tokenizer does."""
TEMPLATES = "additional_chat_templates"
"""Folder of more such files."""
AGAIN = "copy it again from where the model comes from"


@dataclass(frozen=True)
class _Place:
    """A folder with a tokenizer, equal to every other with the same files."""

    files: tuple[tuple[str, str], ...]
    """Names and hashes."""
    folder: Path = field(compare=False)


def read_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; one object for all folders with the same files, which nobody may change.

    Args:
        folder: that it lies in.
        vocabulary: tokens that the model has embeddings for; those that were added to a tokenizer later may be beyond.

    Raises:
        CheckpointError: when there is none, a file of it is damaged, or it has more tokens than the model.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(f"{folder} has no tokenizer; add its {FAST} and tokenizer_config.json")
    try:
        own = [path for path in folder.iterdir() if path.name.startswith(READ)]
        files = sorted(path for path in (*own, *folder.glob(f"{TEMPLATES}/*")) if path.is_file())
        place = _Place(tuple((path.name, sha256_of(path)) for path in files), folder)
    except OSError as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be read ({reason(error)}); {AGAIN}") from error
    return _read(place, vocabulary)


@lru_cache(maxsize=4)
def _read(place: _Place, vocabulary: int) -> PreTrainedTokenizerBase:
    # Reading takes half a second and more, and a run asks a dozen times.
    folder = place.folder
    for name in (FAST, "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            read_object(folder / name, CheckpointError, AGAIN)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a", add_special_tokens=False)  # Some values are looked at no sooner.
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Of Rust's and Python's tokenizers, all kinds; a panic of Rust's is no Exception.
        raise CheckpointError(f"the tokenizer in {folder} cannot be used ({reason(error)}); {AGAIN}") from error
    if tokenizer.vocab_size > vocabulary:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens, more than the vocab_size {vocabulary} of "
            "its config.json; give the tokenizer of this model"
        )
    # Its vocabulary is written with a place for each number up to the highest, and texts would have tokens beyond.
    added = tokenizer.get_added_vocab()
    highest = max((number for token, number in tokenizer.get_vocab().items() if token not in added), default=0)
    if highest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer in {folder} numbers a token {highest}, and the vocab_size in its config.json is "
            f"{vocabulary}; {AGAIN}"
        )
    return tokenizer
