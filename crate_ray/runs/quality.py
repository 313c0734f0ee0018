"""The measured quality of a run's checkpoints: <run>/quality/step-00000500.json, one file for each measured step."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from pydantic import FiniteFloat, ValidationError

from crate_ray.config import Settings
from crate_ray.errors import UserError, invalid_value
from crate_ray.storage.interface import Storage

logger = logging.getLogger(__name__)

_FOLDER = "quality/"
_NAME = re.compile(r"quality/step-([0-9]{8,18})\.json")


class Quality(Settings):
    """Measures of a checkpoint's features."""

    values: dict[str, FiniteFloat]
    """By the names of metrics; see runs.metrics."""
    best_by: str | None = None
    """Metric whose highest value makes a checkpoint the best one; None for the lowest validation loss."""


def write_quality(run: Storage, step: int, quality: Quality) -> None:
    """Write the quality of a step."""
    run.write(f"{_FOLDER}step-{step:08d}.json", quality.model_dump_json().encode())


def read_qualities(run: Storage) -> dict[int, Quality]:
    """The qualities of a run, by step. Those that cannot be read are left out, with a warning."""
    found = {}
    for info in run.list(_FOLDER):
        if (match := _NAME.fullmatch(info.key)) is None:
            continue
        try:
            found[int(match[1])] = Quality.model_validate_json(run.read_small(info.key))
        except (OSError, UserError, ValidationError) as error:
            cause = invalid_value(error) if isinstance(error, ValidationError) else error
            logger.warning("%s/%s is ignored: %s", run.uri, info.key, cause)
    return found


def ranking(qualities: Mapping[int, Quality]) -> list[int] | None:
    """Measured steps, the best first, if the newest measurement says by which value; else None.

    If values are equal, the later step comes first.
    """
    by = qualities[max(qualities)].best_by if qualities else None
    if by is None:
        return None
    rated = [(quality.values[by], step) for step, quality in qualities.items() if by in quality.values]
    return [step for _, step in sorted(rated, reverse=True)]
