"""What is proven of an export."""
