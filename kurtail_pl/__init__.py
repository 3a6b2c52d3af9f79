"""KurTail: 4-bit weights, activations and KV cache through kurtosis-learned rotations (arXiv 2503.01483)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kurtail_pl.stages.artefact import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is asked for, so that `import kurtail_pl` loads neither torch nor transformers."""
    if name == "load":
        from kurtail_pl.stages.artefact import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
