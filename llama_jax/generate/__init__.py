"""Text generation: ``llama_jax.load`` and ``python -m llama_jax.generate``."""
