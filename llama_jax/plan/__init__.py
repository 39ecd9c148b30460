"""Memory, speed and cost of a run: ``python -m llama_jax.plan``."""
