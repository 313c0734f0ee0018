"""Grouping of a shard's members into samples by webdataset's rule, which splits a name into a key and a suffix."""

from __future__ import annotations

import re

from crate_ray.bounded import MAX_NAME

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""Suffixes of encoded images, in order of preference."""

_METADATA = re.compile(r"__[^/]*__($|/)")  # the members that webdataset skips


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into the sample's key and the lower-case suffix, as webdataset does.

    The key ends at the first dot of the base name. A leading './' is dropped. Returns None for members that webdataset
    skips (metadata, no suffix) and for refused names (`is_refused`).
    """
    if (len(name) > MAX_NAME or not name.isascii()) and _is_long(name):
        return None
    if name[:1] in (".", "/", "_") or ".." in name:  # most names need none of these checks
        if is_metadata(name) or is_unsafe(name):
            return None
        name = relative(name)
    # The result of webdataset's base_plus_ext, whose regular expression takes quadratic time.
    dot = name.find(".", name.rfind("/") + 1)
    before = name.rfind(".", 0, max(dot, 0))
    part = 0 if before < 0 else name.find("/", before, dot) + 1  # where the part without dots begins
    if dot <= part or (before >= 0 and part == 0) or "\n" in name[:part]:
        return None
    return name[:dot], name[dot + 1 :].lower()


def is_metadata(name: str) -> bool:
    """Whether webdataset skips a member as metadata."""
    return _METADATA.match(name) is not None


def is_refused(name: str) -> bool:
    """Whether a member belongs to no sample because its name is unsafe or longer than 1,024 bytes."""
    return _is_long(name) or is_unsafe(name)


def _is_long(name: str) -> bool:
    return len(name.encode("utf-8", "surrogateescape")) > MAX_NAME


def is_unsafe(name: str) -> bool:
    """Whether a member, if extracted under its own name, could land outside the target folder."""
    if ".." in name and ".." in name.split("/"):
        return True
    return name.startswith(("/", "./")) and relative(name).startswith("/")


def relative(name: str) -> str:
    """The name without leading './'."""
    start = 0
    while name.startswith("./", start):
        start += 2
    return name[start:]


def printable(name: str) -> str:
    """A name that can be written as UTF-8: what is not becomes `\\udc…`. File systems and tars allow any bytes."""
    return name.encode("utf-8", "backslashreplace").decode()


def readable(key: str) -> str:
    """A sample's key as text that can be written: bytes that are not UTF-8, such as Latin-1, become `\\xe9`."""
    return key if key.isascii() else key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
