"""Time of decoding and transforming one image in one thread, next to Pillow alone, and how it scales to two threads.

Run by hand: python tests/performance/bench_decode.py [folder of tars with JPEGs] [--repeat 5]
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from crate_ray.data.decode.samples import decode_batch, read_image_header
from crate_ray.data.decode.transforms import CROP_UNIFORMS, Crops, Int64, random_crops
from crate_ray.data.decode.turbojpeg import LIBRARY_VARIABLE, find_turbojpeg
from tests.uniforms import from_table

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "imagenet-samples"
Task = Callable[[int], None]


def read_jpegs(folder: Path, most: int) -> list[bytes]:
    """The first JPEG members of a folder's tars."""
    found: list[bytes] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.lower().endswith((".jpg", ".jpeg")) and len(found) < most:
                    found.append(tar.extractfile(info).read())  # type: ignore[union-attr]
    return found


def photographs(count: int) -> list[bytes]:
    """Pictures of 500 × 375 pixels with detail at all scales, where no folder of photographs is at hand."""
    random, contents = np.random.default_rng(0), []
    for _ in range(count):
        pixels = np.zeros((375, 500, 3))
        for cells in (4, 16, 64, 256):
            noise = random.integers(0, 256, (cells, cells, 3), np.uint8)
            pixels += np.asarray(Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)) / cells**0.5
        contents.append(jpeg(Image.fromarray((255 * pixels / pixels.max()).astype(np.uint8)), 95))
    return contents


def jpeg(image: Image.Image, quality: int) -> bytes:
    """Encode."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


def shrunk(content: bytes, side: int) -> bytes:
    """The picture with a shortest side of `side` pixels, at quality 90."""
    image = Image.open(io.BytesIO(content))
    scale = side / min(image.size)
    return jpeg(image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC), 90)


def square(content: bytes, side: int) -> bytes:
    """The middle of the picture, `side` pixels wide and high, at quality 90."""
    image = Image.open(io.BytesIO(content))
    m = min(image.size)
    left, top = (image.width - m) // 2, (image.height - m) // 2
    return jpeg(image.crop((left, top, left + m, top + m)).resize((side, side), Image.Resampling.BICUBIC), 90)


def chunk_of(size: int) -> int:
    """Images per task, as the loader would choose: little ones in larger chunks."""
    return 128 if size <= 64 else 32


def with_pillow(contents: Sequence[bytes], crops: Crops, size: int) -> Task:
    """Full decode, crop, bicubic resize, flip."""
    top, left, height, width, flip = (column.tolist() for column in crops)
    n = chunk_of(size)

    def task(chunk: int) -> None:
        for i in range(chunk * n, min((chunk + 1) * n, len(contents))):
            image = Image.open(io.BytesIO(contents[i])).convert("RGB")
            image = image.crop((left[i], top[i], left[i] + width[i], top[i] + height[i]))
            image = image.resize((size, size), Image.Resampling.BICUBIC)
            if flip[i]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            np.asarray(image)

    return task


def with_ours(contents: Sequence[bytes], u: np.ndarray, size: int) -> Task:
    """decode_batch."""
    n = chunk_of(size)

    def task(chunk: int) -> None:
        rows = slice(chunk * n, min((chunk + 1) * n, len(contents)))

        def rule(heights: Int64, widths: Int64) -> Crops:
            return random_crops(heights, widths, from_table(u[rows]), SCALE, RATIO, True)

        out = torch.empty(len(contents[rows]), 3, size, size, dtype=torch.uint8)
        if any(errors := decode_batch(contents[rows], "image", rule, out)):
            raise SystemExit(f"a sample cannot be decoded: {next(e for e in errors if e)}")

    return task


def timed(task: Task, chunks: int, threads: int) -> float:
    """Seconds for all chunks, shared by the threads."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(task, range(min(chunks, threads))))  # start threads, warm up
        start = time.perf_counter()
        list(pool.map(task, range(chunks)))
        return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=SAMPLES, help="folder of tars with JPEG members")
    parser.add_argument("--repeat", type=int, default=5, help="rounds; the best of each counts")
    options = parser.parse_args()
    originals = read_jpegs(options.folder, 512) or photographs(64)
    source = str(options.folder) if list(options.folder.glob("*.tar")) else "generated pictures"
    cases = {
        "originals → 224": (originals, 224),
        "originals → 96": (originals, 96),
        "shortest side 256 → 224": ([shrunk(content, 256) for content in originals], 224),
        "64×64 → 64": ([square(content, 64) for content in originals] * 4, 64),
        "32×32 → 32": ([square(content, 32) for content in originals] * 8, 32),
    }
    paths: dict[str, str | None] = {"crate_ray, wheels alone": ""}
    if (library := os.environ.get(LIBRARY_VARIABLE)) != "" and find_turbojpeg() is not None:
        paths["crate_ray, libjpeg-turbo 3"] = library
    print(f"{source}: {len(originals)} JPEGs; µs an image and thread, best of {options.repeat}")
    print(f"{'case':26}{'path':30}{'1 thread':>10}{'2 threads':>11}{'scaling':>9}{'× Pillow':>10}")
    for name, (contents, size) in cases.items():
        u = np.random.default_rng(0).random((len(contents), CROP_UNIFORMS))
        hw = np.array([read_image_header(content)[:2] for content in contents])
        crops = random_crops(hw[:, 0], hw[:, 1], from_table(u), SCALE, RATIO, True)
        tasks: dict[str, Task] = {"Pillow": with_pillow(contents, crops, size)}
        tasks |= dict.fromkeys(paths, with_ours(contents, u, size))
        chunks = -(-len(contents) // chunk_of(size))
        best: dict[tuple[str, int], float] = {}
        for _ in range(options.repeat):  # in turns, so that a busy machine slows all alike
            for path, task in tasks.items():
                for threads in (1, 2):
                    use_library(paths.get(path, ""))
                    seconds = timed(task, chunks, threads)
                    best[path, threads] = min(seconds, best.get((path, threads), seconds))
        for path in tasks:
            one, two = (best[path, threads] * threads / len(contents) * 1e6 for threads in (1, 2))
            ratio = best["Pillow", 2] / best[path, 2]
            print(f"{name:26}{path:30}{one:10.1f}{two:11.1f}{2 * one / two:9.2f}{ratio:10.2f}")


def use_library(path: str | None) -> None:
    """Have the next images decoded with this library; empty: without one; None: with the one found."""
    if path is None:
        os.environ.pop(LIBRARY_VARIABLE, None)
    else:
        os.environ[LIBRARY_VARIABLE] = path
    find_turbojpeg.cache_clear()


if __name__ == "__main__":
    main()
