"""The decision on a promotion, as it is recorded on a version: what was measured on which samples, and what follows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from crate_ray.config import Record
from crate_ray.config.identifiers import Count, Sha256

CHAMPION = "champion"
"""The alias."""

Measure = Literal["probe", "knn", "rank", "top1"]

TITLES: dict[Measure, str] = {
    "probe": "probe accuracy",
    "knn": "k-NN accuracy",
    "rank": "effective rank",
    "top1": "top-1 accuracy",
}


class Data(Record):
    """A labelled dataset, and how much of it was used."""

    uri: str
    """Its address."""
    digest: Sha256
    """Digest of its manifest."""
    samples: Count
    """Number of samples that were used."""

    @property
    def title(self) -> str:
        """For tables: the end of the address, the start of the digest, the number of samples."""
        return f"{'/'.join(self.uri.rstrip('/').split('/')[-2:])} {self.digest[:8]} ({self.samples})"


class Check(Record):
    """A version against a rival, by one measure on the same samples."""

    measure: Measure
    """What was measured."""
    rival: str
    """The other one: a version, the untrained encoder, raw pixels, or the most frequent class."""
    value: float
    """The version's."""
    rival_value: float
    """The rival's."""
    low: float
    """Lower end of the one-sided 95 % interval of the difference; for the rank, of the relative difference."""
    above: float
    """The lower end must be above this."""
    only_version: Count | None = None
    """Samples that only the version classifies correctly."""
    only_rival: Count | None = None
    """Samples that only the rival classifies correctly."""

    @property
    def passed(self) -> bool:
        """Whether the version passes."""
        return self.low > self.above

    @property
    def refusal(self) -> str:
        """Why it does not pass."""
        digits = 1 if self.measure == "rank" else 4
        enough = "above it" if self.above == 0 else f"at most {-self.above:g} below it"
        return (
            f"its {TITLES[self.measure]} {self.value:.{digits}f} against {self.rival_value:.{digits}f} of {self.rival} "
            f"is not shown to be {enough} (the difference is {self.low:+.4f} or more, with 95 % confidence)"
        )


class Decision(Record):
    """Whether a version becomes the champion, and why."""

    version: int
    """The version."""
    champion: int | None
    """Version that it was compared with; None for the first champion."""
    at: str
    """Date and time, UTC."""
    train: Data | None
    """Data that the probe was fitted on; None for classifiers."""
    test: Data
    """Data that all numbers were measured on."""
    margin: float
    """How much worse it may be than the champion."""
    checks: tuple[Check, ...] = Field(min_length=1)
    """All of them must pass."""
    values: dict[Measure, float]
    """The version's numbers."""
    champion_values: dict[Measure, float] = Field(default_factory=dict)
    """The champion's numbers."""
    settings: dict[str, str | int | None] = Field(default_factory=dict)
    """Settings of the probe."""
    notes: tuple[str, ...] = ()
    """What limits the meaning of the numbers."""
    forced: str | None = None
    """Reason for a promotion by force."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def promoted(self) -> bool:
        """Whether the version becomes the champion."""
        return self.passed or self.forced is not None

    @property
    def refusal(self) -> str:
        """Why the version is not promoted, in one sentence."""
        failed = "; ".join(check.refusal for check in self.checks if not check.passed)
        return f"{failed}; measured on {self.test.samples} samples of {self.test.uri}"

    def to_json(self) -> str:
        """The tag's value."""
        return self.model_dump_json()

    @classmethod
    def parse(cls, text: str | None) -> Decision | None:
        """The decision in a tag; None if there is none, or it is not one."""
        try:
            return cls.model_validate_json(text) if text else None
        except ValidationError:
            return None
