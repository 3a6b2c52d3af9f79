"""Perplexity, kurtosis and tasks of models."""
