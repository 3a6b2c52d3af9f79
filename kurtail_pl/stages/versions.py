"""Versions of everything that decides a result."""

from __future__ import annotations

import platform
from importlib.metadata import version

from kurtail_pl import __version__


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries it computes with."""
    libraries = ("torch", "transformers", "safetensors", "tokenizers")
    return {"python": platform.python_version(), "kurtail_pl": __version__, **{n: version(n) for n in libraries}}
