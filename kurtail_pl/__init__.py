"""KurTail: 4-bit weights, activations and KV cache through kurtosis-learned rotations (arXiv 2503.01483)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kurtail_pl.artefact.registration import register

if TYPE_CHECKING:
    from kurtail_pl.artefact.load import load
    from kurtail_pl.cli.api import quantize

__version__ = "0.1.0"
__all__ = ["__version__", "load", "quantize"]


_PLACES = {"load": "kurtail_pl.artefact.load", "quantize": "kurtail_pl.cli.api"}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then, so that `import kurtail_pl` loads neither torch nor transformers."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
