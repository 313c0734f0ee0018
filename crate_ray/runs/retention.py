"""Decides which checkpoints of a run are kept, and deletes the others. Unfinished checkpoints are deleted too."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from crate_ray.config import CheckpointConfig
from crate_ray.runs.commits import CHECKPOINT_FOLDER, Commit, best_first, committed, record_name
from crate_ray.runs.quality import Quality, read_qualities
from crate_ray.storage.interface import Storage

_DIRECTORY = re.compile(f"({CHECKPOINT_FOLDER})/")


def kept_checkpoints(
    commits: Sequence[Commit], config: CheckpointConfig, qualities: Mapping[int, Quality] = MappingProxyType({})
) -> list[Commit]:
    """Select the checkpoints to keep: the newest, the best, and one every few hours. Both lists are newest first.

    Measuring a checkpoint takes a while. If the best are those with the highest accuracy, all that are newer than the
    last measured one are kept.
    """
    kept = list(commits[: config.keep_last])
    if config.keep_best:
        kept += best_first(commits, qualities)[: config.keep_best]
        if config.keep_best_by != "validation_loss":
            kept += [commit for commit in commits if commit.step > max(qualities, default=0)]
    if config.keep_every_hours is not None:
        last = -math.inf
        for commit in reversed(commits):
            if commit.time - last >= config.keep_every_hours * 3600:
                kept.append(commit)
                last = commit.time
    return [commit for commit in commits if commit in kept]


def delete_old_checkpoints(run: Storage, config: CheckpointConfig) -> None:
    """Delete the checkpoints that are not kept. Commit records go first, so that partly deleted ones are not valid."""
    commits = committed(run)
    compares = config.keep_best and config.keep_best_by != "validation_loss"
    kept = kept_checkpoints(commits, config, read_qualities(run) if compares else {})
    named = {f"{commit.directory}/{name}" for commit in kept for name in commit.files}
    for commit in commits:
        if commit not in kept:
            run.delete(record_name(commit))
            _delete_directory(run, commit.directory, named)


def delete_unfinished(run: Storage) -> None:
    """Delete checkpoint folders without a commit record. Call it only while no worker of the run is uploading."""
    found = {match[1] for info in run.list("attempt-") if (match := _DIRECTORY.match(info.key))}
    commits = committed(run)  # listed after the folders, so that one committed in between counts
    named = {f"{commit.directory}/{name}" for commit in commits for name in commit.files}
    for directory in sorted(found - {commit.directory for commit in commits}):
        _delete_directory(run, directory, named)


def _delete_directory(run: Storage, directory: str, named: set[str]) -> None:
    for info in list(run.list(f"{directory}/")):
        if info.key not in named:
            run.delete(info.key)
