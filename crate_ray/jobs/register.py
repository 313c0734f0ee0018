"""The model registry: crate-ray register --run runs/mine, crate-ray register promote, crate-ray register list

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NoReturn

from rich.table import Table

from crate_ray.cli import command, run_subcommand
from crate_ray.config import ListConfig, PromoteConfig, RegisterConfig
from crate_ray.progress import console


def register(config: RegisterConfig) -> None:
    """Register a run's encoder or classifier, and print its version."""
    from crate_ray.tracking import registry

    version = registry.register(config.run, config.name, config.tracking, config.s3)
    kind, step = version.tags[registry.KIND_TAG], version.tags["step"]
    print(f"{config.name} version {version.version} is the {kind} of {config.run} (step {step})")
    if kind == "encoder":
        print(f"next: {command('register')} promote --version {version.version} --probe.train … --probe.test …")


def promote(config: PromoteConfig) -> None:
    """Probe a version and the champion on the same data, and promote the version unless it is worse."""
    from crate_ray.data.format.dataset import load_dataset
    from crate_ray.evaluation.probe import probe_encoder
    from crate_ray.runs.references import load_encoder
    from crate_ray.storage.interface import open_storage
    from crate_ray.tracking import registry

    train, test = (load_dataset(open_storage(uri, config.s3)) for uri in (config.probe.train, config.probe.test))
    champion = registry.champion_version(config.name, config.tracking)

    def accuracy(version: int) -> float:
        model, description = load_encoder(f"models:/{config.name}/{version}", config.tracking, config.s3)
        return probe_encoder(model, description, train, test, config.probe).accuracy

    new = accuracy(config.version)
    old = None if champion is None else new if champion == config.version else accuracy(champion)
    registry.promote(config.name, config.version, new, old, config.tracking)
    before = "there was none" if old is None else f"{old:.4f} for version {champion}"
    print(f"{config.name} version {config.version} is @{registry.CHAMPION}: probe accuracy {new:.4f} ({before} before)")


def show(config: ListConfig) -> None:
    """Print a table of the versions."""
    from crate_ray.tracking import registry

    table = Table(title=config.name)
    for heading in ("version", "alias", "probe accuracy", "step", "run", "registered"):
        table.add_column(heading)
    for version in registry.list_versions(config.name, config.tracking):
        tags = version.tags
        when = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        aliases = " ".join(f"@{alias}" for alias in version.aliases)
        accuracy = tags.get(registry.PROBE_TAG, "")
        table.add_row(str(version.version), aliases, accuracy, tags.get("step", ""), tags.get("run", ""), when)
    console().print(table)


def run() -> NoReturn:
    """Parse the command line and run the job."""
    run_subcommand(
        {
            "register": (RegisterConfig, register),
            "promote": (PromoteConfig, promote),
            "list": (ListConfig, show),
        },
        default="register",
    )
