"""How the trials of a sweep that run at the same time share the cluster, and whether a model fits into their share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ray
import torch

from crate_ray.config import PretrainConfig, ScalingConfig
from crate_ray.errors import UserError
from crate_ray.models.training_memory import least_training_bytes
from crate_ray.ray_cluster import Node, cluster_nodes, worker_resources, workers_that_fit
from crate_ray.training.step import largest_micro_batch

_GPU_SECONDS = 60.0  # a GPU that is in use for longer is not asked for its memory


class Cluster(NamedTuple):
    """What trials share."""

    nodes: list[Node]
    node_bytes: int | None = None
    """Memory of the largest node; None if it is not known."""
    gpu_bytes: int | None = None
    """Memory of a GPU; None if it is not known."""


def connected_cluster() -> Cluster:
    """The cluster that Ray is connected to."""
    nodes = cluster_nodes()
    names = ("memory", "object_store_memory")  # Ray divides what a node has free at its start between the two
    memory = max(
        (sum(node["Resources"].get(name, 0) for name in names) for node in ray.nodes() if node["Alive"]), default=0
    )
    gpu_bytes = _ask_a_gpu() if any(node.gpus for node in nodes) else None
    return Cluster(nodes, int(memory) or None, gpu_bytes)


def trial_scaling(scaling: ScalingConfig, trials: int, nodes: Sequence[Node]) -> ScalingConfig:
    """Workers and CPUs of each of some trials that run at the same time. One trial alone takes what a run takes.

    Args:
        scaling: settings of the trial.
        trials: number of trials at the same time.
        nodes: of the cluster.

    Raises:
        UserError: the cluster has no room for so many workers.
    """
    if trials == 1:
        return scaling
    fewest, most = trials * scaling.min_workers, trials * scaling.max_workers
    try:
        resources, gpu = worker_resources(scaling.model_copy(update={"workers": (fewest, most)}), nodes)
    except UserError as error:
        raise UserError(f"{trials} trials at the same time: {error}; or lower max_concurrent") from None
    cpus = int(resources["CPU"])
    room = workers_that_fit(nodes, cpus, gpu=gpu)
    if room < fewest:
        with_gpu = " and a GPU" if gpu else ""
        raise UserError(
            f"{trials} trials at the same time need {fewest} workers with {cpus} CPUs{with_gpu} each, the cluster has "
            f"room for {room}; lower max_concurrent, scaling.workers or scaling.cpus_per_worker"
        )
    workers = scaling.workers
    if isinstance(workers, tuple):
        workers = (scaling.min_workers, min(scaling.max_workers, room // trials))
    return scaling.model_copy(update={"workers": workers, "cpus_per_worker": cpus, "gpu": gpu})


def why_too_large(config: PretrainConfig, trials: int, cluster: Cluster) -> str:
    """Why a trial cannot fit into memory; empty if it may fit. Only what surely does not fit is refused."""
    try:
        scaling = trial_scaling(config.scaling, trials, cluster.nodes)
        _, use_gpu = worker_resources(scaling, cluster.nodes)
    except UserError as error:
        return str(error)
    workers = scaling.max_workers
    if use_gpu:
        limit, share = cluster.gpu_bytes, "a GPU has"
    else:
        on_one_node = -(-trials * workers // max(1, len(cluster.nodes)))
        limit = cluster.node_bytes // on_one_node if cluster.node_bytes else None
        share = "its share of a node is" if on_one_node > 1 else "a node has"
    if limit is None:
        return ""
    images = largest_micro_batch(config.training, workers)
    needed = least_training_bytes(
        config.model,
        images,
        checkpoint_layers=config.training.activation_checkpointing,
        optimizer=config.optim.optimizer,
    )
    if config.scaling.strategy == "fsdp":
        needed //= workers  # weights are shared; activations are not, so this may be too little
    if needed <= limit:
        return ""
    return (
        f"a worker needs at least {needed / 2**30:.1f} GiB to train it with {images} images at a time, {share} "
        f"{limit / 2**30:.1f} GiB; lower training.micro_batch_size or the model's size"
    )


def _ask_a_gpu() -> int | None:
    """Memory of a GPU of the cluster."""
    asked = ray.remote(num_gpus=1, num_cpus=0)(_gpu_bytes).remote()
    try:
        return int(ray.get(asked, timeout=_GPU_SECONDS))
    except ray.exceptions.RayError:
        ray.cancel(asked)
        return None


def _gpu_bytes() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)
