"""Weight conversion: ``python -m llama_jax.convert``."""
