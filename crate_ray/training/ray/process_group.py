"""Connects the workers of a run to one torch process group that listens on as few addresses as possible.

torch's TCPStore, gloo and NCCL ask nobody for a password, and Ray Train lets the store listen on every address of rank
0's machine. Here the store and the connections between workers stay on loopback if all workers are on one machine.
Otherwise the store listens only on the address that Ray uses for rank 0's node.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import ray
import ray.train
import torch.distributed as dist
from ray.train.torch import TorchConfig

_LOOPBACK = "127.0.0.1"
_listening: list[socket.socket] = []  # in rank 0's process, from _listen to _join


class Place(NamedTuple):
    """Where a worker is."""

    node: str
    """Ray's id of its node."""
    address: str
    """IP address of its node, as Ray knows it."""


def on_one_machine(places: Sequence[Place]) -> bool:
    """Whether the workers can reach each other by loopback: one node, or several nodes that have loopback addresses."""
    return len({place.node for place in places}) == 1 or all(
        ipaddress.ip_address(place.address).is_loopback for place in places
    )


class ClosedTorchConfig(TorchConfig):
    """Ray Train's settings of torch, with a process group that is closed to other machines where that is possible."""

    @property
    def backend_cls(self) -> type:
        """The class that sets the process group up."""
        return ClosedBackend


class ClosedBackend(TorchConfig().backend_cls):  # type: ignore[misc]  # it leaves the process group at the end
    """Sets the process group up, in place of Ray Train's own way."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Let all workers join; Ray Train calls this when it has started them."""
        alone = on_one_machine(places := worker_group.execute(_place))
        host = _LOOPBACK if alone else places[0].address
        port = worker_group.execute_single(0, _listen, host)
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        timeout = timedelta(seconds=backend_config.timeout_s)
        ray.get(
            [
                worker_group.execute_single_async(rank, _join, backend, host, port, timeout, on_loopback=alone)
                for rank in range(len(worker_group))
            ]
        )


def _place() -> Place:
    return Place(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())


def _listen(host: str) -> int:
    """Open the store's port on one address only. The store itself would open it on all."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        _listening[:] = [socket.create_server((host, 0), family=family)]
    except OSError as error:
        raise OSError(
            f"rank 0 cannot listen on {host}, the address of its Ray node ({error.strerror}); start Ray on that "
            "machine with --node-ip-address set to an address of one of its own interfaces"
        ) from error
    return int(_listening[0].getsockname()[1])


def _join(backend: str, host: str, port: int, timeout: timedelta, *, on_loopback: bool) -> None:
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    os.environ |= {  # what torchrun sets
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray Train: a collective that hangs is an error
    if on_loopback:
        loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    opened = _listening.pop().detach() if rank == 0 else None
    store = dist.TCPStore(host, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=opened)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
