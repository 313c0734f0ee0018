"""Jobs on hostile files in a process of its own, whose memory is limited: `python -m tests.hostile_jobs FOLDER GIB`.

Prints a line of JSON for each job, with its time, its peak of memory and the message of its UserError.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from crate_ray.config import ImageModelConfig, PrepareConfig, S3Config, TrackingConfig
from crate_ray.config.data import DataConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.loader import evaluation_loader
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack, shard_writer
from crate_ray.data.prepare.sources import open_source
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.runs.references import load
from crate_ray.storage.local import LocalStorage

SIDE = 5000
COUNT = 16


def _late_exif(content: bytes, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = exif.tobytes()[6:]
    chunk = len(data).to_bytes(4, "big") + b"eXIf" + data + zlib.crc32(b"eXIf" + data).to_bytes(4, "big")
    at = content.index(b"IEND") - 4
    return content[:at] + chunk + content[at:]


def make_pictures(folder: Path) -> None:
    """Large PNGs of few bytes, as files and in a shard."""
    (folder / "pictures").mkdir()
    (folder / "shards").mkdir()
    Image.new("RGB", (SIDE, SIDE), (1, 2, 3)).save(folder / "one.png", compress_level=9)
    content = _late_exif((folder / "one.png").read_bytes())
    with (folder / "shards/x.tar").open("wb") as file, shard_writer(file) as writer:
        for number in range(COUNT):
            (folder / f"pictures/{number:02d}.png").write_bytes(content)
            writer.write({"__key__": f"{number:02d}", "png": content, "cls": b"1"})


def make_grids(folder: Path) -> None:
    """Grids that state more than they hold, and one as large as allowed."""
    (folder / "grids").mkdir()
    for number, shape in enumerate(["(1, 8000, 8000)", "(1, 99999, 99999)", "(9999999999, 9999999999)", "(1, 2, 2)"]):
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        data = bytes(8000 * 8000) if number == 0 else b"1234"
        (folder / f"grids/{number}.npy").write_bytes(b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + data)


def read_stream(folder: Path) -> None:
    """Two batches of the large PNGs, decoded by eight threads."""
    uri = str(folder / "shards")
    index_existing(LocalStorage(folder / "shards"), overwrite=True)
    with stream(uri, batch_size=COUNT, image_size=64, steps=2, decode_threads=8, prefetch_batches=2) as batches:
        assert sum(len(batch.images) for batch in batches) == 2 * COUNT
    data = DataConfig(train=uri, decode_threads=8)
    model = ImageModelConfig(image_size=64, patch_size=16)
    with evaluation_loader(load_dataset(LocalStorage(folder / "shards")), model, data, batch_size=COUNT) as batches:
        assert sum(len(batch.images) for batch in batches) == COUNT


def jobs(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """All jobs by name."""
    make_pictures(folder)
    make_grids(folder)
    out = LocalStorage(folder / "out")
    config = PrepareConfig(output="unused", overwrite=True)
    for name, settings in (("prepare", config), ("prepare --max-side", config.model_copy(update={"max_side": 64}))):
        yield f"{name} pictures", lambda s=settings: pack(open_source(LocalStorage(folder / "pictures")), out, s)
    yield "prepare grids", lambda: pack(open_source(LocalStorage(folder / "grids")), out, config)
    yield "index and stream", lambda: read_stream(folder)
    for shard in sorted((folder / "tars").glob("*")):
        yield f"prepare {shard.name}", lambda s=shard: index_existing(LocalStorage(s), overwrite=True)
        yield f"repack {shard.name}", lambda s=shard: pack(open_source(LocalStorage(s)), out, config)
    for model in sorted((folder / "models").glob("*")):
        yield f"load {model.name}", lambda m=model: load(str(m), TrackingConfig(), S3Config())


def main() -> None:
    """Run all jobs."""
    folder, gib = Path(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(2)
    size = int(re.findall(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + int(gib * 2**30),) * 2)
    for name, job in jobs(folder):
        print(json.dumps({"begun": name}), flush=True)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        begun, message = time.process_time(), ""
        try:
            job()
        except UserError as error:
            message = str(error)
        seconds = time.process_time() - begun
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 2**20
        print(json.dumps({"job": name, "seconds": seconds, "gib": peak, "message": message}), flush=True)


if __name__ == "__main__":
    main()
