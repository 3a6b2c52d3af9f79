"""Texts by name, from a folder and by way of `datasets`; several texts in equal parts; all windows of a text."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from kurtail_pl.errors import TextError
from kurtail_pl.stages.evaluation.perplexity import perplexity
from kurtail_pl.stages.text import TextSpec, cut_windows, read_text, title_of
from kurtail_pl.stages.text.hub import HUB, HubText
from kurtail_pl.storage.checkpoint import Checkpoint
from kurtail_pl.storage.files import sha256_of_text

SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "data" / "text"
ALPACA = [
    {"instruction": "Say it.", "input": "", "output": "It.", "text": "Say it. It."},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Sing.", "output": "La.\nLa."},
    {"instruction": "Last.", "input": "", "output": "Yes."},
]


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def as_jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """A folder of texts, as a user would lay it out."""
    folder = tmp_path / "texts"
    write(folder / "wikitext2" / "wiki.train.raw", " a b \n \n c \n")
    write(folder / "wikitext2" / "wiki.valid.raw", " v \n")
    write(folder / "wikitext2" / "wiki.test.raw", " t \n")
    write(folder / "c4" / "c4-train.00000.jsonl", as_jsonl(["c1", "c2"]))
    write(folder / "c4" / "c4-validation.00000.jsonl", as_jsonl(["c3"]))
    write(folder / "ptb" / "notes.md", "no text")
    write(folder / "ptb" / "ptb.train.txt", "p1\np2\n")
    write(folder / "alpaca" / "rows.json", json.dumps(ALPACA))
    monkeypatch.setenv("KURTAIL_TEXT", str(folder))
    return folder


@pytest.mark.parametrize(
    ("source", "split", "text"),
    [
        ("wikitext", "calibration", " a b \n\n\n\n\n c \n"),
        ("wikitext", "evaluation", " t \n"),
        ("c4", "calibration", "c1\n\nc2"),
        ("c4", "evaluation", "c3"),
        ("ptb", "calibration", "p1\np2\n"),
        # Files that name no split: every fourth row is for evaluation.
        ("alpaca", "calibration", "Say it. It.\n\nAdd.\n1 and 2\n3\n\nSing.\nLa.\nLa."),
        ("alpaca", "evaluation", "Last.\nYes."),
    ],
)
def test_names_are_read_from_the_folder(texts: Path, source: str, split: Any, text: str) -> None:
    assert read_text(source, split) == text


def test_a_split_that_the_folder_lacks_is_named(texts: Path) -> None:
    with pytest.raises(TextError, match=r"ptb has no file for evaluation: none of ptb.train.txt has 'test' or 'valid'"):
        read_text("ptb", "evaluation")


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        (
            "c4",
            {"c4-a/train.txt": "a", "c4-b/train.txt": "b"},
            r"'c4' could be any of .*c4-a, .*c4-b; name one of them c4",
        ),
        ("c4", {"c4/train.txt": "a", "c4/train.jsonl": ""}, r"several formats: train.jsonl, train.txt; keep"),
        ("c4", {"c4/latest-train.txt": "a"}, r"latest-train.txt names both splits"),
        ("c4", {"c4/train.csv": "a"}, r"c4 has no text: no file ends in .txt"),
    ],
)
def test_no_choice_among_files_is_silent(
    name: str, files: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, content in files.items():
        write(tmp_path / file, content)
    monkeypatch.setenv("KURTAIL_TEXT", str(tmp_path))
    with pytest.raises(TextError, match=message):
        read_text(name, "calibration")


def test_the_folder_of_just_that_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "c4" / "TRAIN.TXT", "this")
    write(tmp_path / "c4-other" / "train.txt", "other")
    monkeypatch.setenv("KURTAIL_TEXT", str(tmp_path))
    assert read_text("c4", "calibration") == "this"


def test_a_folder_that_does_not_exist_is_refused(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KURTAIL_TEXT", str(texts / "nowhere"))
    with pytest.raises(TextError, match=r"KURTAIL_TEXT is '.*nowhere', which is no folder"):
        read_text("c4", "calibration")


@pytest.mark.parametrize("row", [{"instruction": "a"}, {"instruction": 1, "output": "b"}, {"output": "b"}])
def test_rows_that_are_not_alpacas_raise(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(TextError, match=r"rows.jsonl line 1 .*expected an object with a field 'text', or Alpaca's"):
        read_text(str(write(tmp_path / "rows.jsonl", as_jsonl([row]))), "evaluation")


# --- by way of Hugging Face datasets


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> HubText:
    """A data set as it lies on the hub, on this disk: two splits of JSON lines, the text in a column of its own."""
    write(tmp_path / "repository" / "en" / "train-0.json", as_jsonl([{"sentence": f"row {i}"} for i in range(5)]))
    write(tmp_path / "repository" / "en" / "test-0.json", as_jsonl([{"sentence": "größer\nzwei"}]))
    monkeypatch.delenv("KURTAIL_TEXT", raising=False)
    text = HubText(
        str(tmp_path / "repository"),
        {"calibration": "train", "evaluation": "test"},
        files={"train": "en/train-*.json", "test": "en/test-*.json"},
        column="sentence",
        rows={"calibration": 3},
    )
    monkeypatch.setitem(HUB, "c4", text)
    return text


def test_datasets_rows_are_joined_and_kept(repository: HubText, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_text("c4", "calibration") == "row 0\n\nrow 1\n\nrow 2"
    assert read_text("c4", "evaluation") == "größer\nzwei"
    assert sorted(path.name for path in (cache / "text").iterdir()) == ["c4-test.jsonl", "c4-train.jsonl"]
    # Read once, the data set is no longer needed.
    monkeypatch.setitem(HUB, "c4", replace(repository, path="/nowhere"))
    assert read_text("c4", "calibration") == "row 0\n\nrow 1\n\nrow 2"


def test_a_data_set_of_one_split_is_divided(repository: HubText, monkeypatch: pytest.MonkeyPatch) -> None:
    one = replace(repository, splits={"calibration": "train", "evaluation": "train"}, rows={})
    monkeypatch.setitem(HUB, "c4", one)
    assert read_text("c4", "calibration") == "row 0\n\nrow 1\n\nrow 2\n\nrow 4"
    assert read_text("c4", "evaluation") == "row 3"


def test_what_datasets_does_not_find_is_one_error(repository: HubText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HUB, "c4", replace(repository, path=f"{repository.path}/nowhere"))
    with pytest.raises(TextError, match=r"'c4' cannot be had .*set KURTAIL_TEXT to a folder with a folder c4"):
        read_text("c4", "calibration")


def test_a_missing_package_is_named(repository: HubText, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match=r"pip install 'kurtail-pl\[eval\]'"):
        read_text("c4", "calibration")


def test_without_the_hub_the_folder_is_named(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "KURTAIL_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    environment |= {"KURTAIL_TEXT": "", "PYTHONPATH": str(Path(__file__).resolve().parents[4])}
    program = "from kurtail_pl.stages.text import read_text\nread_text('ptb', 'evaluation')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("kurtail_pl.errors.TextError: text 'ptb' cannot be had from the Hugging Face hub")
    assert last.endswith("set KURTAIL_TEXT to a folder with a folder ptb, or name a file")
    assert list(tmp_path.rglob("*.jsonl")) == []


# --- several texts


@pytest.fixture
def model(tiny: Path) -> Checkpoint:
    return Checkpoint(tiny)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three texts of different lengths."""
    return [write(tmp_path / f"{n}.txt", " ".join(sentences(n, seed=n))) for n in (40, 60, 80)]


