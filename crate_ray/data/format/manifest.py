"""The manifest: one small JSON object that describes a dataset and holds the digests of its other files."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from crate_ray.bounded import MAX_CLASSES
from crate_ray.config.identifiers import Count, FolderAddress, Sha256, check_relative_path
from crate_ray.errors import UserError, invalid_value

MANIFEST_NAME = "manifest.json"
SHARDS_NAME = "shards.npy"
INDEX_NAME = "index.npy"
NAMES_NAME = "names.txt"
TABLE_SUFFIX = ".table.npy"
PLAN_NAME = ".packing/plan.json"
"""Exists while a dataset is being packed or indexed."""
FORMAT_VERSION = 2

_CHECKSUM = "sha256"
_UNSAFE_FIELDS = {"num_unsafe", "unsafe_names"}
_PATTERN = re.compile(r"[^{}]*\{:0[1-9][0-9]?d\}[^{}]*")


class DamagedDataset(UserError):  # noqa: N818 - named for what it reports
    """A dataset's manifest, or a file that it refers to, is missing, damaged or of another version."""


_Side = Annotated[int, Field(gt=0, lt=2**31)]


class Manifest(BaseModel):
    """Description of a dataset. It is read first; the other files must have the digests given here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    shards_uri: FolderAddress | None = None
    """Address of the shards if they are not next to the manifest: a folder or s3://bucket/prefix."""
    num_samples: Count
    num_shards: Count
    total_bytes: Count
    """Sum of the shards' sizes, tar headers included."""
    shard_pattern: str | None = None
    """str.format pattern of the shards' names with one number, such as 'shard-{:06d}.tar'. None: see names.txt."""
    shard_first: Count = 0
    """Number of the first shard in the pattern."""
    kind: Literal["image", "grid"]
    """'image': encoded images; 'grid': .npy arrays of shape (C, H, W) or (H, W)."""
    image_suffixes: tuple[str, ...]
    """Suffixes under which samples hold their image or grid, in order of preference."""
    suffixes: tuple[str, ...]
    """All suffixes."""
    channels: int = Field(gt=0)
    """Images: 3 if any measured one has colour, else 1. Grids: C."""
    height: _Side | None = None
    """Height in pixels, if all measured samples agree."""
    width: _Side | None = None
    """Width in pixels, if all measured samples agree."""
    num_classes: Annotated[int, Field(ge=0, le=MAX_CLASSES)] | None = None
    """Largest class number + 1, if every sample has a numeric `cls`."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers, if known."""
    mean: tuple[FiniteFloat, ...]
    """Mean per channel over the measured samples: on the scale 0-1 for images, as stored for grids."""
    std: tuple[FiniteFloat, ...]
    """Standard deviation per channel over all pixels of the measured samples, on the same scale."""
    num_measured: Count
    """Number of samples, evenly spaced, from which channels, size, mean and std were computed."""
    num_unsafe: Count = 0
    """Number of members that belong to no sample because their names are absolute, contain '..' or are too long."""
    unsafe_names: tuple[str, ...] = ()
    """The first hundred of them, each after its shard's name."""
    source_names: bool = False
    """Whether a list beside each shard has the names of its samples in their source: `<shard>.names.jsonl`."""
    shards_sha256: Sha256
    index_sha256: Sha256
    names_sha256: Sha256 | None = None

    @field_validator("shard_pattern")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and not _PATTERN.fullmatch(pattern):
            raise ValueError(f"{pattern!r} is not a shard name with one zero-padded number such as {{:06d}}")
        if pattern is not None:
            check_relative_path(pattern.format(0))
        return pattern

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"channels is {self.channels}, but there are {len(self.mean)} means and {len(self.std)} std"
            )
        return self

    def digest(self) -> str:
        """Identity of the dataset: sha256 of the canonical JSON, which holds the digests of the binary files.

        Members that belong to no sample and source names do not count.
        """
        return _digest_of(self.model_dump(mode="json", exclude={*_UNSAFE_FIELDS, "source_names"}))

    def checksum(self) -> str:
        """sha256 of the canonical JSON of all fields. The file holds it, so that damage to the file is noticed."""
        return _digest_of(self._stated())

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        values = self._stated()
        if not self.num_unsafe:
            values = {name: value for name, value in values.items() if name not in _UNSAFE_FIELDS}
        return (json.dumps(values | {_CHECKSUM: self.checksum()}, indent=2, ensure_ascii=False) + "\n").encode()

    def _stated(self) -> dict[str, Any]:
        """All fields, without those that are younger than the format's version if they have their defaults."""
        return self.model_dump(mode="json", exclude=None if self.source_names else {"source_names"})

    @property
    def left_out(self) -> dict[str, str]:
        """Members with unsafe names, in the form of reports of bad samples: cause by key."""
        more = self.num_unsafe - len(self.unsafe_names)
        return dict.fromkeys((*self.unsafe_names, *([f"and {more} more"] if more else [])), "unsafe_name")


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_manifest(text: bytes, uri: str) -> Manifest:
    """The manifest with this content, of the dataset at uri. Manifests of early versions have no checksum.

    Raises:
        DamagedDataset: it is damaged or has another format version.
    """
    try:
        values = json.loads(text)
        version, checksum = values.get("version"), values.pop(_CHECKSUM, None)
    except (ValueError, AttributeError, RecursionError):
        raise DamagedDataset(
            f"{uri}/{MANIFEST_NAME} is damaged: it is not a JSON object; restore it, or {index_again(uri)}"
        ) from None
    if version != FORMAT_VERSION:
        raise DamagedDataset(
            f"{uri}/{MANIFEST_NAME} has format version {str(version)[:20]}, this crate-ray reads version "
            f"{FORMAT_VERSION}; install the crate-ray that wrote it, or {index_again(uri)}"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise DamagedDataset(
            f"{uri}/{MANIFEST_NAME} is damaged: {invalid_value(error)}; restore it, or {index_again(uri)}"
        ) from None
    if checksum not in (None, manifest.checksum()):
        raise DamagedDataset(
            f"{uri}/{MANIFEST_NAME} is damaged or was edited: it does not have the {_CHECKSUM} that it states; restore "
            f"it, or {index_again(uri)}"
        )
    return manifest


def index_again(uri: str) -> str:
    """Text for messages: how to make a new manifest and index for intact shards."""
    return (
        f"index the shards again, which does not change them: `crate-ray prepare --output {shlex.quote(uri)} "
        "--overwrite true`"
    )


def name_pattern(names: Sequence[str]) -> tuple[str | None, int]:
    """Pattern and first number of names that differ by one consecutive zero-padded number; (None, 0) for others."""
    match = re.fullmatch(r"([^{}]*?)(\d+)([^\d{}]*)", names[0]) if names else None
    if match is None:
        return None, 0
    before, number, after = match.groups()
    pattern, first = f"{before}{{:0{len(number)}d}}{after}", int(number)
    if len(number) < 100 and all(pattern.format(first + i) == name for i, name in enumerate(names)):
        return pattern, first
    return None, 0
