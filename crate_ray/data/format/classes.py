"""Matches the classes of two datasets by name, because their numbers depend on which class folders each of them has."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crate_ray.bounded import MAX_CLASSES
from crate_ray.data.format.manifest import Manifest
from crate_ray.errors import UserError, first_few

UNKNOWN_CLASS = -3
"""New number of a class that the other dataset does not have. Labels below 0 have other meanings, too."""


def class_names(manifest: Manifest) -> tuple[str, ...] | None:
    """Names of a dataset's classes, if every class number has one."""
    names = manifest.classes
    return names if names and len(names) >= (manifest.num_classes or 0) else None


def class_name(manifest: Manifest, number: int) -> str:
    """A class for messages: its name, or else its number."""
    names = class_names(manifest)
    return str(number) if names is None or not 0 <= number < len(names) else repr(names[number])


def new_numbers(names: Sequence[str] | None, manifest: Manifest, uri: str, reference: str) -> NDArray[np.int64] | None:
    """Numbers of a dataset's classes in a reference: another dataset, or a classifier.

    Classes are matched by name. If only one side has names, the numbers count, unless all of its names are whole
    numbers: then class 7 of the other side is the one that is named 7.

    Args:
        names: names of the reference's classes by number, if known.
        manifest: the dataset's manifest.
        uri: the dataset, for messages.
        reference: the reference, for messages.

    Returns:
        The new number of each of the dataset's classes, or UNKNOWN_CLASS; None if no number changes.

    Raises:
        UserError: the dataset has classes that the reference lacks.
    """
    own = class_names(manifest)
    if own is not None and names is not None:
        return None if own == tuple(names) else _by_name(names, own, uri, reference)
    if names is not None and (numbers := _whole_numbers(names)):
        of = {number: place for place, number in enumerate(numbers)}
        found = [of.get(number, UNKNOWN_CLASS) for number in range(manifest.num_classes or 0)]
        if found and found[-1] == UNKNOWN_CLASS:  # there are samples of the last class, and perhaps of the others
            raise UserError(
                f"{uri} has samples of class {len(found) - 1}, and {reference} has no class of this name: it has "
                f"{first_few(names)}; number the classes the same way in both"
            )
    elif own is not None and (numbers := _whole_numbers(own)):
        found = numbers
    else:
        return None
    return None if found == list(range(len(found))) else np.array(found, np.int64)


def renumber(labels: NDArray[np.int64], numbers: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Labels with the numbers from `new_numbers`. Those below 0 stay as they are."""
    if numbers is None or not len(numbers):
        return labels
    return np.where(labels < 0, labels, numbers[np.clip(labels, 0, len(numbers) - 1)])


def _by_name(names: Sequence[str], own: Sequence[str], uri: str, reference: str) -> NDArray[np.int64]:
    places = {_key(name): place for place, name in enumerate(names)}
    if len(places) < len(names) or len({_key(name) for name in own}) < len(own):
        raise UserError(f"{uri} or {reference} has two classes of the same name, so that classes cannot be matched")
    if unknown := [name for name in own if _key(name) not in places]:
        raise UserError(
            f"{uri} has {len(unknown)} of {len(own)} classes that {reference} lacks: {first_few(unknown)}, while "
            f"{reference} has {first_few(names)}; pack both with the same names of class folders"
        )
    return np.array([places[_key(name)] for name in own], np.int64)


def _key(name: str) -> str:
    """Equal for names that look the same: macOS writes accents as separate characters."""
    return unicodedata.normalize("NFC", name)


def _whole_numbers(names: Sequence[str]) -> list[int] | None:
    """The class numbers that different names in decimal digits stand for; None if one is another word."""
    if not all(name.isascii() and name.isdigit() and len(name) < 20 for name in names):
        return None
    numbers = [int(name) for name in names]
    return numbers if len(set(numbers)) == len(numbers) and max(numbers) < MAX_CLASSES else None
