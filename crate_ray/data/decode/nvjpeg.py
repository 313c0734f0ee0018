"""JPEG decoding on the GPU by nvJPEG (through torchvision), with the interface of decode_batch.

Images that nvJPEG cannot read, or might read differently, are decoded on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_ray.config import Kind
from crate_ray.data.decode.errors import MAX_PIXELS, DecodeError
from crate_ray.data.decode.samples import decode_batch, read_image_header
from crate_ray.data.decode.transforms import CropRule, Int64
from crate_ray.errors import UserError


def decode_batch_cuda(
    encoded: Sequence[bytes | memoryview], kind: Kind, crop: CropRule, out: Tensor, *, max_pixels: int = MAX_PIXELS
) -> list[DecodeError | None]:
    """decode_batch with `out` on a CUDA device. The work is queued on the current stream.

    Damage in the middle of a complete JPEG may go unnoticed. Call `check_nvjpeg` first.
    """
    if kind == "grid":
        return _through_cpu(encoded, kind, crop, out, np.arange(len(encoded)), max_pixels)
    sizes, plain = np.ones((len(encoded), 2), np.int64), np.zeros(len(encoded), np.bool_)
    for i, content in enumerate(encoded):
        try:
            height, width, plain[i] = read_image_header(content, max_pixels=max_pixels)
            sizes[i] = height, width
        except DecodeError:  # reported by the CPU decoder
            pass
    crops = crop(sizes[:, 0], sizes[:, 1])
    on_device = np.flatnonzero(plain)
    try:
        pictures = _nvjpeg(out, [encoded[i] for i in on_device.tolist()]) if len(on_device) else []
    except RuntimeError:  # one of them is damaged, but it is not known which one
        pictures, on_device, plain = [], on_device[:0], np.zeros_like(plain)
    for i, picture in zip(on_device.tolist(), pictures, strict=True):
        top, left, height, width, flip = (column[i].item() for column in crops)
        view = picture[None, :, top : top + height, left : left + width].float()
        resized = F.interpolate(view, size=out.shape[2:], mode="bicubic", antialias=True)[0].round_().clamp_(0, 255)
        out[i].copy_(resized.flip(-1) if flip else resized)
    others = np.flatnonzero(~plain)
    return _through_cpu(encoded, kind, lambda heights, widths: crops.take(others), out, others, max_pixels)


def _through_cpu(
    encoded: Sequence[bytes | memoryview],
    kind: Kind,
    crop: CropRule,
    out: Tensor,
    rows: Int64,
    max_pixels: int,
) -> list[DecodeError | None]:
    errors: list[DecodeError | None] = [None] * len(encoded)
    decoded = torch.empty(len(rows), *out.shape[1:], dtype=out.dtype, pin_memory=True)
    found = decode_batch([encoded[i] for i in rows.tolist()], kind, crop, decoded, max_pixels=max_pixels)
    for i, error in zip(rows.tolist(), found, strict=True):
        errors[i] = error
    # Synchronous, because the pinned memory may be reused after this call.
    out[torch.from_numpy(rows).to(out.device)] = decoded.to(out.device)
    return errors


def _nvjpeg(out: Tensor, contents: Sequence[bytes | memoryview]) -> list[Tensor]:
    """Decoded pictures on out's device, (C, height, width) uint8 each, for use on the current stream.

    torchvision takes memory for the pictures from the pool of the current stream, and writes it on a stream of its own,
    without waiting for work that is queued on the current one. So the pictures have a stream, and a pool of memory, to
    themselves. The allocator reuses a picture's memory only when its last reader has finished (`record_stream`).
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    mode = ImageReadMode.GRAY if out.shape[1] == 1 else ImageReadMode.RGB
    tensors = [torch.from_numpy(np.frombuffer(content, np.uint8).copy()) for content in contents]
    reader, pictures_only = torch.cuda.current_stream(out.device), _picture_stream(out.device)
    with torch.cuda.stream(pictures_only):
        pictures = list(decode_jpeg(tensors, mode=mode, device=out.device))
    reader.wait_stream(pictures_only)
    for picture in pictures:
        picture.record_stream(reader)
    return pictures


@lru_cache
def _picture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def check_nvjpeg(device: torch.device) -> None:
    """Raise UserError if decode_batch_cuda cannot work: no CUDA device, or no torchvision that matches torch."""
    if device.type != "cuda":
        raise UserError(
            f"data.decode_device 'cuda' needs a CUDA device, not {device}: set it to 'cpu', or use a machine with a GPU"
        )
    try:
        import torchvision.io  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:  # missing, or built for another torch
        raise UserError(
            f"data.decode_device 'cuda' needs torchvision, which cannot be imported ({error}): "
            "install the torchvision that belongs to this torch, or set it to 'cpu'"
        ) from error
