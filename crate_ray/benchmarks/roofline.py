"""What a device's limits allow: bytes and FLOPs of each operation of a training step, and the time they take at least.

A step runs once with few images while every operation is recorded. Each takes at least its FLOPs at the device's peak
rate, or the bytes that it reads and writes at the peak rate of its memory, whichever is longer. Three forms are
estimated from the same record:

- eager: each operation is a kernel of its own.
- compiled: elementwise operations and reductions between two products are one kernel, as inductor fuses them.
- fused: in addition, such a kernel is the epilogue of the product before it, and self-attention with query = key =
  value loads one tensor and writes one gradient (models/kernels/gpu_attention.py).

These are estimates from below: no kernel reaches the peaks. They need a CUDA device, because dtypes under autocast are
those of the device; the emulated one of tests/gpu_emulated will do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from crate_ray.config import BenchmarkRooflineConfig, CrateMAEConfig, ModelConfig
from crate_ray.errors import UserError
from crate_ray.models import build_model
from crate_ray.models.flops import training_flops

Form = Literal["eager", "compiled", "fused"]
FORMS: tuple[Form, ...] = ("eager", "compiled", "fused")

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention")
_FREE = ("empty", "detach", "_unsafe_view", "new_empty", "lift_fresh", "_local_scalar_dense", "is_nonzero")


@dataclass(frozen=True)
class Device:
    """Limits of a device."""

    flops: float
    """FLOP/s in bf16."""
    bytes_per_second: float
    """Rate of its memory."""


@dataclass
class Operation:
    """One recorded operation."""

    name: str
    flops: int
    reads: dict[int, int]
    """Bytes by tensor."""
    writes: dict[int, int]

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product or attention, which stay kernels of their own."""
        return self.flops > 0

    @property
    def is_attention(self) -> bool:
        """Whether it is an attention kernel, forward or backward."""
        return any(part in self.name for part in _ATTENTION)


@dataclass
class Kernel:
    """What runs as one kernel."""

    name: str
    flops: int = 0
    bytes: int = 0

    def seconds(self, device: Device) -> float:
        """The least time it takes."""
        return max(self.flops / device.flops, self.bytes / device.bytes_per_second)


@dataclass
class Estimate:
    """A training step in one form."""

    kernels: list[Kernel]

    @property
    def flops(self) -> int:
        """Of all kernels."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """Of all kernels."""
        return sum(kernel.bytes for kernel in self.kernels)

    def seconds(self, device: Device) -> float:
        """The least time of the step."""
        return sum(kernel.seconds(device) for kernel in self.kernels)

    def by_name(self, device: Device) -> dict[str, float]:
        """Seconds by kind of kernel, the longest first."""
        found: dict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            found[kernel.name] += kernel.seconds(device)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


# --- Record ---------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the operations that run inside, in their order, without views, which move no data."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._kept: dict[int, Any] = {}  # so that no storage is freed and its address used again

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        if func.is_view or name.startswith(_FREE):
            return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.numel() > 1]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.numel() > 1]
        count = flop_registry.get(func.overloadpacket)
        flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
        reads = {self._key(tensor): _size(tensor) for tensor in inputs}
        writes = {self._key(tensor): _size(tensor) for tensor in outputs}
        self.operations.append(Operation(name, flops, reads, writes))
        return out

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage
        return storage.data_ptr()


def _size(tensor: Tensor) -> int:
    """Bytes of memory that a tensor touches: an expanded one is small."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def record_step(config: ModelConfig, batch: int, *, bf16_tokens: bool = False) -> list[Operation]:
    """Record a forward and backward pass with bf16 autocast over a batch of images, on the CUDA device."""
    model = build_model(config).to("cuda")
    model.bf16_tokens = bf16_tokens
    images = torch.zeros(batch, config.channels, *config.image_hw, device="cuda")
    noise = torch.zeros(batch, config.num_patches, device="cuda")

    with Recorder() as recorder:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(images, noise).sample_loss.sum()
        loss.backward()
    return recorder.operations


# --- Estimate -------------------------------------------------------------------------------------------------------


def estimate(operations: list[Operation], form: Form) -> Estimate:
    """The kernels of a recorded step in one form."""
    if form == "eager":
        return Estimate([_kernel(operation.name, [operation], set()) for operation in operations])
    groups = _fuse(operations)
    used_after: list[set[int]] = []
    later: set[int] = set()
    for group in reversed(groups):
        used_after.append(set(later))
        later |= {key for operation in group for key in operation.reads}
    used_after.reverse()
    kernels = []
    for group, needed in zip(groups, used_after, strict=True):
        name = group[0].name if group[0].is_product else "elementwise and reductions"
        kernels.append(_kernel(name, group, needed))
    if form == "fused":
        kernels = _with_epilogues(groups, kernels, used_after)
    return Estimate(kernels)


def _kernel(name: str, group: list[Operation], needed: set[int]) -> Kernel:
    """A kernel that runs some operations. Of several, it keeps to itself what nobody needs afterwards."""
    if len(group) == 1:
        (operation,) = group
        # Kernels of attention load query, key and value, also where they are one tensor.
        times = 3 if operation.is_attention else 1
        reads = sum(operation.reads.values()) + (times - 1) * max(operation.reads.values(), default=0)
        return Kernel(name, operation.flops, reads + sum(operation.writes.values()))
    written: dict[int, int] = {}
    read: dict[int, int] = {}
    for operation in group:
        for key, size in operation.reads.items():
            if key not in written:
                read[key] = max(size, read.get(key, 0))
        for key, size in operation.writes.items():
            written[key] = max(size, written.get(key, 0))
    kept = sum(size for key, size in written.items() if key in needed)
    return Kernel(name, 0, sum(read.values()) + kept)


