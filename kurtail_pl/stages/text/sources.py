"""From the name of a text to the text."""

from __future__ import annotations

import os
from pathlib import Path

from kurtail_pl.errors import TextError
from kurtail_pl.stages.text.files import SUFFIXES, rows_of
from kurtail_pl.stages.text.hub import HUB, Split, from_hub

EMBEDDED = "pydoc"
COMBINED = "combined"
FOLDER = "KURTAIL_TEXT"
"""Environment variable: a folder with one folder for each text by name, used before the hub."""
SPLIT_WORDS: dict[Split, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "valid")}
"""What the name of a file in such a folder says about its split; the first word that any file has decides."""


def parts_of(source: str) -> list[str]:
    """The texts that a source is made of, in equal parts: one, all named ones (``combined``), or those joined by +."""
    if source == COMBINED:
        return list(HUB)
    return [source] if Path(source).expanduser().is_file() else source.split("+")


def title_of(source: str) -> str:
    """A source for tables: its names, and its files without their folders."""
    return "+".join(Path(part).name for part in parts_of(source))


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
        path = Path(source).expanduser()
        if not path.is_file():
            raise TextError(
                f"text {source!r} is no file here; name a file ({', '.join(SUFFIXES)}), one of "
                f"{', '.join(map(repr, [EMBEDDED, *HUB, COMBINED]))}, or several joined by +"
            )
        rows = rows_of(path)
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
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    chosen = {part: _with_word(files, words) for part, words in SPLIT_WORDS.items()}
    if not any(chosen.values()):
        return _share([row for file in files for row in rows_of(file)], split)
    if not chosen[split]:
        raise TextError(
            f"{folder} has no file for {split}: none of {', '.join(file.name for file in files)} has "
            f"{' or '.join(map(repr, SPLIT_WORDS[split]))} in its name"
        )
    return [row for file in chosen[split] for row in rows_of(file)]


def _with_word(files: list[Path], words: tuple[str, ...]) -> list[Path]:
    """The files whose names hold the first of the words that any name holds."""
    return next((found for word in words if (found := [file for file in files if word in file.name])), [])


def _folder(name: str) -> Path | None:
    """The folder of a text by name, such as ``wikitext`` or ``wikitext2``, under `KURTAIL_TEXT`; None without one."""
    root = os.environ.get(FOLDER)
    if not root:
        return None
    if not Path(root).expanduser().is_dir():
        raise TextError(f"{FOLDER} is {root!r}, which is no folder; name one that holds folders such as {name}")
    found = sorted(path for path in Path(root).expanduser().glob(f"{name}*") if path.is_dir())
    return found[0] if found else None
