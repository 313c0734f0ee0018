"""Settings of a pretraining run that follow from its data and the machine: `crate-ray pretrain --data PATH`.

`choose` is a pure function: the same facts always give the same settings, so that the same command resumes its run.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from crate_ray.config.base import Kind
from crate_ray.config.models import CRATE_PRESETS
from crate_ray.config.training import OptimConfig

GIB = 2**30
_GPU_PRESETS = ((20_000, "tiny"), (200_000, "small"), (5_000_000, "base"))
_NICE_EPOCHS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 400, 600, 800)
_BASE_LR, _LEAST_LR = 1.5e-4, 5e-4
_LION = 5  # Lion's learning rate is 3 to 10 times smaller than AdamW's, its weight decay as much larger (2302.06675)
_FEW_PATCHES = 16  # with so few patches, hide only half of them
_MOST_IMAGES_HELD_OUT = 10_000


@dataclass(frozen=True)
class DataFacts:
    """Facts about the training data."""

    num_samples: int
    kind: Kind
    channels: int
    height: int
    """Height in pixels: the same for all samples, or the median of some."""
    width: int
    same_size: bool
    """Whether all samples have this size."""
    num_held_out: int = 0
    """Number of validation samples."""


@dataclass(frozen=True)
class MachineFacts:
    """Facts about the machine, or about the Ray cluster."""

    gpus: int
    gpu_bytes: int
    """Memory of one GPU; 0 without GPUs."""
    cpus: int
    memory_bytes: int
    """Main memory of one node."""
    nodes: int = 1

    @property
    def workers(self) -> int:
        """One worker per GPU; without GPUs, one per node."""
        return self.gpus or self.nodes

    @property
    def device(self) -> Literal["GPU", "CPU"]:
        """Kind of device that trains the model."""
        return "GPU" if self.gpus else "CPU"

    def describe(self) -> str:
        """The machine in words, for the user."""
        where = f"{self.nodes} nodes" if self.nodes > 1 else "this machine"
        what = _count(self.gpus, "GPU") if self.gpus else f"{_count(self.cpus, 'CPU core')} and no GPU"
        return f"{where}, with {what}"


@dataclass(frozen=True)
class Choice:
    """Settings by group, and why they were chosen."""

    settings: dict[str, dict[str, Any]]
    reasons: dict[str, str]
    """Reasons by subject: images, model, batch, length."""


def choose(data: DataFacts, machine: MachineFacts, given: dict[str, Any] | None = None) -> Choice:
    """Settings for a pretraining of CRATE-MAE on this data and machine.

    Args:
        data: facts about the training data.
        machine: facts about the machine.
        given: settings that the user gave, nested, not validated. The other settings are chosen to fit them. The result
            does not repeat them.

    Returns:
        Settings that PretrainConfig accepts when `given` is merged over them, and the reasons.
    """
    given = given or {}
    model, training, optim, scaling = (dict(given.get(g) or {}) for g in ("model", "training", "optim", "scaling"))
    hw, image_reason = _image_size(data, machine, _pair(model.get("image_size")))
    patch = _pair(model.get("patch_size")) or _patch_size(hw)
    patches = max(1, hw[0] // patch[0]) * max(1, hw[1] // patch[1])
    preset, preset_reason = _preset(data, machine, max(hw), model.get("preset"))
    workers = _largest(scaling.get("workers")) or machine.workers
    batch, batch_reason = _batch_size(data, machine, workers, _number(training.get("batch_size")))
    workers = min(workers, batch)
    micro = _micro_batch(preset, patches, machine)
    lr = max(_BASE_LR * batch / 256, _LEAST_LR)
    rule = f"{_BASE_LR:g} × batch / 256"
    lr_reason = rule if lr > _LEAST_LR else f"{rule}, but at least {_LEAST_LR:g}"
    decay: dict[str, float] = {}
    if optim.get("optimizer") == "lion" and not (optim.get("lr") or optim.get("base_lr")):
        lr, lr_reason = lr / _LION, f"{lr_reason}, divided by {_LION} for Lion"
        decay = {"weight_decay": OptimConfig().weight_decay * _LION}
    epochs, length_reason = _epochs(data, machine, patches)
    steps = _steps(training, epochs, max(1, data.num_samples // batch))
    every = min(500, max(10, steps // 10))
    settings: dict[str, dict[str, Any]] = {
        "model": {
            "image_size": hw[0] if hw[0] == hw[1] else list(hw),
            "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
            "channels": data.channels,
            **({"mask_ratio": 0.5} if patches <= _FEW_PATCHES else {}),
            **({} if _has_sizes(model) else {"preset": preset}),
        },
        "training": {"batch_size": batch, "epochs": epochs},
        "optim": {"lr": lr, **decay},
        "scaling": {"workers": workers},
        "checkpoint": {"every_steps": every},
        "tracking": {"picture_every": every},
    }
    if data.num_held_out:
        settings["training"]["validate_every"] = every
    if ceil(batch / workers) > micro:
        settings["training"]["micro_batch_size"] = micro
    if data.kind == "grid":  # a crop or a mirror image of a spectrogram is another sound
        settings["data"] = {"crop_scale": [1, 1], "flip": False}
    sizes = "its sizes are given" if _has_sizes(model) else preset_reason
    reasons = {
        "images": f"{hw[0]} × {hw[1]} pixels in patches of {patch[0]} × {patch[1]}: {image_reason}",
        "model": f"{'crate-mae' if _has_sizes(model) else preset}: {sizes}",
        "batch": f"{batch}: {batch_reason}; learning rate {_shown_lr(optim, lr, lr_reason)}",
        "length": f"{_shown_length(training, epochs, steps)}: {length_reason}; {_count(workers, 'worker')} on "
        f"{machine.describe()}",
    }
    return Choice(_without(settings, given), reasons)


def default_batch_size(num_samples: int, workers: int) -> int:
    """Batch size of a run that does not set it: 256, or with fewer samples a power of two that makes four batches.

    It is at least one sample per worker, and at most the number of samples.
    """
    if num_samples >= 256:
        return 256
    return max(1, min(max(_power_of_two(num_samples / 4), workers, 2), num_samples))


def held_out_count(num_samples: int) -> int:
    """Number of samples to hold out for validation: none of fewer than 50, 10 % of fewer than 5,000, else 5 %.

    At most 10,000.
    """
    if num_samples < 50:
        return 0
    share = 0.05 if num_samples >= 5_000 else 0.1
    return min(int(num_samples * share), _MOST_IMAGES_HELD_OUT)


def _image_size(data: DataFacts, machine: MachineFacts, given: tuple[int, int] | None) -> tuple[tuple[int, int], str]:
    if given:
        return given, "given"
    height, width = data.height, data.width
    grid, most = data.kind == "grid", 224 if machine.gpus else 128
    if data.same_size and max(height, width) <= most and (grid or height == width):
        hw = _rounded(height), _rounded(width)
        return hw, f"all samples are {height} × {width}"
    if grid:
        scale = min(1, most / max(height, width))
        hw = _rounded(max(1, round(height * scale))), _rounded(max(1, round(width * scale)))
        return hw, f"samples are {height} × {width}, at most {most} on a {machine.device}"
    shortest = min(height, width)
    side = _rounded(min(shortest, most))
    return (side, side), f"half of the images have a side of {shortest} or more, at most {most} on a {machine.device}"


def _patch_size(hw: tuple[int, int]) -> tuple[int, int]:
    """The largest power of two up to 16 that divides each side into at least 8 patches. If there is none, 2 or 1."""

    def of(side: int) -> int:
        fitting = [p for p in (16, 8, 4, 2) if side % p == 0 and side // p >= 8]
        return fitting[0] if fitting else 2 if side % 2 == 0 and side > 2 else 1

    patch = min(of(hw[0]), of(hw[1]))
    return patch, patch


def _preset(data: DataFacts, machine: MachineFacts, side: int, given: Any) -> tuple[str, str]:
    if given in CRATE_PRESETS:
        return str(given), "given"
    if not machine.gpus:
        return "tiny", "the smallest published size, because there is no GPU"
    preset = next((name for limit, name in _GPU_PRESETS if data.num_samples < limit), "large")
    reason = f"the size for {_count(data.num_samples, 'image')}"
    if side <= 64 and preset in ("base", "large"):
        return "small", f"the size for images of {side} pixels"
    if machine.gpu_bytes < 8 * GIB and preset in ("base", "large"):
        return "small", f"the largest for a GPU with {machine.gpu_bytes / GIB:.0f} GiB"
    return preset, reason


def _batch_size(data: DataFacts, machine: MachineFacts, workers: int, given: int | None) -> tuple[int, str]:
    """A power of two that gives about 16 batches per epoch: 16 to 64 on a CPU, 16 to 4096 on GPUs.

    It is at least one sample per worker, and at most the number of samples.
    """
    if given:
        return given, "given"
    most = 4096 if machine.gpus else 64
    batch = min(max(_power_of_two(data.num_samples / 16), 16), most)
    batch = max(batch, min(workers, data.num_samples))
    batch = max(1, min(batch, data.num_samples))
    return batch, f"{_count(data.num_samples // batch, 'batch')} an epoch, at most {most} on a {machine.device}"


def _micro_batch(preset: str, patches: int, machine: MachineFacts) -> int:
    """Number of images, a power of two, whose activations fit into half of the memory.

    The backward pass needs about 14 d numbers per layer and token, and K per layer and pair of tokens, of 4 bytes each.
    """
    size = CRATE_PRESETS[preset]
    tokens, layers = patches + 1, 2 * size["depth"]
    per_image = 4 * layers * tokens * (14 * size["dim"] + size["num_subspaces"] * tokens)
    memory = (machine.gpu_bytes or 16 * GIB) if machine.gpus else machine.memory_bytes
    return max(1, _power_of_two(memory / 2 / per_image))


def _epochs(data: DataFacts, machine: MachineFacts, patches: int) -> tuple[int, str]:
    """Number of passes over the data: fewer for more data, but at least 10. On a CPU they take tens of minutes."""
    if machine.gpus:
        wanted, least, most = 1.5e8 / data.num_samples, 10, 800
    else:
        wanted, least, most = 12_000 * 196 / patches / data.num_samples, 10, 400
    wanted = min(max(wanted, least), most)
    epochs = max(epoch for epoch in _NICE_EPOCHS if epoch <= wanted)
    return epochs, f"for {_count(data.num_samples, 'image')} on a {machine.device}"


def _steps(training: dict[str, Any], epochs: int, per_epoch: int) -> int:
    if steps := _number(training.get("steps")):
        return steps
    try:
        return ceil(float(training.get("epochs") or epochs) * per_epoch)
    except (TypeError, ValueError):
        return epochs * per_epoch


def _shown_lr(optim: dict[str, Any], lr: float, reason: str) -> str:
    if optim.get("lr") or optim.get("base_lr"):
        return "as given"
    return f"{lr:.2g} ({reason})"


def _shown_length(training: dict[str, Any], epochs: int, steps: int) -> str:
    if training.get("steps"):
        return f"{_count(steps, 'step')} as given"
    shown = training.get("epochs") or epochs
    return f"{shown} epochs = {_count(steps, 'step')}"


def _has_sizes(model: dict[str, Any]) -> bool:
    """Whether the user gave sizes of the model without a preset. Then no preset is chosen."""
    sizes = {"dim", "depth", "num_subspaces", "num_heads", "decoder_depth", "decoder_dim"}
    return model.get("preset") is None and bool(sizes & set(model))


def _without(settings: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings without those that the user gave."""
    out = {}
    for group, values in settings.items():
        mine = given.get(group) or {}
        out[group] = {name: value for name, value in values.items() if name not in mine}
    return out


def _rounded(side: int) -> int:
    """Round a side down so that patches divide it: to a multiple of 16 from 128 on, 8 from 64, 4 from 32, else 2."""
    step = next((step for least, step in ((128, 16), (64, 8), (32, 4), (2, 2)) if side >= least), 1)
    return side // step * step


def _power_of_two(value: float) -> int:
    """The largest power of two up to a value; 1 for values below 1."""
    return 2 ** (int(value).bit_length() - 1) if value >= 1 else 1


def _number(value: Any) -> int | None:
    """A positive whole number, given as a number or as text. None for anything else, which validation refuses later."""
    try:
        return int(value) if int(value) > 0 else None
    except (TypeError, ValueError):
        return None


def _pair(value: Any) -> tuple[int, int] | None:
    """One number or two as height and width."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = [_number(part) for part in parts]
    if not numbers or None in numbers or len(numbers) > 2:
        return None
    return numbers[0] or 0, numbers[-1] or 0


def _largest(workers: Any) -> int | None:
    pair = _pair(workers)
    return max(pair) if pair else None


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("ch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"