def _fuse(operations: Iterable[Operation]) -> list[list[Operation]]:
    """Operations between two products form a group; a product is a group of its own."""
    groups: list[list[Operation]] = []
    for operation in operations:
        if operation.is_product or not groups or groups[-1][0].is_product:
            groups.append([operation])
        else:
            groups[-1].append(operation)
    return groups


def _with_epilogues(groups: list[list[Operation]], kernels: list[Kernel], used_after: list[set[int]]) -> list[Kernel]:
    """Let each group after a product start from the product's result while that is still on the chip."""
    fused: list[Kernel] = []
    for i, (group, kernel) in enumerate(zip(groups, kernels, strict=True)):
        if group[0].is_attention:
            largest = max(group[0].reads.values())
            backward = "backward" in group[0].name
            # One tensor is loaded instead of three, and one gradient written instead of three.
            saved = 2 * largest + (2 * max(group[0].writes.values()) if backward else 0)
            kernel = Kernel(kernel.name, kernel.flops, kernel.bytes - saved)
        before = groups[i - 1][0] if i else None
        if not group[0].is_product and before is not None and before.is_product and not before.is_attention:
            (result, size), *_ = before.writes.items()
            reads = {key for operation in group for key in operation.reads}
            if result in reads:
                saved = size + (0 if result in used_after[i] else size)
                last = fused.pop()
                kernel = Kernel(last.name, last.flops, last.bytes + kernel.bytes - saved)
        fused.append(kernel)
    return fused


def scaled(small: Estimate, large: Estimate, small_batch: int, large_batch: int, batch: int) -> Estimate:
    """Extrapolate from two small batches: FLOPs and bytes of each kernel are linear in the number of images."""
    share = (batch - small_batch) / (large_batch - small_batch)
    return Estimate(
        [
            Kernel(a.name, round(a.flops + share * (b.flops - a.flops)), round(a.bytes + share * (b.bytes - a.bytes)))
            for a, b in zip(small.kernels, large.kernels, strict=True)
        ]
    )


# --- A whole step ---------------------------------------------------------------------------------------------------

_OPTIMIZER_BYTES = 40
"""By parameter, in fp32: its gradient is read for the norm, read and written by clipping; AdamW reads weight, gradient
and both moments, and writes all but the gradient."""


@dataclass
class StepEstimate:
    """The least time of a training step, and what takes it."""

    seconds: float
    bytes: float
    parts: dict[str, float]
    """Seconds by kind of kernel, the longest first."""


def estimate_steps(
    config: ModelConfig, batch: int, device: Device, *, bf16_tokens: bool = False
) -> dict[Form, StepEstimate]:
    """Estimate a training step with bf16 autocast in each form. Layers are alike, so few of them are recorded."""
    assert config.decoder_depth is not None  # set by the config's validation
    depths = ((1, 1), (2, 1), (1, 2))
    small = config.dim // (config.num_patches + 1) + 2  # ISTA takes its one product for more tokens than dimensions
    records = [
        [
            record_step(
                config.model_copy(update={"depth": depth, "decoder_depth": decoder_depth}),
                images,
                bf16_tokens=bf16_tokens,
            )
            for images in (small, small + 1)
        ]
        for depth, decoder_depth in depths
    ]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    optimizer = Kernel("optimizer", 0, _OPTIMIZER_BYTES * parameters)
    found: dict[Form, StepEstimate] = {}
    for form in FORMS:
        smallest, encoder, decoder = (
            scaled(estimate(few, form), estimate(more, form), small, small + 1, batch) for few, more in records
        )
        more_encoder, more_decoder = config.depth - 1, config.decoder_depth - 1
        weighted = ((smallest, 1 - more_encoder - more_decoder), (encoder, more_encoder), (decoder, more_decoder))
        parts: dict[str, float] = defaultdict(float, optimizer=optimizer.seconds(device))
        for estimated, weight in weighted:
            for name, seconds in estimated.by_name(device).items():
                parts[name] += weight * seconds
        found[form] = StepEstimate(
            seconds=sum(parts.values()),
            bytes=optimizer.bytes + sum(weight * estimated.bytes for estimated, weight in weighted),
            parts=dict(sorted(parts.items(), key=lambda part: -part[1])),
        )
    return found


def estimate_presets(config: BenchmarkRooflineConfig) -> dict[str, Any]:
    """All figures, as plain data: `presets[preset][form]`.

    Raises:
        UserError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise UserError(
            "the roofline records a step on a CUDA device, and torch finds none here; run it on a machine with a GPU, "
            "or `python -m tests.gpu_emulated.roofline` in a clone"
        )
    device = Device(config.peak_flops * config.reached, config.bytes_per_second * config.reached)
    presets: dict[str, Any] = {}
    for preset in config.presets:
        model = CrateMAEConfig(preset=preset, image_size=config.image_size)
        flops = training_flops(model, config.batch_size)  # without what kernels compute twice
        presets[preset] = {}
        for form, step in estimate_steps(model, config.batch_size, device, bf16_tokens=config.bf16_tokens).items():
            attention = sum(seconds for name, seconds in step.parts.items() if any(part in name for part in _ATTENTION))
            products = sum(seconds for name, seconds in step.parts.items() if name in _PRODUCTS)
            presets[preset][form] = {
                "seconds": step.seconds,
                "flops": flops,
                "bytes": step.bytes,
                "mfu": flops / step.seconds / config.peak_flops,
                "products": products,
                "attention": attention,
                "rest": step.seconds - products - attention,
                "parts": step.parts,
            }
    return {"presets": presets, "settings": config.model_dump(mode="json", exclude={"json_file"})}
