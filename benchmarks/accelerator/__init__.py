"""Measures one GPU or TPU: ``python -m benchmarks.accelerator``."""
