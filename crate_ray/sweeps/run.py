"""Checks a sweep, runs it on Ray Tune or continues it, and logs it to MLflow."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import uuid
from typing import Any

from mlflow import MlflowClient
from ray import tune

from crate_ray.addresses import redact
from crate_ray.config import SweepConfig
from crate_ray.config.yaml_text import dump_yaml, parse_number
from crate_ray.data.format.dataset import load_dataset
from crate_ray.errors import UserError
from crate_ray.runs.mlflow_lookup import find_run, login, tracking_uri
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import NotFound, Storage, open_storage
from crate_ray.storage.lease import Lease
from crate_ray.sweeps.report import best_trial, picture, results_table
from crate_ray.sweeps.search import TrialSearch, early_stopping
from crate_ray.sweeps.space import shared_values, trial_config
from crate_ray.sweeps.trial import TrialRecord, read_records, run_trial, write_record
from crate_ray.tracking.pretraining import source_tags
from crate_ray.tracking.run_tracker import RunTracker, flatten
from crate_ray.training.ray.internals import keep_credentials_here

RECORD_FILE, BEST_FILE, RESULTS_FILE = "sweep.json", "best.yaml", "results.csv"
# A trial reserves no CPUs, because its workers need them. Ray Tune refuses trials that reserve nothing.
_TRIAL_RESOURCES = {"memory": 2**20}


def open_sweep(sweep: SweepConfig) -> tuple[SweepConfig, dict[str, Any]]:
    """Check a sweep and make its addresses absolute. Returns the sweep and the YAML values that its trials share.

    Starts nothing. Raises UserError for mistakes that would make every trial fail, such as missing datasets.
    """
    s3 = sweep.s3
    sweep = sweep.model_copy(
        update={
            "storage": open_storage(sweep.storage, s3).uri,
            "tracking": sweep.tracking.model_copy(update={"uri": tracking_uri(sweep.tracking)}),
        }
    )
    shared = shared_values(sweep)
    data = open_run(trial_config(sweep, shared, {}, "check")).config.data
    addresses = {"train": data.train, "validation": data.validation}
    shared = {**shared, "data": {**shared["data"], **{name: uri for name, uri in addresses.items() if uri}}}
    if sweep.probe:
        probe = {name: open_storage(getattr(sweep.probe, name), s3) for name in ("train", "test")}
        for storage in probe.values():
            load_dataset(storage)
        uris = {name: storage.uri for name, storage in probe.items()}
        sweep = sweep.model_copy(update={"probe": sweep.probe.model_copy(update=uris)})
    return sweep, shared


def run_sweep(sweep: SweepConfig, shared: dict[str, Any]) -> list[TrialRecord]:
    """Run or continue a sweep that `open_sweep` has checked. Needs Ray. Returns the record of every trial.

    Writes results.csv and best.yaml to the sweep's folder, and both with a picture to its MLflow run. Raises UserError
    if another process runs this sweep.
    """
    folder = open_storage(sweep.storage, sweep.s3).under(sweep.name)
    seconds = trial_config(sweep, shared, {}, "check").scaling.lease_seconds
    with Lease(folder, "sweep.lease", f"sweep {sweep.name!r}", lease_seconds=seconds):
        return _run_sweep(sweep, shared, folder)


def _run_sweep(sweep: SweepConfig, shared: dict[str, Any], folder: Storage) -> list[TrialRecord]:
    key = _key(folder, sweep, shared)
    params = flatten(sweep.model_dump(mode="json"))
    tracker = RunTracker(sweep.tracking, key, sweep.name, params, source_tags("sweep"))
    status = "FAILED"
    try:
        _run_trials(sweep, shared, folder, tracker.wait_for_run())
        records = read_records(folder)
        if records:
            _report(sweep, shared, folder, records, tracker)
        _end_stopped_runs(sweep, records)
        ended = sum(record.status != "running" for record in records)
        if ended < sweep.trials:  # Ray Tune returns when it is interrupted
            print(f"stopped after {ended} of {sweep.trials} trials; the same command continues the sweep")
            raise KeyboardInterrupt
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if not tracker.finish(status):
            print(tracker.undelivered)
    return records


def _report(
    sweep: SweepConfig, shared: dict[str, Any], folder: Storage, records: list[TrialRecord], tracker: RunTracker
) -> None:
    table = results_table(records, sweep).to_csv(index=False)
    folder.write(RESULTS_FILE, table.encode())
    tracker.text(RESULTS_FILE, table)
    best = best_trial(records, sweep)
    if best is None or best.objective is None:
        return
    tracker.picture(len(records), "objective", picture(records, sweep))
    text = best_yaml(sweep, shared, best)
    folder.write(BEST_FILE, text.encode())
    tracker.text(BEST_FILE, text)
    tracker.metrics(len(records), {f"best_{sweep.objective}": best.objective}, int(time.time() * 1000))


def best_yaml(sweep: SweepConfig, shared: dict[str, Any], best: TrialRecord) -> str:
    """The best trial's complete pretraining settings, as a file for crate-ray pretrain --config."""
    config = trial_config(sweep, shared, best.values, f"{sweep.name}-best")
    settings = config.model_dump(mode="json") | {"storage": sweep.storage}
    head = f"# Best of sweep {sweep.name}: {sweep.objective} {best.objective:.6g} (trial {best.trial})\n"
    return head + dump_yaml(settings)


