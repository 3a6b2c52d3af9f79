"""Run `kurtail` in forked children of one server, with faults on the way; what a folder holds but for what it cost."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pages import PageReader
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
OPENS, NAMES, REMOVES, BYTES = 1, 2, 4, 8
"""What a call does (preload.c)."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: `calls` changed files, `hits` of them failed, first at `where`."""

    code: int
    calls: int
    hits: int
    where: str
    out: str
    error: str


class Server:
    """The process of server.py."""

    def __init__(self, process: subprocess.Popen[str], messages: Path) -> None:
        self._process, self._messages = process, messages
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer, f"the server ended: {self._process.wait()}"
        return answer

    def run(self, *commands: dict[str, Any]) -> list[Ended]:
        """Run commands at once (server.py says what a command has) and wait for all."""
        files = [[self._messages / f"{name}{number}" for name in ("out", "error")] for number in range(len(commands))]
        asked = [
            {**command, "folder": str(command["folder"]), "out": str(out), "error": str(error)}
            for command, (out, error) in zip(commands, files, strict=True)
        ]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked, default=str) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._answer())
        texts = [[file.read_text(errors="replace") for file in pair] for pair in files]
        return [Ended(**end, out=out, error=error) for end, (out, error) in zip(found, texts, strict=True)]


@contextmanager
def server(place: Path) -> Iterator[Server]:
    """Compile preload.c, start the server; skips where that cannot be done."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("faults are made by a library for Linux, which a C compiler has to be there for")
    library = place / "preload.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-D_LARGEFILE64_SOURCE", "-o", library, HERE / "preload.c", "-ldl"],
        check=True,
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "export"))),
        "PYTHONUNBUFFERED": "1",
    }
    with (place / "server").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Server(process, place)
        finally:
            process.kill()
            process.communicate()


UNEQUAL = re.compile(r"(^|/)tensorboard/|\.ckpt$|(^|/)cost\.json$|(^|/)config\.resume-\d+\.yaml$")
"""Files that say when they were written or what they cost."""


def contents(root: Path) -> dict[str, Any]:
    """What every file of a folder holds, but for what it cost and where it was; nor the hashes of files that say so."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {name: _content(path, root) for path in files if not UNEQUAL.search(name := str(path.relative_to(root)))}


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Names of files that only one has, or that hold different things."""
    return [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]


def _content(path: Path, root: Path) -> Any:
    if path.suffix == ".json":
        text = path.read_text().replace(f"{root}/", "")
        try:
            return _without_cost(json.loads(text))
        except json.JSONDecodeError:  # Half written, which unfinished work may be.
            return text
    if path.name == "rotations.safetensors":
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())}
            return _without_cost(json.loads(file.metadata()["rotations"])), hashlib.sha256(
                repr(tensors).encode()
            ).hexdigest()
    if path.suffix == ".md":
        return table_without_cost(path.read_text())
    if path.suffix == ".html":
        page = PageReader(path.read_text().replace(f"{root}/", ""))
        tables = {title: list(map(_columns_without_cost, found)) for title, found in page.tables.items()}
        return page.titles, page.sections, {title: found for title, found in tables.items() if title != "Cost"}
    return hashlib.sha256(path.read_bytes()).hexdigest()


HASHES = ("rotations_sha256", "fused_sha256", "rotations.safetensors", "card_sha256")
"""Of files that say what they cost."""


def _without_cost(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_cost(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_cost(part) for key, part in value.items() if not _is_cost(key)}


def _is_cost(key: str) -> bool:
    return key in ("cost", "threads") or key in HASHES or key.endswith(("seconds", "peak_bytes"))


COSTLY = ("seconds", "peak memory", "learn CPU s", "all s", "all CPU s")


def _columns_without_cost(lines: list[list[str]]) -> list[list[str]]:
    head = [name.strip() for name in lines[0]]
    return [[cell for name, cell in zip(head, line, strict=True) if name not in COSTLY] for line in lines]


def table_without_cost(text: str) -> list[list[str]]:
    """Cells of a Markdown page's lines, but for the columns that say what was spent, however wide they are."""
    lines = [[cell.strip(" -:") for cell in line.split("|")] for line in text.splitlines()]
    head: list[str] = []
    found = []
    for line in lines:
        head = line if len(line) != len(head) else head
        found.append([cell for name, cell in zip(head, line, strict=True) if name not in COSTLY])
    return found
