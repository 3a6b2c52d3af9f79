"""Tokenizers of every kind that llama.cpp has for these families: it makes the same tokens of the same texts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import sentences
from gguf import GGUFReader
from kurtail_gguf.exporter import GGUF
from kurtail_gguf.vocabulary import SPLITS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kurtail_pl.errors import ConfigError
from kurtail_pl.stages.export import export

MakeArtefact = Callable[..., Path]
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TEXTS = [*sentences(200, seed=1), "didn't they'd 1984 12345.67 def f(x):\n    return x\n\n\n  # End", "Straße, Москва"]


def trained(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """Byte-level BPE that splits texts by some steps."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    return core


def sentence_piece(prefix: bool) -> Tokenizer:
    """BPE of letters, with tokens for bytes, as SentencePiece's are converted."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["\u2581", *"abcdefghijklmnopqrst"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("a", "n"), ("e", "r")]
    tokens = ["<unk>", "<s>", "</s>", *pieces, *letters, *(left + right for left, right in merges)]
    core = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    first = [normalizers.Prepend("\u2581")] if prefix else []
    core.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def fast(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def split_by(name: str) -> pre_tokenizers.PreTokenizer:
    (expression,) = (expression for expression, known in SPLITS.items() if known == name)
    return pre_tokenizers.Split(Regex(expression), "isolated")


KNOWN: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: trained(PLAIN),
    "smollm": lambda: trained(pre_tokenizers.Digits(individual_digits=True), PLAIN),
    "llama-bpe": lambda: trained(split_by("llama-bpe"), BYTES),
    "qwen2": lambda: trained(split_by("qwen2"), BYTES),
    "tekken": lambda: trained(split_by("tekken"), BYTES),
    "sentencepiece": lambda: sentence_piece(prefix=True),
    "sentencepiece without a space": lambda: sentence_piece(prefix=False),
}


@pytest.mark.parametrize("name", KNOWN)
def test_llama_cpp_makes_the_same_tokens(name: str, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    artefact = make_artefact("mistral", tokenizer=fast(KNOWN[name]()))
    folder = export(artefact, tmp_path / "gguf", GGUF(), check=True)
    assert json.loads((folder / "checks.json").read_text())["llama.cpp"]["equal_texts"] == 4
    described = json.loads((folder / "kurtail_export.json").read_text())["pre_tokenizer"]
    assert described == name.removesuffix(" without a space")


def test_special_tokens_and_template(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    tokenizer = fast(sentence_piece(prefix=True))
    tokenizer.chat_template = "{{ messages[0].content }}"
    folder = export(make_artefact("mistral", tokenizer=tokenizer), tmp_path / "gguf", GGUF(), check=False)
    fields = GGUFReader(folder / "model.gguf").fields
    found = {key: fields[f"tokenizer.{key}"].contents() for key in ("ggml.tokens", "ggml.token_type", "chat_template")}
    assert found["chat_template"] == "{{ messages[0].content }}"
    assert found["ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    # Unknown, control, control, a byte; a letter; a row of the embedding that no token has.
    types = found["ggml.token_type"]
    assert [*types[:4], types[259], types[299]] == [2, 3, 3, 6, 1, 5]
    special = {
        key: fields[f"tokenizer.ggml.{key}"].contents() for key in ("bos_token_id", "eos_token_id", "add_bos_token")
    }
    assert special == {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True}


def test_a_second_end_of_text(make_artefact: MakeArtefact, tmp_path: Path) -> None:
    """As chat models have it in their generation settings."""
    artefact = make_artefact("mistral", changes={"eos_token_id": [0, 7]})
    folder = export(artefact, tmp_path / "gguf", GGUF(), check=False)
    fields = GGUFReader(folder / "model.gguf").fields
    assert [fields[f"tokenizer.ggml.{end}_token_id"].contents() for end in ("eos", "eot")] == [0, 7]


REFUSED: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "an unknown split": (lambda: trained(pre_tokenizers.Whitespace(), PLAIN), r"prepares a text by .*Whitespace"),
    "another expression": (
        lambda: trained(pre_tokenizers.Split(Regex(r"\s+"), "isolated"), BYTES),
        r"prepares a text by .*Split.*no name for",
    ),
    "words": (
        lambda: Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a")),
        "the tokenizer's model is WordLevel",
    ),
    "other tokens around a text": (
        lambda: _framed(sentence_piece(prefix=True)),
        r"puts the tokens \[1, 4, .*GGUF has BOS and EOS alone",
    ),
    "several ranks": (lambda: _several_ranks(), "makes 'abc' at several ranks"),
    "lower case": (lambda: _lower(trained(PLAIN)), "prepares a text by .*Lowercase"),
}


def _framed(core: Tokenizer) -> Tokenizer:
    core.post_processor = processors.TemplateProcessing(
        single="<s> <0x01> $A", special_tokens=[("<s>", 1), ("<0x01>", 4)]
    )
    return core


def _several_ranks() -> Tokenizer:
    """What is made first depends on the letters that it is made of."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *"abcd", "ab", "bc", "cd", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("c", "d"), ("a", "bc")]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    return core


def _lower(core: Tokenizer) -> Tokenizer:
    core.normalizer = normalizers.Lowercase()
    return core


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_in_words(name: str, make_artefact: MakeArtefact, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    artefact = make_artefact("mistral", tokenizer=fast(make()))
    with pytest.raises(ConfigError, match=message):
        export(artefact, tmp_path / "gguf", GGUF())
    assert not (tmp_path / "gguf").exists()
