"""What folders mean: classes, parts of a split, and folders that programs make beside somebody's pictures."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from crate_ray.errors import first_few

logger = logging.getLogger(__name__)

_BY_PROGRAMS = frozenset(
    {
        "@eadir", "@__thumb", "@recycle", "#recycle", "$recycle.bin", "@recently-snapshot", "#snapshot", "lost+found",
        "system volume information", "__macosx", "__pycache__", "thumbs", "_thumbs", "thumbnail", "thumbnails",
    }
)  # fmt: skip
_MORE = r"(?:[-_ ]?(?:\d+|set|data|images?|imgs?|split))*"
_TRAIN = re.compile(rf"train(?:ing)?{_MORE}", re.IGNORECASE)
_HELD_OUT = re.compile(rf"(?:val|valid|validation|test|testing|dev|eval|evaluation|holdout){_MORE}", re.IGNORECASE)


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder on its path, has a name that begins with a dot."""
    return name.startswith(".") or "/." in name


def is_by_program(name: str) -> bool:
    """Whether a file lies in a folder of thumbnails, deleted files or the like, which a NAS or a viewer makes."""
    return any(part.lower() in _BY_PROGRAMS for part in name.split("/")[:-1])


def usable_names(names: Sequence[str], unlisted: Mapping[str, str] | None = None) -> list[str]:
    """The files that somebody put there. A warning says how many others are left out.

    Args:
        names: files of a folder, with '/' between folders.
        unlisted: files and folders that could not be listed, with the causes.
    """
    hidden = [name for name in names if is_hidden(name)]
    made = [name for name in names if not is_hidden(name) and is_by_program(name)]
    if hidden:
        logger.warning("skipped %d hidden files (with a dot before a name), such as %s", len(hidden), hidden[0])
    if made:
        logger.warning(
            "skipped %d files in folders that programs make, such as %s; rename the folder to use them",
            len(made), made[0],
        )  # fmt: skip
    by_cause: dict[str, list[str]] = {}
    for name, cause in sorted((unlisted or {}).items()):
        by_cause.setdefault(cause, []).append(name)
    for cause, skipped in by_cause.items():
        logger.warning("skipped %d files or folders (%s): %s", len(skipped), cause, first_few(skipped))
    left_out = {*hidden, *made}
    return [name for name in names if name not in left_out]


class ClassFolders(NamedTuple):
    """Which folders are the classes of some files."""

    classes: tuple[str, ...]
    """Names of the classes, sorted."""
    depth: int
    """Which folder of a path is the class, from 0."""

    def folder(self, name: str) -> str:
        """Class of a file."""
        return name.split("/")[self.depth]


def class_folders(names: Sequence[str], everything: Sequence[str], uri: str) -> ClassFolders | None:
    """The classes of the files to pack; None if they have none. Warnings say which folders are not used as labels.

    If all files lie in folders, the folders at the top are the classes. If these are the parts of a split (`train`,
    `val`), the folders below them are.

    Args:
        names: the images or grids, with '/' between folders.
        everything: all files.
        uri: address of their folder, for messages.
    """
    loose = [name for name in names if "/" not in name]
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    if not tops:
        return None
    train = [top for top in tops if _TRAIN.fullmatch(top)]
    held_out = [top for top in tops if _HELD_OUT.fullmatch(top)]
    held_out.sort(key=lambda top: not top.lower().startswith("val"))
    parts = [*train, *held_out]
    if len(parts) == len(tops) and (train or len(tops) == 1):
        return _classes_in_parts(names, loose, parts, _commands(uri, train, held_out))
    if loose:
        logger.warning(
            "no labels: %d of %d files lie in no folder (such as %s), so the %d folders beside them are not used as "
            "classes (%s); move these files away or into folders to get labels",
            len(loose), len(names), loose[0], len(tops), first_few(tops),
        )  # fmt: skip
        return None
    if train and held_out:
        logger.warning(
            "the folders %s are classes here, among %d; if they are parts of a split, pack each on its own: %s",
            " and ".join(parts), len(tops), _commands(uri, train, held_out),
        )  # fmt: skip
    if without := sorted({name.partition("/")[0] for name in everything if "/" in name}.difference(tops)):
        logger.warning(
            "%d folders hold no images or grids, so they are no classes: %s", len(without), first_few(without)
        )
    deep = [name for name in names if name.count("/") > 1]
    if len(tops) == 1 and deep:
        logger.warning(
            "all %d files lie in the folder %s, which is the only class; if the folders in it are the classes, use "
            "--source %s",
            len(names), tops[0], shlex.quote(f"{uri}/{tops[0]}"),
        )  # fmt: skip
    elif deep:
        logger.warning(
            "the classes are the %d folders at the top; folders in them are not labels (%d files, such as %s)",
            len(tops), len(deep), deep[0],
        )  # fmt: skip
    return ClassFolders(tuple(tops), 0)


def _classes_in_parts(
    names: Sequence[str], loose: Sequence[str], parts: Sequence[str], commands: str
) -> ClassFolders | None:
    """The classes of files in the parts of a split: the folders below, if all files lie in some."""
    unlabelled = [name for name in names if name.count("/") < 2]
    found = None if unlabelled else ClassFolders(tuple(sorted({name.split("/")[1] for name in names})), 1)
    if found is None:
        example = loose[0] if loose else unlabelled[0]
        labels = f"no labels: {len(unlabelled)} of {len(names)} files lie in no folder of a class, such as {example}"
    else:
        labels = f"the classes are the folders in {'it' if len(parts) == 1 else 'them'} ({first_few(found.classes)})"
    if len(parts) == 1:
        logger.warning("the folder %s is not a class but a part of a split; %s", parts[0], labels)
    else:
        logger.warning(
            "the folders %s are not classes but parts of a split, and are packed into one dataset; %s; to keep them "
            "apart, use %s",
            " and ".join(parts), labels, commands,
        )  # fmt: skip
    return found


def _commands(uri: str, train: Sequence[str], held_out: Sequence[str]) -> str:
    """Commands that pack the parts of a split on their own."""
    named = [*((top, "train") for top in train[:1]), *((top, "validation") for top in held_out[:1])]
    named += [(top, top) for top in (*train[1:], *held_out[1:])]
    commands = (f"`crate-ray prepare --source {shlex.quote(f'{uri}/{top}')} --output OUTPUT/{to}`" for top, to in named)
    return " and ".join(commands)
