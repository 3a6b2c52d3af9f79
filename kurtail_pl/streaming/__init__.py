"""The walker that takes a model through memory one decoder layer at a time."""
