"""What is proven of a file: its numbers by another reader, and what llama.cpp makes of them."""
