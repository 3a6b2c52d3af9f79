"""A folder of ours as a model: its modules, its weights as they are written and read, what exporters build from."""
