"""The file systems of pyarrow, which Ray writes through, for the addresses that `storage` knows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs

from crate_ray.config import S3Config

# pyarrow's S3 client sends checksums that many S3-compatible stores refuse (HTTP 411).
ARROW_ENV = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"}
"""Environment that every process which uses such a file system needs, before it makes the first."""


def arrow_filesystem(uri: str, s3: S3Config) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system, and path in it, of a local folder or of s3://bucket/prefix."""
    if not uri.startswith("s3://"):
        return pyarrow.fs.LocalFileSystem(), Path(uri).resolve().as_posix()
    endpoint = s3.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {"region": s3.region or os.environ.get("AWS_REGION")}
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        options["region"] = options["region"] or "us-east-1"
    return pyarrow.fs.S3FileSystem(**options), uri.removeprefix("s3://")
