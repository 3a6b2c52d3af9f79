"""Windows of a text against slices of the tokenizer's own output."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from kurtail_pl.errors import ConfigError, TextError
from kurtail_pl.stages.text import TextSpec, cut_windows, said
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of_text


def tokens(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def test_windows_are_slices_of_the_tokens(tiny: Path, text_file: Path) -> None:
    ids = tokens(tiny, text_file.read_text(encoding="utf-8"))
    spec = TextSpec(str(text_file), windows=5, seqlen=33)
    windows = cut_windows(Checkpoint(tiny), spec, "evaluation")
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens.tolist() == [ids[i * 33 : (i + 1) * 33] for i in range(5)]
    assert windows.text_sha256 == sha256_of_text(text_file.read_text(encoding="utf-8"))


def test_no_special_tokens(stories: Path, text_file: Path) -> None:
    windows = cut_windows(Checkpoint(stories), TextSpec(str(text_file), windows=1, seqlen=16), "evaluation")
    assert windows.tokens[0].tolist() == tokens(stories, text_file.read_text(encoding="utf-8"))[:16]
    assert AutoTokenizer.from_pretrained(stories).bos_token_id not in windows.tokens


def test_bos_begins_each_window(stories: Path, text_file: Path) -> None:
    ids, bos = (
        tokens(stories, text_file.read_text(encoding="utf-8")),
        AutoTokenizer.from_pretrained(stories).bos_token_id,
    )
    spec = TextSpec(str(text_file), windows=3, seqlen=16, bos=True)
    windows = cut_windows(Checkpoint(stories), spec, "evaluation")
    assert windows.tokens.tolist() == [[bos, *ids[i * 15 : (i + 1) * 15]] for i in range(3)]
    assert said(asdict(windows.spec)) == "3 windows of 16 tokens, the first of each BOS"


def test_a_seed_draws_a_permutation_of_the_same_windows(tiny: Path, text_file: Path) -> None:
    ids = tokens(tiny, text_file.read_text(encoding="utf-8"))
    count = len(ids) // 40
    whole = TextSpec(str(text_file), windows=count, seqlen=40)
    first, again, other = (
        cut_windows(Checkpoint(tiny), whole, "calibration", seed=s).tokens.tolist() for s in (1, 1, 2)
    )
    in_order = [ids[i * 40 : (i + 1) * 40] for i in range(count)]
    assert first == again
    assert first not in (other, in_order)
    assert sorted(first) == sorted(other) == sorted(in_order)
    # Fewer windows of the same seed are the first of them.
    some = cut_windows(Checkpoint(tiny), TextSpec(str(text_file), windows=7, seqlen=40), "calibration", seed=1)
    assert some.tokens.tolist() == first[:7]


def test_exactly_enough_text_and_one_window_too_few(tiny: Path, text_file: Path) -> None:
    total = len(tokens(tiny, text_file.read_text(encoding="utf-8")))
    count = total // 64
    assert len(cut_windows(Checkpoint(tiny), TextSpec(str(text_file), count, 64), "evaluation").tokens) == count
    with pytest.raises(TextError) as error:
        cut_windows(Checkpoint(tiny), TextSpec(str(text_file), count + 1, 64), "evaluation")
    for part in (f"{total} tokens", f"{count} windows of 64", f"{count + 1} were asked for", str(text_file)):
        assert part in str(error.value)


def test_an_empty_text_is_too_short(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TextError, match="has 0 tokens"):
        cut_windows(Checkpoint(tiny), TextSpec(str(tmp_path / "empty.txt"), 1, 2), "evaluation")


@pytest.mark.parametrize(("windows", "seqlen", "field"), [(0, 8, "windows is 0"), (1, 1, "seqlen is 1")])
def test_unusable_sizes(windows: int, seqlen: int, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        TextSpec("pydoc", windows, seqlen)
