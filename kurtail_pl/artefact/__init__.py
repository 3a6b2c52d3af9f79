"""A KurTail folder as a model: its modules, its weights as they are written and read, what exporters build from."""
