"""Export to vLLM: a folder in the layout of compressed-tensors."""
