"""From a model and a text to a store of activations."""
