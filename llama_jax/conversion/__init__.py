"""The rooms behind `llama_jax.convert`: files, layouts, the one table of tensors, copying."""
