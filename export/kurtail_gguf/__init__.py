"""An artefact as a GGUF file for llama.cpp."""
