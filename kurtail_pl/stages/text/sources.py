"""From the name of a text to the text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from kurtail_pl.errors import TextError, first_of
from kurtail_pl.stages.text.files import SUFFIXES, rows_of, suffix_of
from kurtail_pl.stages.text.hub import HUB, Split, from_hub

EMBEDDED = "pydoc"
COMBINED = "combined"
FOLDER = "KURTAIL_TEXT"
"""Environment variable: a folder with one folder for each text by name, used before the hub."""
SPLIT_WORDS: dict[Split, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "valid")}
"""What the name of a file in such a folder says about its split; the first word that any file has decides."""


def parts_of(source: str) -> list[str]:
    """The texts that a source is made of, in equal parts: one, all named ones (``combined``), or those joined by +.

    Raises:
        TextError: when a text is named twice, or files are there for two ways to read the source.
    """
    parts, *others = islice(_readings(source), 2)
    if others:
        raise TextError(f"text {source!r} can be read as {parts} or as {others[0]}; rename a file")
    twice = next((part for part in parts if parts.count(part) > 1), None)
    if twice is not None:
        raise TextError(f"text {twice!r} is named twice in {source!r}; name each text once")
    return parts


def _readings(source: str) -> Iterator[list[str]]:
    """Every way to see names and files in a source, whose paths may hold a + too; all pieces where there is none."""
    if source == COMBINED:
        yield list(HUB)
        return
    found = _joined_pieces(source.split("+"))
    first = next(found, None)
    yield source.split("+") if first is None else first
    yield from found


def _joined_pieces(pieces: list[str]) -> Iterator[list[str]]:
    """Every way to put the + back between pieces so that all become names or files."""
    if not pieces:
        yield []
    for end in range(1, len(pieces) + 1):
        part = "+".join(pieces[:end])
        if part in (EMBEDDED, *HUB) or os.path.isfile(os.path.expanduser(part)):
            yield from ([part, *rest] for rest in _joined_pieces(pieces[end:]))


def title_of(source: str) -> str:
    """A source for tables: its names, and its files without their folders."""
    return "+".join(Path(part).name for part in next(_readings(source)))


def read_text(source: str, split: Split) -> str:
    """The whole text of a source, its rows joined by blank lines.

    Args:
        source: one of the texts of `TextSpec`.
        split: which part of a text by name; a file is taken whole.

    Raises:
        TextError: when there is no such text, or its rows have no text.
    """
    if source == EMBEDDED:
        rows = _share(_pydoc_topics(), split)
    elif source in HUB:
        rows = _named(source, split)
    else:
        path = os.path.expanduser(source)
        if not os.path.isfile(path):
            what = "is a folder" if os.path.isdir(path) else "is no file here"
            raise TextError(
                f"text {source!r} {what}; name a file ({', '.join(SUFFIXES)}), one of "
                f"{', '.join(map(repr, [EMBEDDED, *HUB, COMBINED]))}, or several joined by +"
            )
        rows = rows_of(Path(path))
    return "\n\n".join(rows)


def _pydoc_topics() -> list[str]:
    """Python's own reference."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _share(rows: list[str], split: Split) -> list[str]:
    """Of a text without splits, every fourth row is for evaluation and the others for calibration."""
    return rows[3::4] if split == "evaluation" else [row for index, row in enumerate(rows) if index % 4 != 3]


def _named(name: str, split: Split) -> list[str]:
    """Rows of a text by name: from the folder that `KURTAIL_TEXT` names, when it has it, else from the hub."""
    folder = _folder(name)
    if folder is None:
        rows = rows_of(from_hub(name, split))
        return _share(rows, split) if len(set(HUB[name].splits.values())) == 1 else rows
    files = sorted(file for file in folder.iterdir() if suffix_of(file) in SUFFIXES)
    if not files:
        raise TextError(f"{folder} has no text: no file ends in {', '.join(SUFFIXES)}; put one there")
    chosen = {part: _with_word(files, words) for part, words in SPLIT_WORDS.items()}
    if not any(chosen.values()):
        return _share(_joined(files), split)
    if not chosen[split]:
        raise TextError(
            f"{folder} has no file for {split}: none of {_listed(files)} has "
            f"{' or '.join(map(repr, SPLIT_WORDS[split]))} in its name"
        )
    both = [file for file in chosen["calibration"] if file in chosen["evaluation"]]
    if both:
        raise TextError(f"{both[0]} names both splits: it is for calibration and for evaluation; rename it")
    return _joined(chosen[split])


def _joined(files: list[Path]) -> list[str]:
    """Rows of the files of one text, one after another; the same text in two formats would be read twice."""
    if len({suffix_of(file) for file in files}) > 1:
        raise TextError(f"{files[0].parent} holds files of several formats: {_listed(files)}; keep those of one")
    return [row for file in files for row in rows_of(file)]


def _listed(files: list[Path]) -> str:
    """Names of the first files."""
    return first_of([file.name for file in files], 4)


def _with_word(files: list[Path], words: tuple[str, ...]) -> list[Path]:
    """The files whose names hold the first of the words that any name holds."""
    return next((found for word in words if (found := [file for file in files if word in file.name.lower()])), [])


def _folder(name: str) -> Path | None:
    """The folder of a text by name, such as ``wikitext`` or ``wikitext2``, under `KURTAIL_TEXT`; None without one."""
    root = os.environ.get(FOLDER)
    if not root:
        return None
    if not Path(root).expanduser().is_dir():
        raise TextError(f"{FOLDER} is {root!r}, which is no folder; name one that holds folders such as {name}")
    found = sorted(path for path in Path(root).expanduser().glob(f"{name}*") if path.is_dir())
    if len(found) > 1 and found[0].name != name:
        raise TextError(f"text {name!r} could be any of {', '.join(map(str, found))}; name one of them {name}")
    return found[0] if found else None
