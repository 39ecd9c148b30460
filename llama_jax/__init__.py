"""LLaMA in JAX and Flax: train, convert, sample. Importing it loads nothing heavy."""
