"""The whole thread on a real cluster: shards in S3, jobs submitted with a token, records and models in MLflow."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from crate_ray import load_model
from crate_ray.config import PretrainConfig, ProbeConfig, S3Config, TrackingConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.evaluation.probe import probe_encoder
from crate_ray.runs import metrics
from crate_ray.runs.references import load_encoder
from crate_ray.serving import FeatureExtractor
from crate_ray.storage.interface import Storage, open_storage
from tests.integration.conftest import LocalCluster
from tests.jobs import RAY, ROOT, call, job, newest_commit

pytestmark = pytest.mark.ray

STEPS, EVERY = 60, 15
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = {"image_size": 8, "patch_size": 2, "channels": 1, "dim": 64, "depth": 2, "num_subspaces": 4, "mask_ratio": 0.5}


@pytest.fixture(scope="module")
def cluster(local_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """The cluster with the digits in its bucket, and its addresses in this process's environment too."""
    before = dict(os.environ)
    os.environ.update({**local_cluster.env, "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required"})
    for split in ("train", "test"):
        run_here("prepare", "--source", "digits", "--split", split, "--output", f"s3://data/digits-{split}")
    yield local_cluster
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def trained(cluster: LocalCluster) -> str:
    """Folder of a finished run, which was submitted as a job."""
    done = subprocess.run(pretraining("digits"), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return "s3://runs/digits"


def pretraining(name: str) -> list[str]:
    """`ray job submit` with a run of this name."""
    config = {
        "name": name,
        "storage": "s3://runs",
        "model": MODEL,
        "data": {"train": "s3://data/digits-train", "validation": "s3://data/digits-test", "flip": False},
        "training": {"batch_size": 64, "steps": STEPS},
        "optim": {"lr": 0.003},
        "scaling": {"workers": 2, "cpus_per_worker": 1},
        "checkpoint": {"every_steps": EVERY},
        "probe": {"train": "s3://data/digits-train", "test": "s3://data/digits-test", "max_samples": 300},
        "tracking": {"experiment": "it" if name == "digits" else name, "picture_every": 30},
    }
    settings = [f"--{setting}={value}" for setting, value in flat(config).items()]
    return [*ray_job_submit(), "--", "python", "jobs/pretrain.py", *settings]


@pytest.mark.daily
def test_ray_job_stop_saves_a_checkpoint_and_the_same_job_resumes(cluster: LocalCluster, tmp_path: Path) -> None:
    """`ray job stop` is a SIGTERM; what the driver does on it, tests/faults/test_stop.py checks on each CI run."""
    run = open_storage("s3://runs/stopped", S3Config())
    stop_job(pretraining("stopped"), cluster, run, tmp_path / "log")
    stopped_at = newest_commit(run)
    again = subprocess.run(pretraining("stopped"), capture_output=True, text=True, timeout=500, check=False)
    assert again.returncode == 0, (again.stdout + again.stderr)[-4000:]
    assert f"resuming at step {stopped_at}" in again.stdout


def stop_job(command: list[str], cluster: LocalCluster, run: Storage, log: Path) -> None:
    """Start a run as a job and stop it after its first checkpoint; require that it saved another one first."""
    with log.open("wb") as output:
        submitted = subprocess.Popen(command, stdout=output, stderr=output)
    workers: list[psutil.Process] = []
    try:
        wait_until(lambda: len(workers_of(cluster)) == 2, "no workers", submitted)
        workers = workers_of(cluster)
        wait_until(lambda: newest_commit(run), "no checkpoint", submitted)
        for worker in workers:  # else they would be done before the command has started
            worker.suspend()
        regular = newest_commit(run)
        (job_id,) = re.findall(r"Job '(\S+)' submitted successfully", log.read_text())
        stop = subprocess.Popen([RAY, "job", "stop", job_id], stdout=subprocess.PIPE, text=True)
        wait_until(lambda: "stopping: a checkpoint is saved first" in log.read_text(), "not stopping", submitted)
    finally:
        for worker in workers:
            worker.resume()
    assert "was stopped" in stop.communicate(timeout=100)[0]
    # They were some steps further: a checkpoint is committed after they have gone on.
    assert regular < newest_commit(run) < STEPS, log.read_text()[-3000:]
    assert not run.exists("driver.lease")
    submitted.wait(30)


def test_run_is_in_mlflow_with_everything_that_explains_it(cluster: LocalCluster, trained: str, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(cluster.env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("it")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.crate_ray.job = 'pretrain'")
    assert run.info.status == "FINISHED"
    assert run.data.params["model.num_subspaces"] == "4"
    assert run.data.params["data.train"] == "s3://data/digits-train"
    assert run.data.tags["mlflow.source.git.commit"] == COMMIT
    losses = {m.step: m.value for m in client.get_metric_history(run.info.run_id, metrics.LOSS)}
    assert losses[STEPS] < 0.8 * losses[10]
    assert run.data.metrics[metrics.VALIDATION_LOSS] < losses[10]
    told_of_steps(client, run.info.run_id)
    told_of_quality(client, run.info.run_id)
    (dataset,) = run.inputs.dataset_inputs
    assert (
        dataset.dataset.digest
        == load_dataset(open_storage("s3://data/digits-train", S3Config())).manifest.digest()[:32]
    )
    pictures = [f.path for f in client.list_artifacts(run.info.run_id, "reconstruction")]
    assert f"reconstruction/step-{STEPS:08d}.png" in pictures
    with Image.open(client.download_artifacts(run.info.run_id, pictures[-1], str(tmp_path))) as picture:
        assert picture.size == (8 * 100 + 4, 3 * 100 + 4)
    environment = Path(client.download_artifacts(run.info.run_id, "environment.txt", str(tmp_path))).read_text()
    assert "torch==" in environment
    # No secret of the cluster has found its way into MLflow.
    for secret in ("AWS_SECRET_ACCESS_KEY",):
        assert cluster.env[secret] not in json.dumps(run.to_dictionary()) + environment


def told_of_quality(client: mlflow.MlflowClient, run_id: str) -> None:
    """Require that the last checkpoint's features were measured, and are what a probe of the finished run finds."""
    probe = ProbeConfig(train="s3://data/digits-train", test="s3://data/digits-test", max_samples=300)
    train, test = (load_dataset(open_storage(uri, S3Config())) for uri in (probe.train, probe.test))
    model, description = load_encoder("s3://runs/digits", TrackingConfig(), S3Config())
    expected = probe_encoder(model, description, train, test, probe).accuracy
    for name, low, high in (
        (metrics.PROBE_ACCURACY, expected - 0.02, expected + 0.02),
        (metrics.KNN_ACCURACY, 0.2, 1.0),
        (metrics.EFFECTIVE_RANK, 1.0, 64.0),
    ):
        values = {m.step: m.value for m in client.get_metric_history(run_id, name)}
        assert STEPS in values and all(step % EVERY == 0 for step in values)
        assert low <= values[STEPS] <= high, name


def told_of_steps(client: mlflow.MlflowClient, run_id: str) -> None:
    """Require that training logs its metrics at every log step, with plausible values."""
    names = (metrics.IMAGES_PER_SECOND, metrics.STEP_SECONDS, metrics.DATA_WAIT_SHARE, metrics.LOGGING_SHARE)
    names += (metrics.GRADIENT_NORM, metrics.MEMORY_BYTES, metrics.LR, metrics.SKIPPED_STEPS, metrics.LOSS_SPIKES)
    names += (metrics.BATCH_DIGEST,)
    found = {name: {m.step: m.value for m in client.get_metric_history(run_id, name)} for name in names}
    assert all(values.keys() == set(range(10, STEPS + 1, 10)) for values in found.values())
    for step in range(10, STEPS + 1, 10):
        of = {name: values[step] for name, values in found.items()}
        assert 0 < of[metrics.GRADIENT_NORM] < 100 and 0 <= of[metrics.LR] <= 0.003 and of[metrics.SKIPPED_STEPS] == 0
        assert (
            of[metrics.IMAGES_PER_SECOND] * of[metrics.STEP_SECONDS] == pytest.approx(64)
            and 1e-4 < of[metrics.STEP_SECONDS] < 60
        )
        assert 0 <= of[metrics.DATA_WAIT_SHARE] < 1 and 0 < of[metrics.LOGGING_SHARE] < 1
        assert of[metrics.DATA_WAIT_SHARE] + of[metrics.LOGGING_SHARE] < 1
        assert 2**26 < of[metrics.MEMORY_BYTES] < psutil.virtual_memory().total
        assert (
            of[metrics.BATCH_DIGEST] == int(of[metrics.BATCH_DIGEST])
            and len(set(found[metrics.BATCH_DIGEST].values())) == 6
        )
    assert metrics.MFU not in client.get_run(run_id).data.metrics  # of a CPU the peak is not known
    for name in (metrics.CHECKPOINT_BLOCKING_SECONDS, metrics.CHECKPOINT_BACKGROUND_SECONDS):
        seconds = {m.step: m.value for m in client.get_metric_history(run_id, name)}
        assert STEPS in seconds and seconds.keys() <= set(range(EVERY, STEPS + 1))
        assert all(0 < value < 60 for value in seconds.values())


def test_registry_gate_and_embeddings(cluster: LocalCluster, trained: str, tmp_path: Path) -> None:
    probe = ["--probe.train", "s3://data/digits-train", "--probe.test", "s3://data/digits-test"]
    run_here("register", "register", "--run", trained)
    # A probe of the pixels of these small digits is hard to beat.
    assert "of raw pixels is not shown to be above it" in fail_here("register", "promote", "--version", "1", *probe)
    said = run_here("register", "promote", "--version", "1", *probe, "--force", "true", "--reason", "a test")
    assert "version 1 is @champion by force (a test)" in said
    assert "@champion" in run_here("register", "list")

    # The report of a run in S3 is written beside it.
    run_here("evaluate", "--model", trained, "--data", "s3://data/digits-test", "--max_images", "16")
    assert json.loads(open_storage(trained, S3Config()).read("evaluation/report.json"))["reconstruction"]

    # Torch module, pyfunc and the run's own encoder give the same embeddings.
    shards = load_dataset(open_storage("s3://data/digits-test", S3Config()))
    own, description = load_encoder(trained, TrackingConfig(), S3Config())
    batch = next(iterate_dataset(shards, description.model))
    expected = FeatureExtractor(own, description)(batch.images).numpy()
    champion = load_model("models:/crate-mae@champion")
    assert np.abs(FeatureExtractor(champion, description)(batch.images).numpy() - expected).max() < 1e-6
    encoded = []
    for image in batch.images:
        out = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(out, "PNG")
        encoded.append(out.getvalue())
    pyfunc = mlflow.pyfunc.load_model("models:/crate-mae@champion")
    assert np.abs(pyfunc.predict(pd.DataFrame({"image": encoded})) - expected).max() < 1e-6

    # The embedding job writes the same, once for every key.
    result = cluster.submit(
        "python", "jobs/embed.py", "--data", "s3://data/digits-test", "--output", "s3://runs/embedded"
    )
    assert result.returncode == 0, result.stdout[-4000:]
    written = open_storage("s3://runs/embedded", S3Config())
    parts = [io.BytesIO(written.read(info.key)) for info in written.list() if info.key.endswith(".parquet")]
    table = pa.concat_tables([pq.read_table(part) for part in parts]).sort_by("sample")
    assert table["sample"].to_pylist() == list(range(shards.manifest.num_samples))
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    assert np.abs(vectors[: len(expected)] - expected).max() < 1e-6
    assert table["key"].to_pylist()[: len(batch.keys)] == batch.keys
    other = ["--data", "s3://data/digits-test", "--output", "s3://runs/other"]
    assert "nobody" in fail_here("embed", "--model", "models:/crate-mae@nobody", *other)


@pytest.mark.daily  # on each CI run, tests/unit/test_registry.py refuses such a model
def test_a_model_that_learned_nothing_is_refused(cluster: LocalCluster, trained: str) -> None:
    probe = ["--name", "spoilt", "--probe.train", "s3://data/digits-train", "--probe.test", "s3://data/digits-test"]
    spoil(trained, "s3://runs/spoilt")
    for run in (trained, "s3://runs/spoilt"):
        run_here("register", "register", "--name", "spoilt", "--run", run)
    run_here("register", "promote", "--version", "1", *probe, "--force", "true", "--reason", "a test")
    refusal = fail_here("register", "promote", "--version", "2", *probe)
    assert "version 2 is not promoted: its probe accuracy 0." in refusal

    data = ["--data", "s3://data/digits-test", "--output", "s3://runs/embedded-by-both"]
    run_here("embed", "--model", trained, *data)
    assert "already holds embeddings of another model" in fail_here("embed", "--model", "s3://runs/spoilt", *data)
    nothing = [*probe[:2], "--probe.train", "s3://data/nothing", "--probe.test", "s3://data/digits-test"]
    assert "no manifest at s3://data/nothing" in fail_here("register", "promote", "--version", "2", *nothing)


@pytest.mark.daily
def test_sweep_survives_its_driver_and_a_failing_trial(cluster: LocalCluster, trained: str, tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(
        yaml.safe_dump(
            {
                "model": MODEL,
                "data": {"train": "s3://data/digits-train", "validation": "s3://data/digits-test"},
                "training": {"batch_size": 64, "steps": 12},
                "scaling": {"workers": 1, "cpus_per_worker": 1, "lease_seconds": 4},
            }
        )
    )
    sweep = tmp_path / "sweep.yaml"
    settings = {
        "name": "codebook",
        "storage": "s3://runs",
        "base": str(base),
        # K = 8 does not divide d = 60: that combination is pruned. A learning rate of 1e30 fails.
        "search": {
            "model.num_subspaces": {"choice": [8]},
            "model.dim": {"choice": [64, 60]},
            "optim.lr": {"choice": [1e-3, 2e-3, 1e30]},
        },
        "trials": 6,
        "sampler": "grid",
        "against": "parameters",
        "tracking": {"experiment": "it", "picture_every": None},
    }
    sweep.write_text(yaml.safe_dump(settings))
    command = job("sweep", "--config", str(sweep))
    records = open_storage("s3://runs/codebook/results", S3Config())

    def finished() -> dict[str, str]:
        read = [json.loads(records.read(info.key)) for info in records.list()]
        return {r["trial"]: records_etag(records, r["trial"]) for r in read if r["status"] == "finished"}

    here = {"RAY_ADDRESS": f"127.0.0.1:{cluster.settings['CRATE_RAY_GCS_PORT']}"}  # rather than of the jobs' server
    first = subprocess.Popen(command, env=os.environ | here, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    wait_until(lambda: len(finished()) >= 1, "no trial finished", first)
    done = finished()
    first.send_signal(signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, env=os.environ | here, capture_output=True, text=True, timeout=500, check=False)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "best.yaml" in again.stdout
    after = finished()
    assert done.items() <= after.items()  # nothing that was finished ran again
    ended = [json.loads(records.read(info.key)) for info in records.list()]
    by_status = {status: [r for r in ended if r["status"] == status] for status in ("finished", "failed", "pruned")}
    assert [len(records) for records in by_status.values()] == [2, 1, 3]
    assert all("dim 60 is not divisible by num_subspaces 8" in r["cause"] for r in by_status["pruned"])
    assert by_status["failed"][0]["values"]["optim.lr"] == 1e30
    assert by_status["failed"][0]["cause"]
    for record in by_status["finished"]:
        assert record["objectives"] == {"validation_loss": record["objective"], "parameters": record["parameters"]}
        assert record["seconds"] > 0
    assert sorted(record["number"] for record in ended) == list(range(1, 7))
    folder = open_storage("s3://runs/codebook", S3Config())
    best = PretrainConfig.model_validate(yaml.safe_load(folder.read("best.yaml")))
    assert best.model.dim == 64
    assert best.model.subspace_dim == 8
    client = mlflow.MlflowClient(cluster.env["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("it")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.crate_ray.job = 'sweep'")
    children = client.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {c.data.tags["crate_ray.trial"] for c in children} >= set(after)
    names = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"results.csv", "best.yaml", "summary.md"} <= names


def test_bad_input_is_one_clear_sentence(cluster: LocalCluster, trained: str, tmp_path: Path) -> None:
    """Input that only a cluster shows to be bad, and a few others; tests/unit has the rest."""
    good = {
        "name": "digits",
        "storage": "s3://runs",
        **{f"model.{name}": value for name, value in MODEL.items()},
        "data.train": "s3://data/digits-train",
        "training.batch_size": 64,
        "training.steps": STEPS,
        "scaling.workers": 2,
    }

    def error(**changes: object) -> str:
        changed = good | {name.replace("__", "."): value for name, value in changes.items()}
        return fail_here("pretrain", *[f"--{name}={value}" for name, value in changed.items()])

    assert "bucket 'nowhere' does not exist" in error(data__train="s3://nowhere/digits")
    assert "no manifest at s3://data/nothing: it is empty or does not exist" in error(data__train="s3://data/nothing")
    assert "do not fill one batch of 64" in error(name="new", data__lanes=2000)
    assert "100 workers are more than the 64 samples of a batch" in error(scaling__workers=100)
    assert "was started with another dataset" in error(data__train="s3://data/digits-test")
    assert "was started with another model (model.sparsity_lambda was 0.5, is 0.1)" in error(model__sparsity_lambda=0.1)
    os.environ["AWS_SECRET_ACCESS_KEY"], secret = "wrong", os.environ["AWS_SECRET_ACCESS_KEY"]
    message = error()
    os.environ["AWS_SECRET_ACCESS_KEY"] = secret
    assert "credentials" in message
    assert secret not in message

    file = tmp_path / "bad.yaml"
    file.write_text("base: jobs/configs/demo.yaml\nsearch: {model.num_subspace: {choice: [2]}}\n")
    words = "no such pretraining setting, did you mean 'model.num_subspaces'?"
    assert words in fail_here("sweep", "--config", str(file))


def run_here(name: str, *arguments: str) -> str:
    """Run a job in this environment and require success; its output."""
    result = call(job(name, *arguments), ROOT, dict(os.environ))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def fail_here(name: str, *arguments: str) -> str:
    """Run a job and require one sentence on stderr, status 2 and no traceback; the sentence."""
    result = call(job(name, *arguments), ROOT, dict(os.environ))
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stdout[-2000:] + result.stderr[-4000:]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
    return lines[0]


def ray_job_submit() -> list[str]:
    variables = {"CRATE_RAY_GIT_COMMIT": COMMIT, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    return [RAY, "job", "submit", "--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": variables})]


def flat(settings: dict[str, object], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for name, value in settings.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def spoil(source: str, target: str) -> None:
    """Copy a finished run and set its weights to zero, with matching digests, so that only the probe can detect it."""
    import hashlib

    old, new = open_storage(source, S3Config()), open_storage(target, S3Config())
    commits = sorted(info.key for info in old.list("commits/"))
    commit = json.loads(old.read(commits[-1]))
    for name in commit["files"]:
        data = old.read(f"{commit['directory']}/{name}")
        if name.startswith("model-"):
            header = 8 + int.from_bytes(data[:8], "little")  # of safetensors: names, shapes and places
            data = data[:header] + bytes(len(data) - header)
            commit["files"][name]["sha256"] = hashlib.sha256(data).hexdigest()
        new.write(f"{commit['directory']}/{name}", data)
    new.write("run.json", old.read("run.json"))
    new.write(commits[-1], json.dumps(commit).encode())


def records_etag(records: object, trial: str) -> str:
    return next(info.etag for info in records.list() if info.key == f"{trial}.json")  # type: ignore[attr-defined]


def workers_of(cluster: LocalCluster) -> list[psutil.Process]:
    """Ray Train workers of this cluster, and of no other on the machine."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("CRATE_RAY_CLUSTER_DIR") == str(cluster.state)
            if ours and "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def wait_until(condition: object, words: str, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return
        assert process is None or process.poll() is None, f"{words}, and the job has ended"
        time.sleep(0.1)
    raise AssertionError(words)
