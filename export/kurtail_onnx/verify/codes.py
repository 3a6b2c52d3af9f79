"""Codes of an export's cache, unpacked on the host for comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kurtail_onnx.graph.cache import CachePart


def codes_in(stored: NDArray[Any], part: CachePart) -> NDArray[np.int64]:
    """Codes ``[..., head_dim]`` of a cache array ``[..., width]``."""
    assert part.quantizer is not None
    codes = stored.astype(np.int64)
    if part.quantizer.bits == 4:
        codes = np.concatenate([codes & 0xF, codes >> 4], axis=-1)
    return codes + part.quantizer.code_range[0]