def _key(folder: Storage, sweep: SweepConfig, shared: dict[str, Any]) -> str:
    """Key of the sweep in MLflow. The settings are stored at the first start, and compared with at later ones."""
    may_change = {"trials", "max_concurrent", "tracking", "base"}  # the content of the base is in `shared`
    # Trials take these groups from the sweep, and in the base they may hold secrets.
    shared = {name: value for name, value in shared.items() if name not in ("tracking", "s3")}
    now = {"sweep": sweep.model_dump(mode="json", exclude=may_change), "shared": shared}
    now = json.loads(json.dumps(now, default=str))
    try:
        then = json.loads(folder.read_small(RECORD_FILE))
    except NotFound:
        then = {"key": uuid.uuid4().hex, **now}
        folder.write(RECORD_FILE, json.dumps(then, indent=2).encode())
    for name in ("tracking", "s3"):  # of earlier versions
        then["shared"].pop(name, None)
    # Earlier versions had fewer settings: the others have their defaults.
    earlier = SweepConfig.model_validate({**then["sweep"], "base": sweep.base})
    same = earlier.model_dump(mode="json", exclude=may_change) == now["sweep"]
    if not same or _numbers(then["shared"]) != _numbers(now["shared"]):
        raise UserError(
            f"sweep {sweep.name!r} at {sweep.storage} was started with other settings; choose another --name, or use "
            "the settings of its first start to continue it"
        )
    return str(then["key"])


def _numbers(value: Any) -> Any:
    """A value with the texts in it that are numbers as numbers: earlier versions read 1e-4 as a text."""
    if isinstance(value, dict):
        return {name: _numbers(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and (number := parse_number(value)) is not None:
        return number
    return value


def _run_trials(sweep: SweepConfig, shared: dict[str, Any], folder: Storage, parent_run: str) -> None:
    """Run the trials that remain; each writes its record. Ray Tune's own state is temporary."""
    records = read_records(folder)
    remaining = sweep.trials - sum(record.status != "running" for record in records)
    if remaining <= 0:
        return
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, sweep=sweep, shared=shared, parent_run=parent_run),
        _TRIAL_RESOURCES,
    )
    keep_credentials_here()
    for name in ("tune", "analysis.experiment_analysis"):  # they advise to restore Ray Tune's state
        logging.getLogger(f"ray.tune.{name}").setLevel(logging.ERROR)
    total_steps = open_run(trial_config(sweep, shared, {}, "check")).total_steps
    with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
        tuner = tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                num_samples=remaining,
                max_concurrent_trials=sweep.max_concurrent,
                search_alg=TrialSearch(sweep, records),
                scheduler=early_stopping(sweep, total_steps, records),
            ),
            run_config=tune.RunConfig(name=sweep.name, storage_path=temporary, verbose=1),
        )
        _record_ends(folder, tuner.fit())


def _record_ends(folder: Storage, grid: tune.ResultGrid) -> None:
    """Add to the records which trials Ray Tune stopped early, and which trials' processes died."""
    records = {record.trial: record for record in read_records(folder)}
    for result in grid:
        if not result.config:
            continue
        # A process that died at its start has written no record.
        record = records.get(result.config["trial"]) or TrialRecord.model_validate(result.config)
        if record.status != "running":
            continue
        if result.error is not None:
            cause = redact(str(result.error).strip().splitlines()[-1])
            write_record(folder, record.model_copy(update={"status": "failed", "cause": cause}))
        elif (result.metrics or {}).get("done"):  # else the sweep was interrupted
            write_record(folder, record.model_copy(update={"status": "stopped early"}))


def _end_stopped_runs(sweep: SweepConfig, records: list[TrialRecord]) -> None:
    """Set the MLflow status of trials that could not set it themselves, because Ray Tune ended their process."""
    client = MlflowClient(login(tracking_uri(sweep.tracking)))
    ends = {"stopped early": "KILLED", "failed": "FAILED", "running": "KILLED"}
    for record in records:
        run_id = find_run(client, record.run_key) if record.status in ends and record.run_key else None
        if run_id:
            client.set_terminated(run_id, ends[record.status])
