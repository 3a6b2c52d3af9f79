"""The proof that an export computes what its artefact does, by the kernels that were meant."""
