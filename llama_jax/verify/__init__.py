"""Integrity check: ``python -m llama_jax.verify``."""
