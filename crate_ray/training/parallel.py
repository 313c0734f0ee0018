"""How workers share one model: DistributedDataParallel (DDP) or FSDP2. Plain torch; no Ray, no MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from crate_ray.config import TrainingConfig
from crate_ray.models import CrateMAE
from crate_ray.training.step import discard_step, num_micro_steps


def parallelize(
    model: nn.Module,
    layers: Sequence[nn.Module],
    strategy: Literal["auto", "ddp", "fsdp"],
    *,
    world_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> nn.Module:
    """The module that all workers train together: the model itself if there is one worker. A collective call.

    FSDP2 shards the model in place, layer by layer; build the optimizer after it. DDP wraps the model; load weights
    before or after. In both cases gradients are means over the workers.
    """
    if world_size == 1:
        return model
    if strategy == "fsdp":
        return _shard(model, layers, world_size, device, autocast)
    # Every parameter has a gradient in every step (see CrateMAE), so the graph is always the same.
    return DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)


def settle(trained: nn.Module, images_BCHW: Tensor, given: Any) -> None:
    """Let DDP build its final buckets before the first real step of a new or resumed run. A collective call.

    DDP with a static graph records the graph in its first backward pass, records the order of the gradients in its
    second, and orders its buckets by it before its third forward pass. With three or more workers the order of
    summation depends on the buckets: without this call, a resumed run would differ in its last bits. Layers are not
    compiled for these inputs, which have fewer samples than a step.
    """
    if isinstance(trained, DistributedDataParallel):
        with torch.compiler.set_stance("force_eager"):
            for _ in range(2):
                discard_step(trained, images_BCHW, given)


def is_sharded(model: nn.Module) -> bool:
    """Whether each forward pass of the model is a collective call (FSDP2)."""
    return isinstance(model, FSDPModule)


def micro_steps_of(training: TrainingConfig, model: nn.Module, world_size: int) -> int:
    """Forward passes per optimizer step of a model that `parallelize` returned.

    A worker may have one sample less than another. With DDP it then skips a forward pass that does not synchronise.
    With FSDP2 no worker can skip one, so one of its micro-batches may have a sample more than micro_batch_size.
    """
    steps = num_micro_steps(training, world_size)
    return min(steps, training.batch_size // world_size) if is_sharded(model) else steps


def _shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    world_size: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> nn.Module:
    mesh = init_device_mesh(device.type, (world_size,))
    # Weights are gathered in the dtype of the computation, at half the traffic. Not on the CPU, whose layer norm does
    # not take bf16 weights with fp32 tokens: there autocast rounds after gathering, to the same numbers.
    gathered = autocast if device.type == "cuda" else None
    reduced = torch.float32 if gathered else None
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
    # A tied decoder layer uses an encoder layer's parameters outside that layer: they have to stay gathered.
    tied = isinstance(model, CrateMAE) and model.tied_decoder
    for layer in () if tied else layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Reshard after every forward pass, so that the optimizer's parameters are in place without a backward pass too.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every worker holds all parameters of a sharded model (FSDP2), so that they can be read outside its
    forward pass. A collective call for a sharded model; other models are not changed."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
