"""Commands killed at random calls, run again under another path and with another number of threads.

KURTAIL_KILLS is how many points each is killed at; two without it.
"""

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from e2e.faults.forks import contents, differing, table_without_cost
from e2e.faults.scenes import SCENES, Scene, Stage

POINTS = int(os.environ.get("KURTAIL_KILLS", "2"))
LATEST = 20_000
"""Microseconds after a call; memory-mapped files are written between calls."""


@pytest.mark.parametrize("name", [name for name in SCENES if name != "report"])
def test_killed_and_run_again_elsewhere(stage: Stage, name: str) -> None:
    scene, alone = SCENES[name], stage.undisturbed(name)
    for number in range(POINTS):
        draw = random.Random(f"{name} {number}")
        at, delay = draw.randint(1, len(alone.calls)), draw.choice((0, draw.randint(1, LATEST)))
        root = stage.set_up(scene, "try")
        killed = stage.run(root, scene.arguments, at=at, delay=delay)
        said = f"killed {delay} us after call {at} of {len(alone.calls)}: {killed.where}\n{killed.error}"
        assert killed.code in (-signal.SIGKILL, 0), said
        moved = stage.move(root, f"moved{number}")
        again = stage.run(moved, elsewhere(scene, moved, draw), threads=2)
        assert again.code == 0 or is_finished(again.error), f"{said}\nagain: {again.error}"
        assert differing(contents(moved), alone.contents) == [], said
        if again.code == 0:
            assert table_without_cost(again.out.replace(f"{moved}/", "")) == table_without_cost(alone.out), said


def elsewhere(scene: Scene, root: Path, draw: random.Random) -> Sequence[str]:
    """The command, by paths from the folder or from the root."""
    if "recipe.yaml" in scene.reads or draw.random() < 0.5:
        return scene.arguments
    names = {path.name for path in root.iterdir()} | {"out"}
    return [str(root / part) if part in names else part for part in scene.arguments]


def is_finished(error: str) -> bool:
    """Whether a command says that all was finished before."""
    return "exists; pass --overwrite" in error
