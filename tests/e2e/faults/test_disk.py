"""A disk that is full, read-only or not ours, and too many open files, at every call that changes a file.

One line says what happened, nothing finished is lost, and the command run again ends as if nothing had been.
KURTAIL_FAULTS=all tries every kind of call and file with each error, KURTAIL_FAULTS=40 forty that are drawn for each
test; without it, a few of them are.
"""

import errno
import os
import random
import re

import pytest
from e2e.faults.forks import BYTES, NAMES, OPENS, REMOVES, Ended, contents, differing
from e2e.faults.scenes import SCENES, Stage

ERRORS = {
    "ENOSPC": OPENS | NAMES | BYTES,
    "EACCES": OPENS | NAMES | REMOVES,
    "EROFS": OPENS | NAMES | REMOVES,
    "EMFILE": OPENS,
}
"""And the calls that can end so."""
UNFINISHED = re.compile(r"(^|/)\.|^cache/work/")
LONG = ("figures", "tasks", "fit", "compare")
FAULTS = os.environ.get("KURTAIL_FAULTS")


@pytest.mark.parametrize(
    ("name", "error"),
    [(name, error) for name in SCENES for error in ERRORS if FAULTS or name not in LONG or error == "ENOSPC"],
)
def test_no_room_no_right_no_files(stage: Stage, name: str, error: str) -> None:
    tried = [(at, once, play(stage, name, error, at, once)) for at, once in faults(stage, name, error)]
    wrong = [f"{error} {'once' if once else 'from'} {at}: {said}" for at, once, said in tried if said]
    assert not wrong, "\n".join(wrong)


def faults(stage: Stage, name: str, error: str) -> list[tuple[int, bool]]:
    """Calls of every kind: which is made to fail, and whether only that one."""
    draw = random.Random(f"{name} {error}")
    calls = [call for call in stage.undisturbed(name).calls if int(call.split()[0]) & ERRORS[error]]
    kinds: dict[str, list[int]] = {}
    for number, call in enumerate(calls, 1):
        kinds.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "#", call), []).append(number)
    chosen = [draw.choice(numbers) for numbers in kinds.values()]
    if FAULTS:
        every = [(at, once) for at in chosen for once in (False, True)]
        return every if FAULTS == "all" else draw.sample(every, min(int(FAULTS), len(every)))
    return [(draw.choice(chosen), once) for once in (False, True)]


def play(stage: Stage, name: str, error: str, at: int, once: bool) -> str:
    """What is wrong with a command in which a call fails, or with the next without; empty when nothing is."""
    scene, expected = SCENES[name], stage.undisturbed(name).contents
    root = stage.set_up(scene)
    before = contents(root)
    end = stage.run(root, scene.arguments, errno=getattr(errno, error), kinds=ERRORS[error], at=at, once=once)
    said = f"{end.where.replace(str(root), '')}: exit code {end.code}: {end.error}\n"
    if not end.hits:
        return f"{said}no call failed"
    if end.code == 0:  # It could do without.
        return said if differing(in_sight(contents(root)), in_sight(expected)) else ""
    if not is_one_line(end, scene.verb):
        return f"{said}that is not one line"
    if lost := damaged(contents(root), before, expected):
        return f"{said}lost or half written: {lost}"
    again = stage.run(root, scene.arguments)
    different = differing(contents(root), expected)
    return f"{said}run again: {again.error}\nother than undisturbed: {different}" if again.code or different else ""


def is_one_line(end: Ended, verb: str) -> bool:
    """Whether the last message is one of ours, short, and the only one."""
    *earlier, last = end.error.strip().splitlines()
    others = re.search(r"Traceback|Exception|Error|kurtail \w+:", "\n".join(earlier))
    return end.code == 1 and last.startswith(f"kurtail {verb}: ") and len(last) <= 300 and not others


def damaged(found: dict[str, object], before: dict[str, object], expected: dict[str, object]) -> list[str]:
    """Files that are gone too early, and files in plain sight that are neither what they were nor what they become."""
    foreign = [name for name, value in in_sight(found).items() if value not in (before.get(name), expected.get(name))]
    kept = {*found, *(re.sub(r"^\.(\w+)\.old/", r"\1/", name) for name in found)}  # It comes back with the next run.
    return foreign + [name for name in before if name not in kept and name in expected]


def in_sight(contents: dict[str, object]) -> dict[str, object]:
    """What is not hidden, and no work in the cache."""
    return {name: value for name, value in contents.items() if not UNFINISHED.search(name)}
