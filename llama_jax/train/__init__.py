"""Training: ``python -m llama_jax.train``."""
