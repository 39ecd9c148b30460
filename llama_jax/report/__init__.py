"""One page with the results of several commands: ``python -m llama_jax.report``."""
