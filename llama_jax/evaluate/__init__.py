"""Evaluation on EleutherAI's lm-evaluation-harness: ``python -m llama_jax.evaluate``."""
