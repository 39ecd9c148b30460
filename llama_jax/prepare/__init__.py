"""Text to a tokenizer and token shards: ``python -m llama_jax.prepare``."""
