"""What is fuzzed: for each kind of file, inputs of that kind and what the verbs do with them."""

from fuzz import models, ours, texts
from fuzz.registry import TARGETS, Target

__all__ = ["TARGETS", "Target", "models", "ours", "texts"]
