"""Paths of local files and of objects in a bucket (``gs://``, ``s3://``)."""

from llama_jax.storage.paths import (
    ObjectPath,
    StorageError,
    as_path,
    check_path,
    is_remote,
)  # fmt: skip

__all__ = ["ObjectPath", "StorageError", "as_path", "check_path", "is_remote"]
