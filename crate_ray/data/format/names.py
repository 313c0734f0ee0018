"""Grouping of a shard's members into samples by webdataset's rule, which splits a name into a key and a suffix."""

from __future__ import annotations

import re

from webdataset.tariterators import base_plus_ext

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of encoded images, in order of preference."""

_METADATA = re.compile(r"__[^/]*__($|/)")  # the members that webdataset skips


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into the sample's key and the lower-case suffix, as webdataset does.

    The key ends at the first dot of the base name. A leading './' is dropped. Returns None for members that webdataset
    skips (metadata, no suffix) and for unsafe names (`is_unsafe`).
    """
    if name[:1] in (".", "/", "_") or ".." in name:  # most names need none of these checks
        if is_metadata(name) or is_unsafe(name):
            return None
        name = relative(name)
    key, suffix = base_plus_ext(name)
    return None if key is None else (key, suffix.lower())


def is_metadata(name: str) -> bool:
    """Whether webdataset skips a member as metadata."""
    return _METADATA.match(name) is not None


def is_unsafe(name: str) -> bool:
    """Whether a member, if extracted under its own name, could land outside the target folder."""
    if ".." in name and ".." in name.split("/"):
        return True
    return name.startswith(("/", "./")) and relative(name).startswith("/")


def relative(name: str) -> str:
    """The name without leading './'."""
    while name.startswith("./"):
        name = name[2:]
    return name
