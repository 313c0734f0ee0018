"""Counts samples that cannot be used, with their causes, and stops a job that has too many."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, get_args

from crate_ray.data.decode.errors import Cause, DecodeError
from crate_ray.data.format.names import printable
from crate_ray.errors import UserError

BAD_CAUSES: tuple[str, ...] = (*get_args(Cause), "damaged_shard", "no_image", "no_label")
"""Why samples cannot be used."""

MAX_LISTED = 10_000
"""Largest number of bad samples whose keys are stored. Further ones are only counted."""

_MIN_SAMPLES = 1000
"""The share of bad samples is computed over at least this many samples, so that a few never stop a small job."""


class SampleError(NamedTuple):
    """A sample that cannot be used."""

    key: str
    """Key of the sample, or its position in the shard if the key cannot be read."""
    cause: str
    """One of BAD_CAUSES."""
    message: str
    """Error message for the user."""

    @classmethod
    def of_decode_error(cls, key: str, error: DecodeError) -> SampleError:
        """From an error of `decode_batch`."""
        return cls(key, error.cause, str(error))

    def of_source(self, name: str | None) -> SampleError:
        """This error, whose key is followed by the sample's name in its source, if that is known."""
        return self if name is None else self._replace(key=f"{self.key} ({name})")


class BadSampleCounter:
    """Counts bad samples and stops a job that has too many. Thread-safe.

    Args:
        max_fraction: largest share of bad samples.
        uri: the data, for messages.
        causes: filled with the cause of each bad sample, by key; for callers that count over several passes.
        setting: the setting that max_fraction comes from, for messages; None if there is none.
    """

    def __init__(
        self,
        max_fraction: float,
        uri: str,
        causes: dict[str, str] | None = None,
        *,
        setting: str | None = "data.max_bad_fraction",
    ) -> None:
        self._max_fraction, self._uri, self._setting = max_fraction, uri, setting
        self._lock = threading.Lock()
        self._drawn = self._bad = 0
        self._taken: Counter[str] = Counter()
        self.causes = {} if causes is None else causes
        """Cause of the first MAX_LISTED bad samples, by key."""
        self.counts: Counter[str] = Counter()
        """Number of bad samples by cause. A sample counts again each time it is drawn."""
        self.last: SampleError | None = None
        """The last bad sample."""

    def take_counts(self) -> list[int]:
        """Counts since the last call, in the order of BAD_CAUSES."""
        with self._lock:
            new, self._taken = self.counts - self._taken, self.counts.copy()
        return [new[cause] for cause in BAD_CAUSES]

    def count_drawn(self, count: int) -> None:
        """Count samples that were drawn, good or bad."""
        with self._lock:
            self._drawn += count

    def add(self, error: SampleError) -> None:
        """Count a bad sample. Raises UserError if there are too many."""
        with self._lock:
            self.last = error
            self._bad += 1
            self.counts[error.cause] += 1
            if len(self.causes) < MAX_LISTED:
                self.causes.setdefault(printable(error.key), error.cause)
            self._check(error)

    def add_counted(self, counts: Mapping[str, int], causes: Mapping[str, str], last: SampleError | None) -> None:
        """Add what another counter has found in other samples. Raises UserError if there are too many."""
        with self._lock:
            self.last = last or self.last
            self._bad += sum(counts.values())
            self.counts.update(counts)
            for key, cause in causes.items():
                if len(self.causes) < MAX_LISTED:
                    self.causes.setdefault(key, cause)
            if last is not None:
                self._check(last)

    def _check(self, error: SampleError) -> None:
        if self._bad > self._max_fraction * max(self._drawn, _MIN_SAMPLES):
            raise UserError(self._too_many(error))

    def _too_many(self, last: SampleError) -> str:
        kinds = ", ".join(f"{count} {cause}" for cause, count in self.counts.most_common())
        limit, remedy = f"the limit of {self._max_fraction:g}", "pack the good ones again with `crate-ray prepare`"
        if self._setting is not None:
            limit, remedy = f"{self._setting} {self._max_fraction:g} allows", f"{remedy}, or raise {self._setting}"
        return (
            f"{self._bad} of {self._drawn} samples of {self._uri} are unusable, more than {limit} ({kinds}; the last "
            f"is {last.key!r}: {last.message}); {remedy}"
        )
