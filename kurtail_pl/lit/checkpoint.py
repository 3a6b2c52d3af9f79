"""A checkpoint that training wrote, looked at before Lightning reads it."""

from __future__ import annotations

from pathlib import Path

import torch

from kurtail_pl.errors import CheckpointError

KEYS = ("state_dict", "loops", "optimizer_states", "lr_schedulers", "global_step", "epoch", "settings", "stopped")
"""What Lightning and our modules read of one."""


def require_checkpoint(path: Path, remedy: str) -> None:
    """Raise CheckpointError unless a file is a complete checkpoint that kurtail fit wrote.

    Args:
        path: of the file.
        remedy: what to do otherwise; the message ends with it.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; {remedy}")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch's reader of archives and its unpickler have many kinds.
        raise CheckpointError(f"checkpoint {path} is cut short, or was not written by training; {remedy}") from error
    missing = [key for key in KEYS if key not in content] if isinstance(content, dict) else list(KEYS)
    if missing:
        raise CheckpointError(f"checkpoint {path} has no {missing[0]}, so kurtail fit did not write it; {remedy}")
