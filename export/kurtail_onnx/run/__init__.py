"""Running an export: sessions, the decoding loop, sampling, perplexity."""
