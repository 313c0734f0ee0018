"""Stores records for MLflow on disk, so that they survive an unavailable server and a killed process.

    <spool folder>/<run key>/  events.jsonl                one event a line, in order
                               sent                        how many bytes of events.jsonl have been delivered, of
                                                           files and of records
                               files/<id>/<artifact name>  content of an event, under the name that MLflow shows

Files (artifacts and models) and records (metrics, tags, statuses) are delivered separately, each in their order, so
metrics do not wait for an artifact store. A file is written before its event. It is deleted after `sent` says that the
event was delivered. So a process may be killed at any moment. In the worst case an event is delivered twice.

Events are checked when they are read. A file is uploaded and deleted only if it is in files/, not behind a link.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from crate_ray.config.identifiers import Count, RelativePath, check_relative_path
from crate_ray.storage.node_folders import private_folder, spool_folder

logger = logging.getLogger(__name__)

_Content = Annotated[str, StringConstraints(pattern=r"^files/[0-9a-f]{32}/[^/]+$"), AfterValidator(check_relative_path)]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricsEvent(_Event):
    """Values that were measured after `step` steps."""

    kind: Literal["metrics"]
    step: Count
    values: dict[str, float]
    time: Count
    """Milliseconds since 1970."""


class StatusEvent(_Event):
    """A new status of the run."""

    kind: Literal["status"]
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
    time: Count | None = None
    """Milliseconds since 1970; None for RUNNING."""


class TagEvent(_Event):
    """A tag of the run."""

    kind: Literal["tag"]
    name: str
    value: str


class FileEvent(_Event):
    """A file that becomes an artifact."""

    kind: Literal["file"]
    path: _Content
    """The file, in the spool's folder."""
    folder: RelativePath | None
    """Folder among the artifacts."""


class ModelEvent(_Event):
    """An exported model that becomes an MLflow model."""

    kind: Literal["model"]
    path: _Content
    """Its folder, in the spool's folder."""


Record = MetricsEvent | StatusEvent | TagEvent
File = FileEvent | ModelEvent
Event = Record | File
Lane = Literal["files", "records"]
"""The two kinds of events that are delivered separately."""
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class Spool:
    """The undelivered events of one run. One process writes them, while a thread for each lane may deliver them.

    A full disk raises no exception. Records that cannot be written are lost, `error` says why, and a warning is logged
    once.

    Args:
        run_key: identifies the run. Records that an earlier process left are delivered first.

    Raises:
        UserError: the spool's folder cannot be created, or belongs to another user.
    """

    def __init__(self, run_key: str) -> None:
        path = spool_folder(run_key)
        self.is_new = not path.exists()
        """Whether no earlier process left events."""
        shutil.rmtree(_removed(path), ignore_errors=True)
        self.folder = private_folder(path, "set XDG_CACHE_HOME to a folder of your own")
        self._events, self._sent = self.folder / "events.jsonl", self.folder / "sent"
        self.error: OSError | None = None
        """Why something could not be written."""
        self._delivered: dict[Lane, int] = {"files": 0, "records": 0}  # bytes of the events
        self._lock = threading.Lock()
        with suppress(FileNotFoundError, ValueError):
            sent = [min(int(number), self.size) for number in self._sent.read_text().split()]
            if sent:  # one number stands for both
                self._delivered = {"files": sent[0], "records": sent[-1]}
        with suppress(OSError), self._events.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the machine crashed while it wrote this line
                    file.write(b"\n")

    @property
    def size(self) -> int:
        """Bytes of all events."""
        return self._events.stat().st_size if self._events.exists() else 0

    @property
    def is_delivered(self) -> bool:
        """Whether MLflow has all events."""
        return all(self.is_sent(lane) for lane in self._delivered)

    def is_sent(self, lane: Lane) -> bool:
        """Whether MLflow has all events of a lane."""
        return self._delivered[lane] >= self.size

    def add(self, kind: str, **values: Any) -> bool:
        """Append an event. Returns False if it cannot be written to disk."""
        size = None
        try:
            size = self.size
            with self._events.open("a") as file:
                file.write(json.dumps({"kind": kind, **values}) + "\n")
        except OSError as error:
            with suppress(OSError):
                if size is not None:
                    os.truncate(self._events, size)  # half a line would make the next line unreadable
            self._note(error)
            return False
        return True

    def add_file(self, folder: str | None, name: str, content: bytes) -> bool:
        """Append a file event for the artifact <folder>/<name>. Returns False if it cannot be written to disk."""
        return self._add_with("file", name, lambda path: path.write_bytes(content), folder=folder)

    def add_model(self, exported: Path, name: str) -> bool:
        """Append a model event with a copy of an exported model. Returns False if it cannot be written to disk."""
        return self._add_with("model", name, lambda path: shutil.copytree(exported, path))

    def undelivered(self, lane: Lane) -> Iterator[tuple[Event | None, int]]:
        """Events of a lane that have not been delivered, each with the number to call `mark_delivered` with.

        The last one is None with the number of the end, if other events follow.
        """
        end = last = self._delivered[lane]
        with self._events.open("rb") as file:
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):  # it is still being written
                    break
                end += len(line)
                try:
                    event = _EVENT.validate_json(line)
                except ValidationError:
                    if lane == "records":
                        logger.warning("%s: skipping a line that is incomplete or not an event", self._events)
                    continue
                if isinstance(event, File) == (lane == "files"):
                    last = end
                    yield event, end
        if end > last:
            yield None, end

    def content_of(self, event: File) -> Path | None:
        """Path of an event's file or folder; None if it is gone, or is or holds a symbolic link."""
        path = self.folder / event.path
        if path.exists() and not any(p.is_symlink() for p in (path.parent.parent, path.parent, path, *path.rglob("*"))):
            return path
        return None

    def mark_delivered(self, lane: Lane, event: Event | None, end: int) -> None:
        """Note that MLflow has an event and all before it in its lane, then delete the event's file."""
        with self._lock, suppress(OSError):  # disk full: a later start delivers the event again
            self._delivered[lane] = end
            new = self._sent.with_suffix(".new")
            new.write_text(f"{self._delivered['files']} {self._delivered['records']}")
            new.replace(self._sent)
            if isinstance(event, File) and not (self.folder / "files").is_symlink():
                shutil.rmtree((self.folder / event.path).parent, ignore_errors=True)  # does not follow links

    def remove(self) -> None:
        """Delete everything. The folder is renamed first, so its name is free even if this process is killed now."""
        with suppress(FileNotFoundError):
            self.folder.rename(_removed(self.folder))
        shutil.rmtree(_removed(self.folder), ignore_errors=True)

    def _add_with(self, kind: str, name: str, write: Callable[[Path], Any], **values: Any) -> bool:
        folder = self.folder / "files" / uuid.uuid4().hex
        try:
            folder.mkdir(parents=True)
            write(folder / name)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            self._note(error)
            return False
        return self.add(kind, path=(folder / name).relative_to(self.folder).as_posix(), **values)

    def _note(self, error: OSError) -> None:
        if self.error is None:
            logger.warning(
                "cannot write to %s (%s): metrics and pictures for MLflow are lost until it works again",
                self.folder,
                error,
            )
        self.error = error


def _removed(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.removed")
