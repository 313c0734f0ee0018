"""Connects to the Ray cluster that a job runs on, or starts Ray on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import ray

from crate_ray.addresses import redact
from crate_ray.config import ScalingConfig
from crate_ray.errors import UserError
from crate_ray.quiet import quiet_driver
from crate_ray.ray_address import LOCAL, checked_address, refusal
from crate_ray.storage.credentials import names_here

SETUP_HOOK = "crate_ray.quiet.set_up_ray_process"
"""Function that runs first in every process that Ray starts for a job."""


def start_ray(*, dashboard: bool = False) -> None:
    """Connect to the cluster that RAY_ADDRESS names or that runs on this machine. Otherwise start Ray on this machine.

    A Ray that this function starts has no dashboard unless `dashboard` is set. A dashboard takes ten processes and
    900 MB.

    Raises UserError when RAY_ADDRESS is set but no cluster answers there, or when the cluster refuses the token.
    """
    quiet_driver()
    if ray.is_initialized():
        return
    address = checked_address()
    if "RAY_ADDRESS" in os.environ:
        os.environ["RAY_ADDRESS"] = os.environ["RAY_ADDRESS"].strip()  # Ray takes spaces for a part of the address
    runtime_env = {"worker_process_setup_hook": SETUP_HOOK, "env_vars": names_here()}
    try:
        with _private_token(starts_here=address in LOCAL):
            ray.init(include_dashboard=dashboard, runtime_env=runtime_env, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        cause = redact(str(error).splitlines()[0])
        raise UserError(f"cannot use Ray: {cause}" if address in LOCAL else refusal(address, cause)) from error


@contextmanager
def _private_token(*, starts_here: bool) -> Iterator[None]:
    """Let nobody else read the token that a local Ray writes to ~/.ray: others can then not run code as this user.

    Ray writes the file with the permissions that the umask leaves, so the folder is closed before, and the file after.
    A token that the environment names is left alone. Without a home to write to, the token is in the environment of
    this process and of the Ray that it starts.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or os.environ.get("RAY_AUTH_MODE") == "disabled":
        yield
        return
    try:
        folder = Path("~/.ray").expanduser()
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        if starts_here:
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / "auth_token").chmod(0o600)


class Node(NamedTuple):
    """What a node of the cluster has for workers."""

    cpus: int
    gpus: int


def cluster_nodes() -> list[Node]:
    """The nodes of the cluster that are alive."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in alive]


def worker_resources(scaling: ScalingConfig, nodes: Sequence[Node]) -> tuple[dict[str, float], bool]:
    """CPUs and GPUs of each worker, and whether it has a GPU.

    Workers with a GPU share the CPUs of the nodes that have GPUs, others those of all nodes. If the number of workers
    is a range, the share is for as many as the cluster has room for now.

    Args:
        scaling: settings of the run.
        nodes: of the cluster.

    Raises:
        UserError: the nodes have too few GPUs or CPUs, and the settings do not say that others will be added.
    """
    gpus = sum(gpu for _, gpu in nodes)
    use_gpu = scaling.gpu if scaling.gpu is not None else gpus > 0
    needed, cpus = scaling.min_workers, scaling.cpus_per_worker
    if use_gpu and gpus < needed and (scaling.gpu is None or cpus is None):
        raise UserError(
            f"{needed} workers need a GPU each, the cluster has {gpus}; lower scaling.workers, set scaling.gpu false "
            "to train on CPUs, or set scaling.gpu true and scaling.cpus_per_worker if an autoscaler will add nodes"
        )
    if cpus is None:
        room = workers_that_fit(nodes, 1, gpu=use_gpu)
        workers = min(scaling.max_workers, room)
        if workers < needed:
            kind = "nodes with GPUs have" if use_gpu else "cluster has"
            raise UserError(
                f"{needed} workers need a CPU each, the {kind} room for {room}; lower scaling.workers, "
                "add nodes, or set scaling.cpus_per_worker if an autoscaler will add them"
            )
        most = max(node.cpus for node in nodes)
        cpus = max(c for c in range(1, most + 1) if workers_that_fit(nodes, c, gpu=use_gpu) >= workers)
    return ({"CPU": cpus, "GPU": 1} if use_gpu else {"CPU": cpus}), use_gpu


def workers_that_fit(nodes: Sequence[Node], cpus_each: int, *, gpu: bool) -> int:
    """Number of workers with this many CPUs each, and a GPU each if `gpu`, that the nodes have room for."""
    return sum(min(node.cpus // cpus_each, node.gpus if gpu else node.cpus) for node in nodes)


def task_cpus(tasks: int, gpu: bool) -> int:
    """CPUs of each of some tasks, which decode with as many threads: one, or a share of the CPUs beside the GPUs."""
    if not gpu:
        return 1
    try:
        return int(worker_resources(ScalingConfig(workers=(1, tasks), gpu=True), cluster_nodes())[0]["CPU"])
    except UserError:  # no GPU yet: an autoscaler will add nodes
        return 1
