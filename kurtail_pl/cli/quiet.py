"""What Lightning says at each start, and a user of `kurtail` need not read."""

from __future__ import annotations

import logging
import warnings

from lightning.pytorch.utilities import rank_zero_only

IGNORED = (
    ".*isinstance.treespec, LeafSpec.*",  # Lightning calls what torch has deprecated.
    "torch.distributed.nn.functional.all_gather is deprecated",
    ".*configure_optimizers. returned .None.",  # Fixed rotations have no optimizer, and say so by their class.
    "Found .* in eval mode at the start of training",  # The network that SpinQuant learns through does not train.
    "Checkpoint directory .* exists and is not empty",  # A run goes on there.
)
"""Warnings."""
IDLE = ("litlogger", "litmodels", "TPU available: False")
"""Words of messages that tell nothing: two are of other products."""


def quiet_lightning() -> None:
    """Keep from the terminal what tells nothing, and what processes but the first one say."""
    for message in IGNORED:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # The recipe has the seed.
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        logging.getLogger("kurtail_pl").setLevel(logging.ERROR)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(word in str(record.msg) for word in IDLE)
