"""How workers share one model: DistributedDataParallel (DDP) or FSDP2. Plain torch; no Ray, no MLflow."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
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
    """Make a model parallel. Returns the module that all workers train together. A collective call.

    With one worker, this is the model itself. FSDP2 shards the model in place, layer by layer; build the optimizer
    afterwards. DDP wraps the model; weights may be loaded before or after. Both average gradients over the workers.
    """
    if world_size == 1:
        return model
    if strategy == "fsdp":
        return _shard(model, layers, world_size, device, autocast)
    # Buffers are constants, so they are not sent before each step. torch 2.13 has a new name for the argument.
    known = inspect.signature(DistributedDataParallel).parameters
    resend: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    # Every parameter has a gradient in every step (see CrateMAE), so the graph is always the same.
    return DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True, **resend)


def settle(trained: nn.Module, images_BCHW: Tensor, given: Any) -> None:
    """Let DDP build its final buckets before the first real step of a new or resumed run. A collective call.

    DDP with a static graph records the graph in its first backward pass and the order of the gradients in its second.
    It orders its buckets by them before its third forward pass. With three or more workers, the order of summation
    depends on the buckets, so without this call a resumed run would differ in its last bits. Layers are not compiled
    for these inputs, which have fewer samples than a step.
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

    A worker may have one sample fewer than another. With DDP it can skip a forward pass that does not synchronise. With
    FSDP2 no worker can skip one, so a micro-batch may have one sample more than micro_batch_size.
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
    # Gather weights in the dtype of the computation, which halves the traffic. Not on the CPU, because its layer norm
    # does not accept bf16 weights with fp32 tokens. There autocast rounds after gathering, to the same numbers.
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


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded model (FSDP2) in fp32, on rank 0's CPU; empty on other ranks. A collective call."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], whole)
