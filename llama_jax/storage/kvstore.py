"""How TensorStore opens a folder: the disk, or a bucket with the settings of the environment."""

import os
from pathlib import Path
from typing import Any

from llama_jax.storage.paths import ObjectPath


def kvstore(path: Path) -> dict[str, Any]:
    """TensorStore's key-value store for a folder; the file or folder itself for a local one."""
    if not isinstance(path, ObjectPath):
        return {"driver": "file", "path": str(path.resolve())}
    bucket, key = path.parts[0], "/".join(path.parts[1:])
    if path.scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": key}
    return {"driver": "s3", "bucket": bucket, "path": key} | _s3_settings()


def _s3_settings() -> dict[str, Any]:
    """What TensorStore does not read by itself: the endpoint and the region of other stores than
    Amazon's."""
    environment = os.environ.get
    found: dict[str, Any] = {}
    import botocore.session  # comes with s3fs

    configured = botocore.session.Session().get_scoped_config()
    endpoint = environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL")
    if endpoint := endpoint or configured.get("endpoint_url"):
        region = environment("AWS_REGION") or environment("AWS_DEFAULT_REGION")
        found = {
            "endpoint": endpoint,
            "aws_region": region or configured.get("region", "us-east-1"),
        }
    if environment("AWS_ACCESS_KEY_ID") and environment("AWS_SECRET_ACCESS_KEY"):
        found["aws_credentials"] = {"type": "environment"}
    return found
