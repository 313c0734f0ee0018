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

from crate_ray.config import (
    CrateMAEConfig,
    EvaluateConfig,
    ImageModelConfig,
    PrepareConfig,
    ProbeConfig,
    S3Config,
    TrackingConfig,
)
from crate_ray.config.data import DataConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.loader import evaluation_loader
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack, shard_writer
from crate_ray.data.prepare.sources import open_source
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.evaluation.job import run_evaluation
from crate_ray.evaluation.probe import probe_encoder
from crate_ray.models import CrateMAE
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.runs.references import load, load_encoder
from crate_ray.storage.local import LocalStorage
from crate_ray.tracking.registry import register

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
    picture = Image.new("RGB", (SIDE, SIDE), (255, 2, 3))
    picture.paste((0, 0, 0), (SIDE // 3, SIDE // 3, SIDE // 2, SIDE // 2))
    picture.save(folder / "one.png", compress_level=9)
    content = _late_exif((folder / "one.png").read_bytes())
    picture.getchannel("R").save(folder / "mask.png", compress_level=9)
    mask = _late_exif((folder / "mask.png").read_bytes())
    with (folder / "shards/x.tar").open("wb") as file, shard_writer(file) as writer:
        for number in range(COUNT):
            (folder / f"pictures/{number:02d}.png").write_bytes(content)
            label = str(number % 2).encode()
            writer.write({"__key__": f"{number:02d}", "png": content, "mask.png": mask, "cls": label})


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


def evaluate_pictures(folder: Path) -> None:
    """Reconstruction, structure, segmentation and a linear probe on the large PNGs."""
    uri, model = str(folder / "shards"), str(folder / "good")
    config = CrateMAEConfig(image_size=32, patch_size=8, dim=16, depth=1, num_subspaces=2)
    description = ModelDescription(model=config, mean=(0.5,) * 3, std=(0.25,) * 3, kind="image")
    export_model(Path(model), CrateMAE(config).state_dict(), description)
    output = str(folder / "report")
    run_evaluation(EvaluateConfig(model=model, data=uri, masks=uri, output=output), lambda line: None)
    encoder, description = load_encoder(model, TrackingConfig(), S3Config())
    shards = load_dataset(LocalStorage(folder / "shards"))
    probe_encoder(encoder, description, shards, shards, ProbeConfig(train=uri, test=uri))


def jobs(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """All jobs by name."""
    make_pictures(folder)
    make_grids(folder)
    out = LocalStorage(folder / "out")
    config = PrepareConfig(output="unused", overwrite=True)
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    for name, settings in (("prepare", config), ("prepare --max-side", config.model_copy(update={"max_side": 64}))):
        yield f"{name} pictures", lambda s=settings: pack(open_source(LocalStorage(folder / "pictures")), out, s)
    yield "prepare grids", lambda: pack(open_source(LocalStorage(folder / "grids")), out, config)
    yield "index and stream", lambda: read_stream(folder)
    yield "evaluate pictures", lambda: evaluate_pictures(folder)
    for shard in sorted((folder / "tars").glob("*")):
        yield f"prepare {shard.name}", lambda s=shard: index_existing(LocalStorage(s), overwrite=True)
        yield f"repack {shard.name}", lambda s=shard: pack(open_source(LocalStorage(s)), out, config)
    for model in sorted((folder / "models").glob("*")):
        yield f"load {model.name}", lambda m=model: load(str(m), TrackingConfig(), S3Config())
        yield f"load and register {model.name}", lambda m=model: register(str(m), "mae", tracking, S3Config())


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
