"""Estimates how training scales to hundreds of GPUs, from the bytes that each step sends and the network's bandwidth.

This is an estimate from formulas, not a measurement. It assumes ring collectives at the given bandwidth, computation at
a given share of the GPU's peak, and full overlap wherever communication can overlap with computation.
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
_BACKWARD_SHARE = 2 / 3  # of the computation: two matrix products for each one in the forward pass


@dataclass(frozen=True)
class Estimate:
    """One training step on W GPUs."""

    gpus: int
    samples_per_gpu: float
    flops_per_gpu: int
    """Operations of the GPU with the most samples."""
    bytes_per_gpu: float
    """Bytes that each GPU sends in a step."""
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    """Communication time that does not overlap with computation."""

    @property
    def efficiency(self) -> float:
        """Share of the step that is computation."""
        return self.compute_seconds / (self.compute_seconds + self.exposed_seconds)


def sent_bytes(strategy: Strategy, parameters: int, gpus: int) -> float:
    """Bytes that each GPU sends in a step with ring collectives.

    A ring all-gather or reduce-scatter of n bytes sends (W − 1) / W · n bytes. An all-reduce is one of each. DDP
    all-reduces the gradients. FSDP gathers the weights before the forward and before the backward pass, and
    reduce-scatters the gradients.
    """
    share = (gpus - 1) / gpus
    if strategy == "ddp":
        return share * 2 * _GRADIENT_BYTES * parameters
    return share * (2 * _GATHERED_BYTES + _GRADIENT_BYTES) * parameters


def collective_seconds(num_bytes: float, gpus: int, config: BenchmarkScalingConfig) -> float:
    """Time that a GPU needs to send `num_bytes` in ring collectives.

    Within a node, a ring uses the GPUs' own links. Across nodes, every ring enters and leaves each node once. NCCL runs
    one ring per network port, so the rings together have the node's network bandwidth. The latency is that of a tree
    over the nodes, up and down.
    """
    if gpus <= config.gpus_per_node:
        return num_bytes / config.gpu_bytes_per_second
    nodes = math.ceil(gpus / config.gpus_per_node)
    bandwidth = min(config.gpu_bytes_per_second, config.node_bytes_per_second)
    return num_bytes / bandwidth + 2 * math.log2(nodes) * config.latency_seconds


def estimate(strategy: Strategy, parameters: int, gpus: int, config: BenchmarkScalingConfig) -> Estimate:
    """Estimate one step of a model at the fixed global batch.

    DDP can overlap its all-reduce with the backward pass. FSDP can overlap its gathers with all of the computation.
    """
    samples = config.batch_size / gpus
    flops = training_flops(config.model, math.ceil(samples))
    compute = flops / (config.peak_flops * config.mfu)
    volume = sent_bytes(strategy, parameters, gpus)
    communication = collective_seconds(volume, gpus, config)
    hidden = compute * (_BACKWARD_SHARE if strategy == "ddp" else 1)
    return Estimate(gpus, samples, flops, volume, compute, communication, max(0.0, communication - hidden))
