"""Run the real jobs as processes of their own, on this machine alone or on a Ray cluster that they share, watch their
checkpoints, and kill parts of them."""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import psutil
import pytest
import safetensors.torch
from ray.cluster_utils import Cluster
from torch import Tensor

from crate_ray.storage.interface import Storage

ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray").as_posix()
_OF_SERVICES = ("RAY_", "MLFLOW_", "AWS_")
_SLOW_IMPORTS = [
    "torch.distributed.checkpoint", "torch._dynamo", "ray.train.torch", "mlflow.store.tracking.sqlalchemy_store",
    "boto3", "matplotlib.figure", "scipy.stats", "sklearn.decomposition", "sklearn.linear_model",
]  # fmt: skip
"""Third-party modules that jobs import, and that take tenths of a second."""
_NOT_NICE = {"RAY_worker_niceness": "0"}
"""By default, Ray's workers have a low priority, so other tests would slow them down."""
os.environ.update(_NOT_NICE)


def environment(folder: Path) -> dict[str, str]:
    """Environment of a job that uses a Ray of its own and leaves nothing outside a folder."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_SERVICES)}
    ray = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled"}
    return env | ray | _NOT_NICE | {"XDG_CACHE_HOME": (folder / "cache").as_posix()}


def job(name: str, *arguments: str) -> list[str]:
    """Command line of jobs/<name>.py."""
    return [sys.executable, (ROOT / "jobs" / f"{name}.py").as_posix(), *arguments]


def forkserver() -> ForkServerContext:
    """Starts processes in which slow third-party modules are already imported. They import our own code themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_SLOW_IMPORTS)
    return context


# --- A Ray cluster --------------------------------------------------------------------------------------------------


