"""Mathematics of rotations and quantization: torch only, no state, no input or output."""
