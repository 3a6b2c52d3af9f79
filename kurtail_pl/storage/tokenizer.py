"""A folder's tokenizer, and whether it goes with a model's embedding."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kurtail_pl.errors import CheckpointError, reason
from kurtail_pl.storage.records import read_object

FAST = "tokenizer.json"
FILES = (FAST, "tokenizer.model", "vocab.json", "tokenizer_config.json")
AGAIN = "copy it again from where the model comes from"


def read_tokenizer(folder: Path, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Args:
        folder: that it lies in.
        vocabulary: tokens that the model has embeddings for; those that were added to a tokenizer later may be beyond.

    Raises:
        CheckpointError: when there is none, a file of it is damaged, or it has more tokens than the model.
    """
    if not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(f"{folder} has no tokenizer; add its {FAST} and tokenizer_config.json")
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
