"""Extracts the encoded image or grid and the label from a sample, or the reason why it cannot be used.

Training, evaluation and embedding all go through `sample_contents`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

from crate_ray.bounded import MAX_CLASSES
from crate_ray.data.format.samples import Sample, class_number
from crate_ray.data.read.bad_samples import SampleError
from crate_ray.data.read.shard_reader import Unreadable

_DIGITS = b"0123456789 \t\r\n"

NO_LABEL = -1
"""Label of a sample without a class."""

LabelUse = Literal["required", "optional", "ignored"]
"""Whether a sample without a label is an error, gets NO_LABEL, or labels are not read at all."""


class Contents(NamedTuple):
    """Contents of n samples."""

    encoded: list[bytes | memoryview]
    """Encoded images or grids; empty bytes, which no decoder accepts, for samples without one."""
    labels: list[int]
    """Class numbers, or NO_LABEL."""
    errors: list[SampleError | None]
    """Why a sample cannot be used; None if nothing is wrong so far. Images and grids are not decoded here."""


def sample_contents(samples: Sequence[Sample | Unreadable], suffixes: Sequence[str], label_use: LabelUse) -> Contents:
    """Find the image or grid, and the label, of samples that have been read.

    Args:
        samples: as the readers return them.
        suffixes: suffixes of images or grids in this dataset, the preferred one first (`Manifest.image_suffixes`).
        label_use: how to treat labels, which are the members `cls`.
    """
    encoded, errors = _encoded(samples, suffixes)
    if label_use == "ignored":
        return Contents(encoded, [NO_LABEL] * len(samples), errors)
    return Contents(encoded, _labels(samples, errors, required=label_use == "required"), errors)


def _encoded(
    samples: Sequence[Sample | Unreadable], suffixes: Sequence[str]
) -> tuple[list[bytes | memoryview], list[SampleError | None]]:
    if len(suffixes) == 1:
        with suppress(KeyError):  # fast path: nearly always, every sample has the only suffix
            return [sample.members[suffixes[0]] for sample in samples], [None] * len(samples)
    encoded: list[bytes | memoryview] = []
    errors: list[SampleError | None] = []
    for sample in samples:
        content = next((sample.members[suffix] for suffix in suffixes if suffix in sample.members), None)
        error = None
        if isinstance(sample, Unreadable):
            error = SampleError(sample.key, "damaged_shard", sample.error)
        elif content is None:
            error = SampleError(sample.key, "no_image", f"it has no member with a suffix in {list(suffixes)}")
        encoded.append(b"" if content is None else content)
        errors.append(error)
    return encoded, errors


def _labels(samples: Sequence[Sample | Unreadable], errors: list[SampleError | None], *, required: bool) -> list[int]:
    """Class numbers. If they are required, samples without one get an error."""
    with suppress(KeyError, ValueError):  # fast path: nearly always, every sample has a valid label
        contents = [bytes(sample.members["cls"]) for sample in samples]
        labels = list(map(int, contents))
        text = b"".join(contents)
        plain = text.isdigit() or not text.translate(None, _DIGITS)  # int() also reads '+3' and '1_0'
        if plain and max(labels, default=0) < MAX_CLASSES:
            return labels
    labels = []
    for i, sample in enumerate(samples):
        label = _label(sample)
        if label == NO_LABEL and required and errors[i] is None:
            errors[i] = SampleError(sample.key, "no_label", "its member 'cls' is missing or not a class number")
        labels.append(label)
    return labels


def _label(sample: Sample | Unreadable) -> int:
    try:
        label = class_number(sample.members["cls"])
    except (KeyError, ValueError):
        return NO_LABEL
    return NO_LABEL if label is None else label
