"""What lies on disk: model folders, rotations, the activation store, and how files are written."""
