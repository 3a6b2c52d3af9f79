"""Several processes with the same work in the same folder at once: each ends right, alone or after waiting.

KURTAIL_TOGETHER is how many; three without it.
"""

import os
import re

import pytest
from e2e.faults.forks import contents, differing, table_without_cost
from e2e.faults.scenes import SCENES, Stage

PROCESSES = int(os.environ.get("KURTAIL_TOGETHER", "3"))


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("start", ["at once", "one after another"])
def test_at_once(stage: Stage, name: str, start: str) -> None:
    """One after another: when the first has made so many of its calls."""
    scene, alone = SCENES[name], stage.undisturbed(name)
    root = stage.set_up(scene)
    after = [number * len(alone.calls) // PROCESSES if start != "at once" else 0 for number in range(PROCESSES)]
    ends = stage.run_together(root, scene.arguments, after)
    said = "\n".join(f"--- {number}: {end.code}\n{end.error}" for number, end in enumerate(ends))
    for end in ends:
        if end.code:
            assert end.code == 1, said
            assert re.fullmatch(r"kurtail \w+: \S+ exists; pass --overwrite .*", end.error.splitlines()[-1]), said
        else:
            assert table_without_cost(end.out) == table_without_cost(alone.out), said
    assert any(end.code == 0 for end in ends), said
    assert differing(contents(root), alone.contents) == [], said
