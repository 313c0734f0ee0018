"""Forms of the identifiers that are read from storage: digests, run keys, names of files and folders.

Whoever can write to a storage can change every record in it. So each identifier in a record has one of these types, and
a record with another value is refused when it is parsed. None of these types can name a path outside its folder.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal."""

RunKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""Random key of a run: a UUID in hexadecimal, without dashes."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of bytes, samples or steps."""


def leads_out(name: str) -> bool:
    """Whether a name with '/' between folders is absolute or contains '..', and so may lead out of its folder."""
    return name.startswith("/") or "\0" in name or ".." in name.split("/")


def _check_unicode(text: str) -> None:
    """Raise ValueError if a text has bytes that are not UTF-8, as file names may. A record, which is JSON, cannot."""
    if not text.isascii() and (readable := text.encode("utf-8", "backslashreplace").decode()) != text:
        raise ValueError(f"'{readable}' is not UTF-8")


def check_relative_path(path: str) -> str:
    """Check a path below a folder: names with '/' between them. Raises ValueError if it is anything else."""
    _check_unicode(path)
    if _CONTROL.search(path) or any(name in ("", ".", "..") or len(name.encode()) > 255 for name in path.split("/")):
        raise ValueError(f"{path!r} is not a relative path without '.', '..' and control characters")
    return path


def check_file_name(name: str) -> str:
    """Check the name of a file. Raises ValueError if it is anything else, such as a path with several names."""
    if "/" in name:
        raise ValueError(f"{name!r} is not the name of a file")
    return check_relative_path(name)


def check_address(address: str) -> str:
    """Check an absolute address: a local folder or s3://bucket/prefix. Raises ValueError if it is anything else."""
    _check_unicode(address)
    scheme = _SCHEME.match(address)
    path = address[scheme.end() :] if scheme else address
    local = scheme is None and path.startswith("/")
    if not (local or (scheme and scheme[0] == "s3://" and path[:1] not in ("", "/"))) or leads_out(path.lstrip("/")):
        raise ValueError(f"{address!r} is neither an absolute path nor s3://bucket/prefix, without '..'")
    return address


def check_model_name(name: str) -> str:
    """Check the name of a registered model. Raises ValueError if MLflow, or models:/<name>@<alias>, cannot take it."""
    if not name.strip() or name in (".", "..") or len(name) > 256 or _CONTROL.search(name) or set("/:@\"'") & set(name):
        raise ValueError(
            f"the name of a registered model, {name!r}, must have 1 to 256 characters and none of / : @ \" '"
        )
    return name


RelativePath = Annotated[str, AfterValidator(check_relative_path)]
"""Path of a file below a folder."""

FileName = Annotated[str, AfterValidator(check_file_name)]
"""Name of a file in its folder."""

FolderAddress = Annotated[str, AfterValidator(check_address)]
"""Absolute address of a folder: a local path or s3://bucket/prefix."""
