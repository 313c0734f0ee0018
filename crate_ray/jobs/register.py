"""The model registry: crate-ray register --run runs/mine, crate-ray register promote, …

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NoReturn

from rich.table import Table

from crate_ray.cli import command, run_subcommand
from crate_ray.config import CardConfig, ListConfig, PromoteConfig, RegisterConfig, RollbackConfig
from crate_ray.errors import UserError
from crate_ray.output import visible
from crate_ray.progress import console
from crate_ray.tracking.decision import CHAMPION, TITLES, Decision

_VERDICTS = {(True, True): "passed", (False, True): "by force", (False, False): "refused"}
"""By whether a decision passed, and whether it promoted."""


def register(config: RegisterConfig) -> None:
    """Register a run's encoder or classifier, and print its version."""
    from crate_ray.tracking import registry

    version = registry.register(config.run, config.name, config.tracking, config.s3)
    kind, step = version.tags[registry.KIND_TAG], version.tags["step"]
    print(f"{config.name} version {version.version} is the {kind} of {config.run} (step {step})")
    if kind == "encoder":
        print(f"next: {command('register')} promote --version {version.version} --probe.train … --probe.test …")


def promote(config: PromoteConfig) -> None:
    """Compare a version with the champion on the same samples, and promote it if it passes."""
    from crate_ray.data.format.dataset import load_dataset
    from crate_ray.evaluation import gate
    from crate_ray.models.classifier import Classifier
    from crate_ray.runs.references import load
    from crate_ray.storage.interface import open_storage
    from crate_ray.tracking import champions

    name, version = config.name, config.version
    seen = champions.read_champions(name, config.tracking)
    if version not in seen.existing:
        raise UserError(f"{name} has no version {version}; it has {', '.join(map(str, sorted(seen.existing)))}")
    if version == seen.current:
        print(f"{name} version {version} is @{CHAMPION} already")
        return
    test = load_dataset(open_storage(config.probe.test, config.s3))

    def loaded(number: int) -> gate.Version:
        return gate.Version(number, *load(f"models:/{name}/{number}", config.tracking, config.s3))

    new = loaded(version)
    rival = seen.rival_of(version)
    old = None if rival is None else loaded(rival)
    if isinstance(new.model, Classifier):
        decision = gate.judge_classifiers(new, old, test, config)
    elif config.probe.train:
        train = load_dataset(open_storage(config.probe.train, config.s3))
        decision = gate.judge_encoders(new, old, train, test, config)
    else:
        raise UserError(f"{name} version {version} is an encoder; give labelled data for its probe as --probe.train")
    for note in decision.notes:
        print(f"note: {note}")
    champions.promote(name, decision, seen, config.tracking)
    numbers = ", ".join(
        f"{TITLES[check.measure]} {check.value:.4g} against {check.rival_value:.4g} of {check.rival}"
        for check in decision.checks
    )
    how = "" if decision.passed else f" by force ({decision.forced})"
    print(f"{name} version {version} is @{CHAMPION}{how}: {numbers}, on {decision.test.samples} samples")


def rollback(config: RollbackConfig) -> None:
    """Give the alias @champion back to the champion before."""
    from crate_ray.tracking import champions

    before, now, deleted = champions.rollback(config.name, config.tracking)
    for version in deleted:
        print(f"version {version} was deleted; it is skipped")
    instead = "" if before is None else f" again, instead of version {before}"
    print(f"{config.name} version {now} is @{CHAMPION}{instead}")


def card(config: CardConfig) -> None:
    """Print the model card of a version."""
    from crate_ray.runs.mlflow_lookup import open_client
    from crate_ray.tracking.card import model_card
    from crate_ray.tracking.registry import find_version

    version = find_version(config.name, config.version, config.tracking)
    print(model_card(open_client(config.tracking), version), end="")


def show(config: ListConfig) -> None:
    """Print a table of the versions."""
    from crate_ray.tracking import registry

    versions = registry.list_versions(config.name, config.tracking)
    measures = [m for m, tag in registry.MEASURE_TAGS.items() if any(tag in version.tags for version in versions)]
    table = Table(title=config.name)
    headings = [TITLES[measure] for measure in measures]
    table.add_column("version")
    table.add_column("alias", no_wrap=True)
    for heading in (*headings, "measured on", "promotion", "step", "run", "registered"):
        table.add_column(heading)
    for version in versions:
        tags = version.tags
        when = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        aliases = " ".join(f"@{alias}" for alias in version.aliases)
        numbers = [tags.get(registry.MEASURE_TAGS[measure], "") for measure in measures]
        data = tags.get(registry.DATA_TAG, "not recorded" if any(numbers) else "")
        decision = Decision.parse(tags.get(registry.DECISION_TAG))
        verdict = "" if decision is None else _VERDICTS[decision.passed, decision.promoted]
        cells = (*numbers, data, verdict, tags.get("step", ""), tags.get("run", ""), when)
        table.add_row(str(version.version), aliases, *map(visible, cells))
    console().print(table)


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_subcommand(
        {
            "register": (RegisterConfig, register),
            "promote": (PromoteConfig, promote),
            "rollback": (RollbackConfig, rollback),
            "list": (ListConfig, show),
            "card": (CardConfig, card),
        },
        default="register",
    )
