"""Checkpoints: saved and restored through Orbax, with hashes of every file."""
