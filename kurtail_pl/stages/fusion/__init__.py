"""From a plain model and rotations to a fused model, gated in float64."""