Windows = Callable[[Path, int], list[list[int]]]


@pytest.fixture
def windows_of(tiny: Path) -> Windows:
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def windows_of(path: Path, seqlen: int) -> list[list[int]]:
        ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        return [ids[i : i + seqlen] for i in range(0, len(ids) - seqlen + 1, seqlen)]

    return windows_of


def test_texts_in_equal_parts(model: Checkpoint, three: list[Path], windows_of: Windows) -> None:
    """Eleven of three: 4, 4 and 3; and the hash is that of all their text."""
    source = "+".join(map(str, three))
    cut = cut_windows(model, TextSpec(source, 11, 16), "evaluation")
    first, second, third = (windows_of(path, 16) for path in three)
    assert cut.tokens.tolist() == [*first[:4], *second[:4], *third[:3]]
    assert cut.text_sha256 == sha256_of_text("\n\n".join(path.read_text() for path in three))


def test_paths_may_hold_the_sign_that_joins_texts(
    model: Checkpoint, three: list[Path], windows_of: Windows, tmp_path: Path
) -> None:
    inside = write(tmp_path / "c++" / "a+b.txt", three[0].read_text())
    for source, files in ((f"{inside}+{three[1]}", (inside, three[1])), (f"{three[1]}+{inside}", (three[1], inside))):
        cut = cut_windows(model, TextSpec(source, 2, 16), "evaluation")
        assert cut.tokens.tolist() == [windows_of(file, 16)[0] for file in files]
        assert title_of(source) == "+".join(file.name for file in files)


