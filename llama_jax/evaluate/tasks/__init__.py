"""Benchmarks with the protocol of the LLaMA paper, read from local files; one module per table."""
