"""How training should scale to hundreds of GPUs: bytes that each step moves against what the interconnect carries.

An estimate from formulas, not a measurement: ring collectives at the bandwidth that they leave usable, compute at a
given share of the device's peak, and what can overlap taken as overlapping.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from crate_ray.config import BenchmarkScalingConfig
from crate_ray.models.flops import training_flops

Strategy = Literal["ddp", "fsdp"]

_GRADIENT_BYTES = 4  # gradients are summed in fp32
_GATHERED_BYTES = 2  # FSDP gathers weights in bf16
_BACKWARD_SHARE = 2 / 3  # of the compute: two matrix products for each one of the forward pass


@dataclass(frozen=True)
class Estimate:
    """One training step on W GPUs."""

    gpus: int
    samples_per_gpu: float
    flops_per_gpu: int
    """Operations of the GPU with the most samples."""
    bytes_per_gpu: float
    """What each GPU sends in a step."""
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    """The part of the communication that no computation hides."""

    @property
    def efficiency(self) -> float:
        """Share of the step that is computation."""
        return self.compute_seconds / (self.compute_seconds + self.exposed_seconds)


def sent_bytes(strategy: Strategy, parameters: int, gpus: int) -> float:
    """What each GPU sends in a step, with ring collectives, in bytes.

    A ring all-gather or reduce-scatter of n bytes sends (W − 1) / W · n, an all-reduce is one of each. DDP all-reduces
    the gradients; FSDP gathers the weights before forward and before backward and reduce-scatters the gradients.
    """
    share = (gpus - 1) / gpus
    if strategy == "ddp":
        return share * 2 * _GRADIENT_BYTES * parameters
    return share * (2 * _GATHERED_BYTES + _GRADIENT_BYTES) * parameters


def collective_seconds(num_bytes: float, gpus: int, config: BenchmarkScalingConfig) -> float:
    """Time for a GPU to send so many bytes in ring collectives.

    Within a node the GPUs' own links carry a ring. Across nodes every ring enters and leaves each node once; NCCL runs
    as many rings as there are network ports, so that together they have the node's network bandwidth. The latency is
    that of a tree over the nodes, there and back.
    """
    if gpus <= config.gpus_per_node:
        return num_bytes / config.gpu_bytes_per_second
    nodes = math.ceil(gpus / config.gpus_per_node)
    bandwidth = min(config.gpu_bytes_per_second, config.node_bytes_per_second)
    return num_bytes / bandwidth + 2 * math.log2(nodes) * config.latency_seconds


def estimate(strategy: Strategy, parameters: int, gpus: int, config: BenchmarkScalingConfig) -> Estimate:
    """One step at the fixed global batch of a model with so many parameters.

    DDP can hide its all-reduce behind the backward pass, FSDP its gathers behind all of the computation.
    """
    samples = config.batch_size / gpus
    flops = training_flops(config.model, math.ceil(samples))
    compute = flops / (config.peak_flops * config.mfu)
    volume = sent_bytes(strategy, parameters, gpus)
    communication = collective_seconds(volume, gpus, config)
    hidden = compute * (_BACKWARD_SHARE if strategy == "ddp" else 1)
    return Estimate(gpus, samples, flops, volume, compute, communication, max(0.0, communication - hidden))