def test_a_source_that_can_be_read_in_two_ways_is_refused(
    model: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "a+b"):
        write(tmp_path / name, "some words")
    with pytest.raises(TextError, match=r"'a\+b' can be read as \['a', 'b'\] or as \['a\+b'\]; rename a file"):
        cut_windows(model, TextSpec("a+b", 1, 2), "evaluation")


def test_a_text_named_twice_is_refused(model: Checkpoint, three: list[Path]) -> None:
    with pytest.raises(TextError, match=r"40.txt' is named twice in .*; name each text once"):
        cut_windows(model, TextSpec(f"{three[0]}+{three[1]}+{three[0]}", 3, 16), "evaluation")


def test_texts_in_equal_parts_are_drawn_by_the_seed(model: Checkpoint, three: list[Path], windows_of: Windows) -> None:
    spec = TextSpec("+".join(map(str, three)), 12, 16)
    drawn, again, other = (cut_windows(model, spec, "calibration", seed=s).tokens.tolist() for s in (1, 1, 2))
    assert drawn == again != other
    for part, path in enumerate(three):
        own = drawn[4 * part : 4 * part + 4]
        assert all(window in windows_of(path, 16) for window in own)
        assert len({tuple(window) for window in own}) == 4


def test_all_windows(model: Checkpoint, three: list[Path], windows_of: Windows) -> None:
    """One text: every window. Several: as many of each as the shortest has."""
    cut = cut_windows(model, TextSpec(str(three[2]), None, 16), "evaluation")
    assert cut.tokens.tolist() == windows_of(three[2], 16)
    assert cut.spec.windows == len(windows_of(three[2], 16))
    cut = cut_windows(model, TextSpec("+".join(map(str, three)), None, 16), "evaluation")
    shortest = len(windows_of(three[0], 16))
    assert cut.tokens.tolist() == [window for path in three for window in windows_of(path, 16)[:shortest]]


def test_combined_is_all_four(texts: Path, model: Checkpoint) -> None:
    cut = cut_windows(model, TextSpec("combined", 4, 2), "calibration")
    parts = [cut_windows(model, TextSpec(name, 1, 2), "calibration") for name in ("wikitext", "c4", "ptb", "alpaca")]
    assert cut.tokens.tolist() == [part.tokens[0].tolist() for part in parts]


def test_a_part_that_is_too_short_is_named(model: Checkpoint, three: list[Path]) -> None:
    with pytest.raises(TextError, match=r"40.txt' \(evaluation\) has \d+ tokens, \d+ windows of 16, and 100 were"):
        cut_windows(model, TextSpec(f"{three[0]}+{three[1]}", 200, 16), "evaluation")


def test_no_window_at_all_is_refused(model: Checkpoint, tmp_path: Path) -> None:
    short = write(tmp_path / "short.txt", " ".join(sentences(5, seed=0)))
    with pytest.raises(TextError, match="0 windows of 256, and 1 were asked for"):
        cut_windows(model, TextSpec(str(short), None, 256), "evaluation")


@pytest.mark.parametrize("source", ["wikitext", "c4", "alpaca", "wikitext+c4"])
@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_the_shared_texts(source: str, split: Any, model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real WikiText-2, C4 and Alpaca, where they are beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("no shared texts beside the checkout")
    monkeypatch.setenv("KURTAIL_TEXT", str(SHARED))
    assert cut_windows(model, TextSpec(source, 6, 128), split, seed=0).tokens.shape == (6, 128)


@torch.no_grad()
@pytest.mark.parametrize("names", [["c4"], ["ptb", "alpaca"]])
def test_perplexity_on_whole_texts_by_name(
    names: list[str], tiny: Path, model: Checkpoint, windows_of: Windows, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Against transformers' own loss on slices of the tokens, as many of each text as the shortest has."""
    files = [write(tmp_path / name / "test.txt", " ".join(sentences(20 + 9 * len(name), 3))) for name in names]
    monkeypatch.setenv("KURTAIL_TEXT", str(tmp_path))
    measured = perplexity(Checkpoint(tiny), TextSpec("+".join(names), None, 24))
    own = [windows_of(file, 24) for file in files]
    windows = [window for windows in own for window in windows[: min(map(len, own))]]
    assert (measured["windows"], measured["seqlen"], measured["tokens"]) == (len(windows), 24, 23 * len(windows))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    losses = [model(ids, labels=ids).loss.double().item() for ids in torch.tensor(windows).unsqueeze(1)]
    assert measured["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert measured["source"] == "+".join(names)


def test_titles_hold_no_folders(three: list[Path]) -> None:
    assert title_of("wikitext") == "wikitext"
    assert title_of("combined") == "wikitext+c4+ptb+alpaca"
    assert title_of(f"{three[0]}+{three[1]}+c4") == "40.txt+60.txt+c4"