class RayCluster:
    """A Ray cluster of this machine. Its head has room for `cpus` one-CPU workers; nodes may be added and killed.

    It checks its workers more often than usual. `folder` is the temporary folder of everything that runs on it.
    """

    def __init__(self, folder: Path, cpus: int) -> None:
        self.folder = folder
        with self._environment():
            head = {"num_cpus": cpus, "include_dashboard": False, "dashboard_port": free_port()}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address: str = self._cluster.address

    def add_node(self, cpus: int) -> psutil.Process:
        """Add a node. Returns its raylet."""
        with self._environment():
            return _raylet(self._cluster.add_node(num_cpus=cpus))

    @property
    def raylets(self) -> list[psutil.Process]:
        """Raylets that are running, the head's first."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        return [raylet for node in nodes if (raylet := _raylet(node)).is_running()]

    def node_id(self, raylet: psutil.Process) -> str:
        """Ray's name for a node."""
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        return str(next(node.node_id for node in nodes if _raylet(node) == raylet))

    def announce_loss(self, raylet: psutil.Process, seconds: int) -> None:
        """Send a notice that a node will be preempted in some seconds. The caller then calls kill_node."""
        notice = ["--node-id", self.node_id(raylet), "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        notice += ["--reason-message", "its time is over", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(
            [RAY, "drain-node", "--address", self.address, *notice],
            env=environment(self.folder), check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def held(self) -> list[str]:
        """Wait up to ten seconds until there are no placement groups, which reserve CPUs. Returns those that remain."""
        deadline = time.monotonic() + 10
        while True:
            table = self._cluster.global_state.placement_group_table()
            groups = [name for name, group in table.items() if group["state"] != "REMOVED"]
            if not groups or time.monotonic() > deadline:
                return groups
            time.sleep(0.1)

    def workers(self, driver: int) -> list[psutil.Process]:
        """Ray Train workers of the job whose driver has a process id, by age."""
        jobs = {job["JobID"] for job in self._cluster.global_state.job_table() if job["DriverPid"] == driver}
        found = []
        for raylet in self.raylets:
            for child in raylet.children():
                with suppress(psutil.Error):
                    # A worker has the second name while Ray Train lets it join the process group.
                    is_worker = " ".join(child.cmdline()).startswith(("ray::RayTrainWorker", "ray::execute."))
                    if is_worker and child.environ()["RAY_JOB_ID"] in jobs:
                        found.append(child)
        return sorted(found, key=psutil.Process.create_time)

    def shutdown(self) -> None:
        """Stop all nodes."""
        self._cluster.shutdown()

    @contextmanager
    def _environment(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ:
                if name.startswith(_OF_SERVICES):
                    patch.delenv(name)
            patch.setenv("RAY_AUTH_MODE", "disabled")
            patch.setenv("RAY_TMPDIR", self.folder.as_posix())
            patch.setenv("TMPDIR", self.folder.as_posix())
            patch.setenv("AWS_SHARED_CREDENTIALS_FILE", self.credentials.as_posix())
            patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
            patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
            patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
            patch.setenv("RAY_health_check_period_ms", "1000")
            for name, value in _NOT_NICE.items():
                patch.setenv(name, value)
            # Processes that Ray starts ahead cannot be used by jobs with an environment of their own.
            patch.setenv("RAY_enable_worker_prestart", "0")
            patch.setenv("RAY_prestart_worker_first_driver", "0")
            yield

    @property
    def credentials(self) -> Path:
        """File for the keys of an S3 server; all that runs here looks into it."""
        return self.folder / "credentials"


@contextmanager
def running_ray(cpus: int) -> Iterator[RayCluster]:
    """A Ray cluster until the block ends."""
    # A short path: names of sockets are made of it.
    with tempfile.TemporaryDirectory(prefix="cr-", ignore_cleanup_errors=True) as folder:
        cluster = RayCluster(Path(folder), cpus)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def kill_node(raylet: psutil.Process) -> None:
    """Kill all processes of a node at once, as if its machine was switched off."""
    for process in (raylet, *raylet.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def free_port() -> int:
    """A free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _raylet(node: object) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)  # type: ignore[attr-defined]


# --- Jobs on it -----------------------------------------------------------------------------------------------------


class Job:
    """A job that was started: its driver's process, and where it runs."""

    def __init__(self, process: ForkServerProcess, folder: Path, cluster: RayCluster) -> None:
        self.folder, self.cluster = folder, cluster
        self._process = process
        assert process.pid
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while the driver runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """The exit code, as soon as there is one."""
        self._process.join(timeout)
        if self.returncode is None:
            raise AssertionError(f"the job does not end:\n{self.log[-5000:]}")
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send the driver a signal, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, number)

    @property
    def log(self) -> str:
        """Output of all jobs of this folder."""
        return (self.folder / "job.log").read_text()

    def workers(self) -> list[psutil.Process]:
        """Its Ray Train workers that live, by age."""
        return self.cluster.workers(self.pid)


def start(command: list[str], folder: Path, cluster: RayCluster) -> Job:
    """Start a job on a cluster; its output goes to job.log in the folder, its working directory."""
    env = environment(folder) | {
        "RAY_ADDRESS": cluster.address,
        "AWS_SHARED_CREDENTIALS_FILE": cluster.credentials.as_posix(),
    }
    log = folder / "job.log"
    process = forkserver().Process(target=_run, args=(command[1:], folder, env, log, log))
    process.start()
    while _ignores(process.pid, signal.SIGINT):
        time.sleep(0.001)
    return Job(process, folder, cluster)


def _ignores(pid: int | None, number: signal.Signals) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    ignored = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
    return bool(int(ignored, 16) >> (number - 1) & 1)


def call(
    command: list[str], folder: Path, env: dict[str, str], timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run a job to its end as a process of its own, in a folder, with just this environment."""
    with tempfile.TemporaryDirectory() as outputs:
        out, err = Path(outputs, "out"), Path(outputs, "err")
        process = forkserver().Process(target=_run, args=(command[1:], folder, env, out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{command} does not end:\n{out.read_text()[-2000:]}{err.read_text()[-4000:]}")
        return subprocess.CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _run(argv: list[str], folder: Path, env: dict[str, str], stdout: Path, stderr: Path) -> None:
    # The process that it is forked from ignores Ctrl-C, and so does all that a shell starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for path, number in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process does not do by itself


def finish(job: Job, timeout: float = 500) -> None:
    """Wait for a job and require that it succeeded."""
    try:
        assert job.wait(timeout) == 0, job.log[-5000:]
    finally:
        end(job)


def end(job: Job) -> None:
    """Kill a job's driver if it still runs; Ray ends what it started."""
    job.send_signal(signal.SIGKILL)
    job.wait(30)


def wait_for_workers(job: Job, number: int, timeout: float = 240) -> list[psutil.Process]:
    """A job's workers as soon as they are so many."""
    deadline = time.monotonic() + timeout
    while len(workers := job.workers()) < number:
        assert job.returncode is None, f"the job ended before it had its workers:\n{job.log[-5000:]}"
        assert time.monotonic() < deadline, f"no {number} workers within {timeout} s:\n{job.log[-5000:]}"
        time.sleep(0.2)
    return workers


def newest_commit(run: Storage) -> int:
    """Step of a run's newest committed checkpoint; 0 before the first."""
    return max((int(info.key.split("-")[1]) for info in run.list("commits/step-")), default=0)


def wait_for_commit(run: Storage, step: int, job: Job, timeout: float = 400) -> None:
    """Wait until a run has committed a checkpoint of at least so many steps."""
    deadline = time.monotonic() + timeout
    while newest_commit(run) < step:
        assert job.returncode is None, f"the job ended before its checkpoint:\n{job.log[-5000:]}"
        assert time.monotonic() < deadline, f"no checkpoint of step {step} within {timeout} s:\n{job.log[-5000:]}"
        time.sleep(0.02)


def final_weights(run: Storage) -> str:
    """Digest of the model that a finished run left."""
    return digest_of(safetensors.torch.load(run.read("model/model.safetensors")))


def digest_of(weights: dict[str, Tensor]) -> str:
    """Digest of named weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
