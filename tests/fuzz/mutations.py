"""Files that were valid once: JSON with edits, bytes with damage, and what was never a file of that kind."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

Path = tuple[str | int, ...]

SCALARS: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, 7, 10**6, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400,
    0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"), float("-inf"),
    "", "0", "1", "float32", "cpu", "null", "a\nb", "\x00", "\ud800", "é", "x" * 5000, "..", ".", "a/b", "/etc/passwd",
    "../../etc/passwd", "model.safetensors", "file:///etc/passwd", "os.system", "{{ 1/0 }}", "%s%n",
]  # fmt: skip
"""Values that a field is seldom meant to have."""


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def values() -> SearchStrategy[Any]:
    """Any value that JSON can say, the odd ones first."""
    leaves = st.one_of(st.sampled_from(SCALARS), st.integers(), st.floats(), st.text(max_size=8))
    small = st.one_of(
        st.lists(leaves, max_size=4), st.dictionaries(st.text(max_size=4), leaves, max_size=3), st.just(nested(90))
    )
    return st.one_of(leaves, leaves, small)


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """The path of every value in a JSON value, itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def edit(value: Any, path: Path, action: str, new: Any) -> Any:
    """A JSON value after one edit in place; a path that an earlier edit removed changes nothing."""
    if not path:
        return new if action == "replace" else value
    parent = value
    for key in path[:-1]:
        try:
            parent = parent[key]
        except (KeyError, IndexError, TypeError):
            return value
    key = path[-1]
    if not (isinstance(parent, dict) and key in parent) and not (
        isinstance(parent, list) and isinstance(key, int) and key < len(parent)
    ):
        return value
    if action == "drop":
        del parent[key]
    elif action == "wrap":
        parent[key] = [parent[key]]
    elif action == "name":
        parent[key] = str(parent[key])
    elif action == "extra":
        if isinstance(parent, dict):
            parent[new if isinstance(new, str) else "extra"] = copy.deepcopy(parent[key])
        else:
            parent.insert(0, new)
    else:
        parent[key] = new
    return value


@st.composite
def edited(draw: st.DrawFn, valid: Any) -> Any:
    """A JSON value with one to three edits: fields dropped, replaced, retyped, added."""
    value = copy.deepcopy(valid)
    paths = list(places(valid))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        action = draw(st.sampled_from(["replace", "replace", "replace", "drop", "wrap", "name", "extra"]))
        value = edit(value, draw(st.sampled_from(paths)), action, draw(values()))
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


WRITTEN = [b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", b"\x00" * 4, b"\n", b'"', b"\xc3"]
"""What damage writes over bytes."""


@st.composite
def damaged(draw: st.DrawFn, valid: bytes, within: int | None = None) -> bytes:
    """Bytes cut short, with bits flipped, or with some overwritten, in their first part if it is given."""
    data = bytearray(valid)
    end = min(len(data), within or len(data))
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        place = draw(st.integers(0, max(end - 1, 0)))
        action = draw(st.sampled_from(["cut", "flip", "flip", "write", "write", "insert", "remove"]))
        if action == "cut":
            del data[place:]
        elif action == "flip" and place < len(data):
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif action == "write":
            new = draw(
                st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", b"\x00" * 4, b"\n", b'"', b"\xc3"])
            )
            data[place : place + len(new)] = new
        elif action == "insert":
            data[place:place] = draw(st.binary(max_size=9))
        elif action == "remove":
            del data[place : place + draw(st.integers(1, 9))]
    return bytes(data)


FOREIGN = [
    b"", b"{", b"[]", b"null", b"1", b'""', b"{}", b"[{}]", b"[" * 100_000, b'{"a":' * 50_000, b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00", b"\x00" * 64, b"9" * 5000, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
]  # fmt: skip


def foreign() -> SearchStrategy[bytes]:
    """What is no such file at all."""
    return st.one_of(st.sampled_from(FOREIGN), st.binary(max_size=200))


def json_files(valid: Any) -> SearchStrategy[bytes]:
    """A JSON file that was valid: mostly other fields, sometimes damage or something else."""
    changed = edited(valid).map(as_json)
    return st.one_of(changed, changed, changed, changed, damaged(as_json(valid)), foreign())


@st.composite
def _framed(draw: st.DrawFn, valid: bytes) -> bytes:
    """A safetensors file whose header has edits, and whose length may lie."""
    size = int.from_bytes(valid[:8], "little")
    header = as_json(draw(edited(json.loads(valid[8 : 8 + size]))))
    length = draw(st.sampled_from([len(header)] * 5 + [0, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + valid[8 + size :]


def tensor_files(valid: bytes) -> SearchStrategy[bytes]:
    """A safetensors file that was valid."""
    size = int.from_bytes(valid[:8], "little")
    return st.one_of(_framed(valid), _framed(valid), damaged(valid, within=8 + size), foreign())
