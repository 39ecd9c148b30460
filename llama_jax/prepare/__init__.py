"""Text to token shards: ``python -m llama_jax.prepare``."""
