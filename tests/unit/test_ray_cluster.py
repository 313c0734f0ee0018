"""How workers share the CPUs and GPUs of a cluster."""

from __future__ import annotations

from typing import Any

import pytest

from crate_ray.config import ScalingConfig
from crate_ray.errors import UserError
from crate_ray.ray_cluster import Node, worker_resources

HEAD, GPUS = Node(64, 0), Node(16, 8)


@pytest.mark.parametrize(
    ("settings", "nodes", "cpus", "gpu"),
    [
        ({"workers": 8}, [HEAD, GPUS], 2, True),  # not the head's, where no worker with a GPU can be
        ({"workers": 4}, [HEAD, GPUS], 4, True),
        ({"workers": 16}, [GPUS, Node(32, 8)], 2, True),
        ({"workers": (2, 64)}, [HEAD, GPUS], 2, True),  # as many as there is room for
        ({"workers": 8, "gpu": False}, [HEAD, GPUS], 9, False),
        ({"workers": 3}, [Node(2, 0), Node(4, 0)], 2, False),
        ({"workers": 8, "gpu": True, "cpus_per_worker": 5}, [HEAD], 5, True),  # an autoscaler will add nodes
        ({"workers": 8, "cpus_per_worker": 1}, [GPUS], 1, True),
    ],
)
def test_workers_share_the_nodes_on_which_they_can_be(
    settings: dict[str, Any], nodes: list[Node], cpus: int, gpu: bool
) -> None:
    resources = {"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus}
    assert worker_resources(ScalingConfig.model_validate(settings), nodes) == (resources, gpu)


@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        ({"workers": 8}, [Node(32, 4)], "8 workers need a GPU each, the cluster has 4; lower scaling.workers"),
        ({"workers": 8, "gpu": True}, [HEAD], "8 workers need a GPU each, the cluster has 0"),
        ({"workers": 8}, [HEAD, Node(2, 8)], "8 workers need a CPU each, the nodes with GPUs have room for 2"),
        ({"workers": 3}, [Node(2, 0)], "3 workers need a CPU each, the cluster has room for 2"),
    ],
)
def test_a_cluster_that_is_too_small_is_an_error_at_once(
    settings: dict[str, Any], nodes: list[Node], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        worker_resources(ScalingConfig.model_validate(settings), nodes)
