"""Table 8: how often a rotation makes a token's largest magnitude smaller."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kurtail_pl.metrics import SuccessRate
from kurtail_pl.stages.reporting.figures.style import BLOCKS, HADAMARD, VANILLA


class Reductions:
    """The three comparisons of Table 8, for each block over all layers and for each site.

    Args:
        method: that learned the rotation.
    """

    def __init__(self, method: str) -> None:
        self.pairs = [(method, VANILLA), (HADAMARD, VANILLA), (method, HADAMARD)]
        # Where several processes trained, one of them draws: the others would never answer.
        self._blocks = {(pair, block): SuccessRate(sync_on_compute=False) for pair in self.pairs for block in BLOCKS}
        self._sites: dict[tuple[str, str], dict[str, float]] = {pair: {} for pair in self.pairs}

    def update(self, site: str, views: Mapping[str, Tensor]) -> None:
        """Add one site: ``[tokens, channels]`` of each method."""
        for pair in self.pairs:
            first, second = pair
            metric = self._blocks[pair, site.split(".")[1]]
            self._sites[pair][site] = metric(views[first], views[second]).item()

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Shares in [0, 1], for JSON."""
        return {
            f"{first}_over_{second}": {
                **{name: self._blocks[(first, second), block].compute().item() for block, name in BLOCKS.items()},
                "sites": self._sites[first, second],
            }
            for first, second in self.pairs
        }

    def markdown(self) -> str:
        """The table, in per cent of the tokens."""
        rows = [
            [f"{first} over {second}"]
            + [f"{100 * self._blocks[(first, second), block].compute().item():.2f} %" for block in BLOCKS]
            for first, second in self.pairs
        ]
        lines = [["smaller maximum", *BLOCKS.values()], ["---", *("---:" for _ in BLOCKS)], *rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
