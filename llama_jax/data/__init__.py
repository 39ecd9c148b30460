"""Tokenizers, chat templates, and token shards to batches."""
