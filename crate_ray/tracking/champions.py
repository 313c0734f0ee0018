"""The alias @champion of a registered model: who has it, who had it before, promotion and rollback."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, TypeAdapter, ValidationError

from crate_ray.config import Record, TrackingConfig
from crate_ray.errors import UserError
from crate_ray.runs.mlflow_lookup import first_line, open_client
from crate_ray.tracking.card import update_card
from crate_ray.tracking.decision import CHAMPION, Decision, Measure
from crate_ray.tracking.model_lock import locked
from crate_ray.tracking.registry import DATA_TAG, DECISION_TAG, MEASURE_TAGS, list_versions

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

HISTORY_TAG = "crate_ray.champions"
ROLLED_BACK_TAG = "crate_ray.rolled_back"
_LOGGED_MODEL = re.compile(r"models:/(m-[0-9a-f]+)")
_REMEMBERED = 30  # MLflow's databases hold 5000 characters of a registered model's tag


class Promotion(Record):
    """A version became the champion."""

    version: int
    """The version."""
    at: Annotated[str, Field(max_length=40)]
    """When, UTC."""
    forced: bool = False
    """Whether it did not pass the gate."""


_HISTORY = TypeAdapter(tuple[Promotion, ...])


@dataclass(frozen=True)
class Champions:
    """Champions of a registered model, as MLflow has them."""

    current: int | None
    """Version with the alias."""
    history: tuple[Promotion, ...]
    """Champions in the order in which they were promoted, without those that were rolled back."""
    existing: frozenset[int]
    """All versions that exist."""

    def rival_of(self, version: int) -> int | None:
        """Version that another one must be compared with: the champion, else the last one that was not deleted."""
        return self.current if self.current is not None else self.before(version)[0]

    def before(self, version: int | None) -> tuple[int | None, tuple[int, ...]]:
        """The last champion, other than a version, that still exists, and the deleted ones that came after it."""
        deleted: list[int] = []
        for promotion in reversed(self.history):
            if promotion.version == version:
                continue
            if promotion.version in self.existing:
                return promotion.version, tuple(deleted)
            deleted.append(promotion.version)
        return None, tuple(deleted)


def read_champions(name: str, tracking: TrackingConfig) -> Champions:
    """Read the alias and its history.

    Raises:
        UserError: there is no such registered model.
    """
    versions = list_versions(name, tracking)
    current = next((int(version.version) for version in versions if CHAMPION in version.aliases), None)
    text = open_client(tracking).get_registered_model(name).tags.get(HISTORY_TAG)
    try:
        history = _HISTORY.validate_json(text) if text else ()
    except ValidationError:
        logger.warning("the tag %s of %s is not a history of champions; it is started anew", HISTORY_TAG, name)
        history = ()
    return Champions(current, history, frozenset(int(version.version) for version in versions))


def promote(name: str, decision: Decision, seen: Champions, tracking: TrackingConfig) -> None:
    """Record a decision on its version, and give the version the alias if the decision is to promote it.

    Args:
        name: name of the registered model.
        decision: what was measured against the champion in `seen`.
        seen: the champions before it was measured.
        tracking: where MLflow is.

    Raises:
        UserError: the version is not promoted, because it did not pass, or because the champion has changed since.
    """
    client, version = open_client(tracking), decision.version
    _record(client, name, decision)
    if decision.promoted:
        with locked(client, name) as check:
            now = read_champions(name, tracking)
            if (now.current, now.history) != (seen.current, seen.history):
                which = "there is no @champion" if now.current is None else f"version {now.current} is @champion"
                raise UserError(
                    f"{name} version {version} is not promoted: {which} now, which was not so when it was measured; "
                    "run the command again"
                )
            history = now.history
            if now.current is not None and (not history or history[-1].version != now.current):
                history += (Promotion(version=now.current, at="before"),)  # by hand, or by an earlier release
            check()
            client.set_registered_model_alias(name, CHAMPION, str(version))
            _write_history(client, name, (*history, Promotion(version=version, at=_now(), forced=not decision.passed)))
    update_card(client, name, version)
    if not decision.promoted:
        raise UserError(
            f"{name} version {version} is not promoted: {decision.refusal}; test on more samples, allow a --margin, or "
            "override with --force true --reason TEXT"
        )


def rollback(name: str, tracking: TrackingConfig) -> tuple[int | None, int, tuple[int, ...]]:
    """Give the alias back to the champion before.

    Returns:
        The version that had the alias, the one that has it now, and deleted champions in between.

    Raises:
        UserError: there is no earlier champion.
    """
    client = open_client(tracking)
    read_champions(name, tracking)  # before a lock on what does not exist
    with locked(client, name) as check:
        now = read_champions(name, tracking)
        target, deleted = now.before(now.current)
        if target is None:
            gone = f" (deleted: {', '.join(map(str, deleted))})" if deleted else ""
            raise UserError(f"{name} has no champion before to go back to{gone}; promote a version instead")
        at = max(i for i, promotion in enumerate(now.history) if promotion.version == target)
        check()
        client.set_registered_model_alias(name, CHAMPION, str(target))
        _write_history(client, name, now.history[: at + 1])
        if now.current is not None:
            client.set_model_version_tag(name, str(now.current), ROLLED_BACK_TAG, _now())
    for version in (now.current, target):
        if version is not None:
            update_card(client, name, version)
    return now.current, target, deleted


def _record(client: MlflowClient, name: str, decision: Decision) -> None:
    """Tag a version with a decision, and both versions with their numbers and the data that they were measured on."""
    client.set_model_version_tag(name, str(decision.version), DECISION_TAG, decision.to_json())
    _log(client, name, decision, decision.version, decision.values)
    if decision.champion is not None:
        _log(client, name, decision, decision.champion, decision.champion_values)


def _log(client: MlflowClient, name: str, decision: Decision, version: int, values: dict[Measure, float]) -> None:
    """Tag a version with its numbers, and log them as metrics of its logged model."""
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    for measure, value in values.items():
        client.set_model_version_tag(name, str(version), MEASURE_TAGS[measure], f"{value:.4f}")
    client.set_model_version_tag(name, str(version), DATA_TAG, decision.test.title)
    found, test = client.get_model_version(name, str(version)), decision.test
    if not found.run_id:
        return
    model = _LOGGED_MODEL.fullmatch(found.source or "")  # MLflow's own servers leave `model_id` empty
    step, now = int(found.tags.get("step") or 0), int(time.time() * 1000)
    label = re.sub(r"[^\w.-]+", "-", test.title.partition(" (")[0])
    metrics = [
        Metric(
            f"promotion/{label}/{MEASURE_TAGS[measure].removeprefix('crate_ray.')}",
            value,
            now,
            step,
            model_id=model[1] if model else None,
            dataset_name=test.uri,
            dataset_digest=test.digest[:32],
            run_id=found.run_id,
        )
        for measure, value in values.items()
    ]
    try:
        client.log_batch(found.run_id, metrics=metrics)
    except MlflowException as error:  # the run was deleted; the tags have the numbers
        logger.warning("the numbers could not be logged to the run of version %d: %s", version, first_line(error))


def _write_history(client: MlflowClient, name: str, history: tuple[Promotion, ...]) -> None:
    client.set_registered_model_tag(name, HISTORY_TAG, _HISTORY.dump_json(history[-_REMEMBERED:]).decode())


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
