"""pyarrow file systems for the same addresses as `open_storage`. Ray writes its files through them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs

from crate_ray.config import S3Config

# pyarrow's S3 client sends checksums that many S3-compatible stores refuse (HTTP 411).
ARROW_ENV = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
"""Environment variables that a process needs before it creates such a file system."""


def arrow_filesystem(uri: str, s3: S3Config) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the file system of a local folder or s3://bucket/prefix, and the path within it."""
    if not uri.startswith("s3://"):
        return pyarrow.fs.LocalFileSystem(), Path(uri).resolve().as_posix()
    endpoint = s3.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {"region": s3.region or os.environ.get("AWS_REGION")}
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        options["region"] = options["region"] or "us-east-1"
    return pyarrow.fs.S3FileSystem(**options), uri.removeprefix("s3://")
