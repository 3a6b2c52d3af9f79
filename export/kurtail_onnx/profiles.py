"""The two ways to run an export, as session configuration entries of ONNX Runtime."""

from __future__ import annotations

from typing import Literal

Profile = Literal["exact", "fast"]

ACCURACY, BLOCK = "session.qdq_matmulnbits_accuracy_level", "session.qdq_matmulnbits_block_size"

PROFILES: dict[Profile, dict[str, str]] = {
    "exact": {ACCURACY: "1", BLOCK: "32"},
    "fast": {ACCURACY: "4", BLOCK: "32"},
}
"""`exact` multiplies 4-bit weights by float32 activations; `fast` rounds blocks of 32 activations to 8 bits first, as
ONNX Runtime does when nothing is set."""
