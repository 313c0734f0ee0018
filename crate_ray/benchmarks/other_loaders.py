"""Optional contestants: spdl with its own image decoder, and LitData with Pillow.

They are measured if they are installed; nothing else needs them. Stock webdataset reads the shards for them.
"""

from __future__ import annotations

import functools
import importlib
import io
import math
import os
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crate_ray.config import DataConfig

_CHUNK_BYTES = 64 * 2**20  # as in LitData's documentation


class Unavailable(Exception):  # noqa: N818 - a fact to report
    """A loader does not work on this machine; the message is one clause that says why."""


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop, as torchvision draws it with our loader's default settings."""
    (low, high), ratio = DataConfig.model_fields["crop_scale"].default, DataConfig.model_fields["crop_ratio"].default
    for _ in range(10):
        area = width * height * random.uniform(low, high)
        aspect = math.exp(random.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def random_resized_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Crop, resize (bicubic) and mirror at random: (3, size, size), uint8."""
    left, top, w, h = random_box(*image.size)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).transpose(2, 0, 1)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # of any kind, for example if a library that it needs is missing
        raise Unavailable(f"{name} cannot be imported ({_short(error)})") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- spdl -----------------------------------------------------------------------------------------------------------


@contextmanager
def spdl_batches(images: Iterable[bytes], size: int, batch_size: int) -> Iterator[Iterator[Tensor]]:
    """Batches (B, 3, size, size), uint8, of spdl: its pipeline, its decoder (FFmpeg), a thread per core.

    Args:
        images: encoded images, without end.
        size: side of the output.
        batch_size: B.

    Raises Unavailable if spdl or FFmpeg's libraries are missing.
    """
    media, pipelines = _imported("spdl.io"), _imported("spdl.pipeline")

    def decode(content: bytes) -> NDArray[np.uint8]:
        with Image.open(io.BytesIO(content)) as image:
            left, top, w, h = random_box(*image.size)
        mirror = "hflip," if random.random() < 0.5 else ""
        crop = f"crop={w}:{h}:{left}:{top}:exact=1"
        filters = f"{crop},scale={size}:{size}:flags=bicubic,{mirror}format=rgb24"
        pixels: NDArray[np.uint8] = media.to_numpy(media.load_image(content, filter_desc=filters))
        return pixels.transpose(2, 0, 1)

    source = iter(images)
    try:
        decode(next(source))
    except Exception as error:
        raise Unavailable(
            f"spdl's image decoder does not work; it needs FFmpeg's libraries ({_short(error)})"
        ) from None
    threads = len(os.sched_getaffinity(0))
    builder = pipelines.PipelineBuilder().add_source(source).pipe(decode, concurrency=threads)
    builder = builder.aggregate(batch_size, drop_last=True).pipe(_stacked).add_sink(4)
    pipeline = builder.build(num_threads=threads)
    with pipeline.auto_stop():
        yield iter(pipeline)


def _stacked(images: Sequence[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(images))


# --- LitData --------------------------------------------------------------------------------------------------------


@contextmanager
def converted_for_litdata(urls: Sequence[str], suffixes: Sequence[str], folder: str | None = None) -> Iterator[str]:
    """Convert the images of shards to LitData's format, in a folder that is deleted when the block ends.

    Raises Unavailable if LitData is missing.
    """
    litdata = _imported("litdata")
    with tempfile.TemporaryDirectory(prefix="crate-ray-litdata-", dir=folder) as temporary:
        output = str(Path(temporary) / "data")
        read = functools.partial(_images_of, suffixes=tuple(suffixes))
        # One process, because starting more would take as long as they save.
        litdata.optimize(
            fn=read, inputs=list(urls), output_dir=output, chunk_bytes=_CHUNK_BYTES, num_workers=1, verbose=False,
            start_method="fork",
        )  # fmt: skip
        yield output


def _images_of(url: str, suffixes: Sequence[str]) -> Iterator[dict[str, bytes]]:
    for (content,) in wds.WebDataset(url, shardshuffle=False).to_tuple(";".join(suffixes)):
        yield {"image": content}


@contextmanager
def litdata_batches(folder: str, size: int, batch_size: int, processes: int) -> Iterator[Iterator[Tensor]]:
    """Endless batches of LitData with Pillow, from a folder in its format."""
    litdata = _imported("litdata")

    class Images(litdata.StreamingDataset):  # type: ignore[name-defined]
        def __getitem__(self, index: Any) -> Tensor:
            with Image.open(io.BytesIO(super().__getitem__(index)["image"])) as image:
                return torch.from_numpy(random_resized_crop(image.convert("RGB"), size).copy())

    loader = litdata.StreamingDataLoader(
        Images(folder, shuffle=True), batch_size=batch_size, num_workers=processes, drop_last=True
    )

    def batches() -> Iterator[Tensor]:
        while True:
            yield from loader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on options
        yield batches()
