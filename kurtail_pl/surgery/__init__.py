"""Changes to a Hugging Face model: folding, rotating, and quantized layers and attention."""
