"""Checks a sweep, runs it on Ray Tune or continues it, and logs it to MLflow."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from mlflow import MlflowClient
from ray import tune

from crate_ray.config import PretrainConfig, SweepConfig
from crate_ray.config.yaml_text import parse_number
from crate_ray.data.format.dataset import load_dataset
from crate_ray.errors import UserError
from crate_ray.runs.mlflow_lookup import absolute_tracking_uri, find_run, login, tracking_uri
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import NotFound, Storage, open_storage
from crate_ray.storage.lease import Lease
from crate_ray.sweeps.combinations import MAX_GRID, Values, grid_size, valid_combination
from crate_ray.sweeps.early_stopping import early_stopping
from crate_ray.sweeps.ends import RecordEnds
from crate_ray.sweeps.placement import connected_cluster, trial_scaling, why_too_large
from crate_ray.sweeps.report import SweepReport
from crate_ray.sweeps.search import TrialSearch
from crate_ray.sweeps.space import reference_config, shared_values, trial_config, why_invalid
from crate_ray.sweeps.summary import Summary
from crate_ray.sweeps.trial import TrialRecord, read_records, run_trial, write_record
from crate_ray.sweeps.warm_start import RECORD_FILE, warm_start
from crate_ray.tracking.pretraining import environment, source_tags
from crate_ray.tracking.run_tracker import RunTracker, flatten
from crate_ray.training.ray.internals import keep_credentials_here

# A trial reserves no CPUs, because its workers need them. Ray Tune refuses trials that reserve nothing.
_TRIAL_RESOURCES = {"memory": 2**20}
_MOST_TRIALS = 1000
"""Number of trials of a sweep that is limited by hours."""


class SweepResult(NamedTuple):
    """What a sweep has run and found."""

    records: list[TrialRecord]
    """Of all trials."""
    summary: Summary | None
    """None if there are no trials."""


def open_sweep(sweep: SweepConfig) -> tuple[SweepConfig, dict[str, Any]]:
    """Check a sweep and make its addresses absolute. Returns the sweep and the YAML values that its trials share.

    Starts nothing. Raises UserError for mistakes that would make every trial fail, such as missing datasets.
    """
    s3 = sweep.s3
    sweep = sweep.model_copy(
        update={
            "storage": open_storage(sweep.storage, s3).uri,
            "tracking": sweep.tracking.model_copy(update={"uri": absolute_tracking_uri(sweep.tracking)}),
        }
    )
    sweep = sweep.model_copy(update={"trials": _trials(sweep)})
    shared = shared_values(sweep)
    data = open_run(reference_config(sweep, shared)).config.data
    addresses = {"train": data.train, "validation": data.validation}
    shared = {**shared, "data": {**shared["data"], **{name: uri for name, uri in addresses.items() if uri}}}
    if sweep.probe:
        probe = {name: open_storage(getattr(sweep.probe, name), s3) for name in ("train", "test")}
        for storage in probe.values():
            load_dataset(storage)
        uris = {name: storage.uri for name, storage in probe.items()}
        sweep = sweep.model_copy(update={"probe": sweep.probe.model_copy(update=uris)})
    warm_start(sweep)
    return sweep, shared


def _trials(sweep: SweepConfig) -> int:
    """Largest number of trials."""
    size = grid_size(sweep)
    if sweep.sampler == "grid" and size is not None and size > MAX_GRID:
        raise UserError(
            f"the grid has {size:,} combinations, more than {MAX_GRID:,}; search fewer values, or use sampler tpe"
        )
    wanted = sweep.trials
    if "trials" not in sweep.model_fields_set:
        wanted = size if sweep.sampler == "grid" and size is not None else _MOST_TRIALS if sweep.hours else wanted
    return wanted if size is None else min(wanted, size)


def run_sweep(sweep: SweepConfig, shared: dict[str, Any]) -> SweepResult:
    """Run or continue a sweep that `open_sweep` has checked. Needs Ray.

    Reports go to the sweep's folder and to its MLflow run (see sweeps/report.py).

    Raises:
        UserError: another process runs this sweep.
    """
    folder = open_storage(sweep.storage, sweep.s3).under(sweep.name)
    seconds = reference_config(sweep, shared).scaling.lease_seconds
    with Lease(folder, "sweep.lease", f"sweep {sweep.name!r}", lease_seconds=seconds):
        return _run_sweep(sweep, shared, folder)


def _run_sweep(sweep: SweepConfig, shared: dict[str, Any], folder: Storage) -> SweepResult:
    key = _key(folder, sweep, shared)
    params = flatten(sweep.model_dump(mode="json", exclude_none=True))
    tracker = RunTracker(sweep.tracking, key, sweep.name, params, source_tags("sweep"))
    tracker.text("environment.txt", environment())
    tracker.check(is_new=not read_records(folder))
    report, summary = SweepReport(sweep, shared, folder, tracker), None
    status = "FAILED"
    try:
        with report.following():
            over = _run_trials(sweep, shared, folder, tracker.wait_for_run())
        records = read_records(folder)
        if records:
            summary = report.finish(records)
        _end_stopped_runs(sweep, records)
        ended = _ended(records)
        if over:
            print(f"the sweep ended after {ended} of {sweep.trials} trials: {over}")
        elif ended < sweep.trials:  # Ray Tune returns when it is interrupted
            print(f"stopped after {ended} of {sweep.trials} trials; the same command continues the sweep")
            raise KeyboardInterrupt
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if not tracker.finish(status):
            print(tracker.undelivered)
    return SweepResult(records, summary)


def _key(folder: Storage, sweep: SweepConfig, shared: dict[str, Any]) -> str:
    """Key of the sweep in MLflow.

    The settings are stored at the first start, and later ones are compared with them, unless no trial has started yet.
    """
    may_change = {"trials", "hours", "patience", "min_delta", "max_concurrent", "tracking"}
    may_change |= {"register_best", "base"}  # its content is in `shared`
    # Trials take these groups from the sweep, and in the base they may hold secrets.
    shared = {name: value for name, value in shared.items() if name not in ("tracking", "s3")}
    now = {"sweep": sweep.model_dump(mode="json", exclude=may_change), "shared": shared}
    now = json.loads(json.dumps(now, default=str))
    try:
        then = json.loads(folder.read_small(RECORD_FILE))
    except NotFound:
        then = _write_settings(folder, now)
    for name in ("tracking", "s3"):  # of earlier versions
        then["shared"].pop(name, None)
    # Earlier versions had fewer settings: the others have their defaults.
    earlier = SweepConfig.model_validate({**then["sweep"], "base": sweep.base})
    same = earlier.model_dump(mode="json", exclude=may_change) == now["sweep"]
    if not same or _numbers(then["shared"]) != _numbers(now["shared"]):
        if not read_records(folder):  # the first start failed, perhaps for the settings that were changed since
            return str(_write_settings(folder, now)["key"])
        raise UserError(
            f"sweep {sweep.name!r} at {sweep.storage} was started with other settings; choose another --name, or use "
            "the settings of its first start to continue it"
        )
    return str(then["key"])


def _write_settings(folder: Storage, settings: dict[str, Any]) -> dict[str, Any]:
    """Store the settings of a new sweep with a new key."""
    settings = {"key": uuid.uuid4().hex, **settings}
    folder.write(RECORD_FILE, json.dumps(settings, indent=2).encode())
    return settings


def _numbers(value: Any) -> Any:
    """A value with the texts in it that are numbers as numbers: earlier versions read 1e-4 as a text."""
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and (number := parse_number(value)) is not None:
        return number
    return value


def _run_trials(sweep: SweepConfig, shared: dict[str, Any], folder: Storage, parent_run: str) -> str:
    """Run the trials that remain; each writes its record. Ray Tune's own state is temporary.

    Returns why the sweep is over before its last trial; empty if it is not.
    """
    records = read_records(folder)
    remaining = sweep.trials - _ended(records)
    if remaining <= 0:
        return ""
    why_impossible, reference = _check_trials(sweep, shared)
    search = TrialSearch(sweep, records, why_impossible, lambda record: write_record(folder, record), warm_start(sweep))
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, sweep=sweep, shared=shared, parent_run=parent_run),
        _TRIAL_RESOURCES,
    )
    keep_credentials_here()
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other output of Ray Tune is not silent when it is told to be
    # They advise to restore Ray Tune's state, print tracebacks of failed trials, whose cause is in the record, and warn
    # of callbacks that take half a second.
    for name in ("tune", "analysis.experiment_analysis", "execution.tune_controller", "utils.util"):
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=remaining,
                max_concurrent_trials=sweep.max_concurrent,
                search_alg=search,
                scheduler=early_stopping(sweep, open_run(reference).total_steps, records),
            ),
            run_config=tune.RunConfig(
                name=sweep.name, storage_path=temporary, verbose=0, callbacks=[RecordEnds(folder)]
            ),
        )
        tuner.fit()
    return search.ended


def _ended(records: list[TrialRecord]) -> int:
    """Number of trials that ran and ended."""
    return sum(record.status not in ("running", "pruned") for record in records)


def _check_trials(sweep: SweepConfig, shared: dict[str, Any]) -> tuple[Callable[[Values], str], PretrainConfig]:
    """A function that says why a combination cannot work on this cluster, and settings of one that can.

    Raises:
        UserError: no combination can work, or the cluster has no room for so many trials at the same time.
    """
    cluster, reference = connected_cluster(), reference_config(sweep, shared)
    trial_scaling(reference.scaling, sweep.max_concurrent, cluster.nodes)

    def why_impossible(values: Values) -> str:
        if cause := why_invalid(sweep, shared, values):
            return cause
        config = trial_config(sweep, shared, values, "check")
        try:
            open_run(config)
        except UserError as error:
            open_run(reference)  # raises an error that has nothing to do with the combination
            return str(error)
        return why_too_large(config, sweep.max_concurrent, cluster)

    try:
        values = valid_combination(sweep, why_impossible)
    except UserError as error:
        raise UserError(f"no combination of the searched values can work: {error}") from None
    return why_impossible, trial_config(sweep, shared, values, "check")


def _end_stopped_runs(sweep: SweepConfig, records: list[TrialRecord]) -> None:
    """Set the MLflow status of trials that could not set it themselves, because Ray Tune ended their process."""
    client = MlflowClient(login(tracking_uri(sweep.tracking)))
    ends = {"stopped early": "KILLED", "failed": "FAILED", "running": "KILLED"}
    for record in records:
        run_id = find_run(client, record.run_key) if record.status in ends and record.run_key else None
        if run_id:
            client.set_terminated(run_id, ends[record.status])
