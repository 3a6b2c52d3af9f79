"""What an artefact, an export or a foreign file computes with, and what each runtime makes of it."""
