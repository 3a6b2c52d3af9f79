"""Files of texts: rows of every kind, their encodings and line ends; what is wrong with one is one short line."""

import codecs
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from kurtail_pl.errors import TextError
from kurtail_pl.stages.text import read_text

ROWS = ["First row,\nof two lines.", "größer", "", "last"]


def jsonl(rows: list[str]) -> str:
    return "\n".join(json.dumps({"text": row, "other": 1}, ensure_ascii=False) for row in rows) + "\n\n"


def as_json(rows: list[str]) -> str:
    return json.dumps([{"text": row} for row in rows])


@pytest.mark.parametrize(("suffix", "write"), [("jsonl", jsonl), ("json", as_json)])
def test_rows_are_joined_by_blank_lines(tmp_path: Path, suffix: str, write: Callable[[list[str]], str]) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_text(write(ROWS), encoding="utf-8")
    assert read_text(str(path), "evaluation") == "First row,\nof two lines.\n\ngrößer\n\n\n\nlast"


@pytest.mark.parametrize("name", ["text.txt", "text.md", "text"])
def test_other_files_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    content = "Line one\n\n  line two\n"
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_text(str(tmp_path / name), "calibration") == content


def test_raw_rows_are_those_of_the_hugging_face_data_set(tmp_path: Path) -> None:
    # datasets' wikitext: "" for a blank line, else the line with its newline; perplexity joins them by blank lines.
    (tmp_path / "wiki.raw").write_text(" \n = Title = \n \n Some text . \n", encoding="utf-8")
    assert read_text(str(tmp_path / "wiki.raw"), "evaluation") == "\n\n = Title = \n\n\n\n\n Some text . \n"


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"])
def test_jsonl_rows_may_hold_any_character(tmp_path: Path, separator: str) -> None:
    """Only a newline ends a line of JSONL; JSON allows U+2028 and NEL inside a string, and C4 has them."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": f"a{separator}b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_text(str(path), "evaluation") == f"a{separator}b"


@pytest.mark.parametrize("separator", ["\u2028", "\x0b"])
def test_only_newlines_end_a_raw_row(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(f" one{separator}two \n three \n", encoding="utf-8")
    assert read_text(str(path), "evaluation") == f" one{separator}two \n\n\n three \n"


LONG = "\\ud83d" + "x" * 5000
LINES = "in each line"
LIST = "one list of objects"
UNUSABLE = {
    "other-field": (
        "rows.jsonl",
        '{"text": "a"}\n\n{"txt": "b", "id": 3}\n',
        r"line 3 has no field 'text'.*'txt', 'id'",
    ),
    "cut": ("rows.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
    "string": ("rows.jsonl", '"a"\n', f"line 1 holds a string, expected an object; .*{LINES}"),
    "nested": ("rows.jsonl", "[" * 100_000, "line 1 is not JSON"),
    "number": ("rows.ndjson", '{"text": ' + "1" * 5000 + "}", "line 1 is not JSON"),
    "null": ("rows.jsonl", '{"text": "a"}\n{"text": null}\n', "line 2 has null as its 'text'"),
    "list-as-text": ("rows.jsonl", '{"text": ["a"]}\n', "line 1 has a list as its 'text'"),
    "half-character": (
        "rows.jsonl",
        f'{{"text": "a"}}\n{{"text": "{LONG}"}}\n',
        r"line 2 holds \\ud83d, half of a char",
    ),
    "many-fields": (
        "rows.jsonl",
        json.dumps({"f" * 500 + str(i): 1 for i in range(99)}),
        r"line 1 has no field .text. .*, \.\.\.",
    ),
    "object": ("rows.json", '{"text": "a"}', f"holds an object, not a list; expected {LIST}"),
    "numbers": ("rows.json", "[1, 2]", f"row 1 is a number; expected {LIST}"),
    "open": ("rows.json", "[", f"is not JSON .*expected {LIST}"),
    "lines-in-json": (
        "rows.json",
        '{"text": "a"}\n{"text": "b"}\n',
        r"is not JSON .*one object in each line is \.jsonl",
    ),
    "alpaca": (
        "rows.json",
        '[{"instruction": "a", "input": null}]',
        "row 1 has no field 'text'.*'instruction', 'input'",
    ),
    "alpaca-number": ("rows.json", '[{"instruction": 1, "output": "b"}]', "row 1 has a number as its 'instruction'"),
    "table": ("rows.CSV", "text\na\n", r"is a \.csv file, which is not read; convert it .*\.jsonl"),
    "parquet": ("rows.parquet", "PAR1", r"is a \.parquet file"),
    "archive": ("rows.jsonl.gz", "", r"is a \.gz file"),
    "zero": ("a.txt", "ab\ncd\0e", "holds a zero byte in line 2"),
}


@pytest.mark.parametrize(("name", "content", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_wrong_with_a_file_is_one_short_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=rf"{name} {message}") as caught:
        read_text(str(tmp_path / name), "evaluation")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 230


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"Once upon a time\n" * 60_000 + "caf\xe9".encode("latin-1"), r"byte 1020003 \(0xe9, in line 60001\)"),
        ("Once".encode("utf-16"), r"byte 0 \(0xff, in line 1\)"),
        (gzip.compress(b"Once upon a time"), "is compressed by gzip: unpack it"),
    ],
    ids=["latin-1", "utf-16", "gzip"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.raw"])
def test_bytes_that_are_no_utf8_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TextError, match=message) as caught:
        read_text(str(tmp_path / name), "evaluation")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["rows.ndjson", "ROWS.JSONL", "Rows.JsonL"])
def test_rows_by_other_spellings_of_their_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(jsonl(ROWS), encoding="utf-8")
    assert read_text(str(tmp_path / name), "evaluation") == "\n\n".join(ROWS)


@pytest.mark.parametrize(
    ("name", "write"), [("a.txt", "".join), ("a.raw", "".join), ("a.jsonl", jsonl), ("a.json", as_json)]
)
def test_marks_and_line_ends_of_windows_are_no_text(
    tmp_path: Path, name: str, write: Callable[[list[str]], str]
) -> None:
    text = write(ROWS)
    (tmp_path / name).write_bytes(text.encode())
    (tmp_path / f"windows-{name}").write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    plain, windows = (read_text(str(tmp_path / each), "evaluation") for each in (name, f"windows-{name}"))
    assert plain == windows


def test_a_mark_within_a_text_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one \ufeff two", encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt"), "evaluation") == "one \ufeff two"


def test_alpacas_input_may_be_null(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"instruction": "a", "input": null, "output": "b"}]')
    assert read_text(str(tmp_path / "a.json"), "evaluation") == "a\nb"


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"is a folder; name a file"):
        read_text(str(tmp_path), "evaluation")


@pytest.mark.parametrize("source", ["wikitext9", "no/such/file.txt", "x" * 300, "a\0b"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(TextError, match=rf"{re.escape(repr(source))} is no file here.*'pydoc'"):
        read_text(source, "evaluation")


def test_embedded_text_is_split_in_two() -> None:
    calibration, evaluation = read_text("pydoc", "calibration"), read_text("pydoc", "evaluation")
    placed = {name: (topic in calibration, topic in evaluation) for name, topic in topics.items() if len(topic) > 2000}
    assert len(placed) > 20
    # Each long topic is in one part; both parts have their share.
    assert all(a != b for a, b in placed.values())
    share = sum(b for _, b in placed.values()) / len(placed)
    assert 0.1 < share < 0.4
    joints = 2 * (len(topics) - 2)
    assert len(calibration) + len(evaluation) == sum(map(len, topics.values())) + joints
