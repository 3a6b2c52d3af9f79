"""torch: KurTail's own model computes whatever a scheme says."""

from __future__ import annotations

from collections.abc import Iterator

from kurtail_pl.methods.scheme import Scheme
from kurtail_pl.methods.target import ONLINE, Target


class Simulation(Target):
    """`kurtail_pl.load` and transformers: quantized numbers as floating point, all of them."""

    name = "torch"
    recipe = "kurtail-plus"
    online = ONLINE
    block_inputs = True
    transforms = True

    def lacks(self, scheme: Scheme) -> Iterator[str]:
        """Nothing."""
        yield from ()
