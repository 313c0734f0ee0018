"""Batches on the device: the CPU's pixels, without waiting, and each memory on the stream that writes it."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crate_ray.config import DataConfig, ImageModelConfig, PrepareConfig
from crate_ray.data.batch import Batch
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.loader import Loader, training_loader
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.order.plan import plan_order
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import open_source
from crate_ray.storage.interface import open_storage
from tests.gpu_emulated.device import recorded, syncs

BATCH, STEPS = 12, 5
MODEL = ImageModelConfig(image_size=32, patch_size=8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(60):
        coarse = random.integers(0, 255, (4, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((90, 70), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg", quality=95)
    config = PrepareConfig(source=folder.as_posix(), output=str(tmp_path_factory.mktemp("packed")))
    output = open_storage(config.output, config.s3)
    pack(open_source(open_storage(config.source, config.s3)), output, config)
    return load_dataset(output)


def loader(photos: ShardSet, device: str, **data: Any) -> Loader:
    config = DataConfig(train=photos.storage.uri, decode_threads=2, **data)
    mixture = Mixture.of(photos)
    order = plan_order(mixture, config, batch_size=BATCH, seed=0, workers=1)
    return training_loader(mixture, order, MODEL, config, steps=range(STEPS), device=torch.device(device))


@pytest.fixture
def expected(photos: ShardSet) -> list[Batch]:
    with loader(photos, "cpu") as batches:
        return list(batches)


def test_batches_decoded_on_the_host_are_copied_ahead(photos: ShardSet, expected: list[Batch]) -> None:
    with recorded() as events, loader(photos, "cuda") as batches:
        found = list(batches)
    assert syncs(events) == []
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys == other.keys and batch.images.is_cuda and torch.equal(batch.images.cpu(), other.images)
    copies = [event for event in events if event.kind == "copy"]
    (feed,) = {event.stream for event in copies}
    assert len(copies) == STEPS
    waits = [event for event in events if event.kind == "wait"]
    assert len(waits) == STEPS and all(f"for an event of {feed}" in wait.detail for wait in waits)
    assert all(wait.stream != feed for wait in waits)


def test_batches_decoded_on_the_device_use_each_memory_on_its_stream(
    photos: ShardSet, expected: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = StandInForTorchvision()
    for name, module in decoder.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    with recorded() as events, loader(photos, "cuda", decode_device="cuda") as batches:
        found = list(batches)
    differences = []
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys == other.keys and batch.images.is_cuda
        differences.append((batch.images.cpu().float() - other.images.float()).abs().mean().item())
    assert max(differences) < 2

    (feed,) = {event.stream for event in events if event.kind == "allocation" and event.detail == "Byte[12,3,32,32,]"}
    (pictures,) = decoder.streams
    caller = next(event.stream for event in events if event.kind == "wait" and event.stream not in (feed, pictures))
    assert len({feed, pictures, caller}) == 3
    # nvJPEG writes pictures without waiting for anybody, so nothing else may have had their memory.
    own = [event for event in events if event.stream == pictures and event.kind == "allocation"]
    assert len(own) == decoder.count == BATCH * STEPS
    # Their memory is not reused before they are read, nor that of batches.
    kept = [event.detail for event in events if event.kind == "record_stream"]
    assert sum(detail.endswith(feed) for detail in kept) == BATCH * STEPS
    assert kept.count(f"(12, 3, 32, 32) {caller}") == STEPS


class StandInForTorchvision:
    """`torchvision.io` as far as it is used: decodes into memory of the current stream, as nvJPEG does."""

    def __init__(self) -> None:
        self.streams: set[str] = set()
        self.count = 0

    def decode_jpeg(self, contents: list[Tensor], mode: str, device: torch.device) -> list[Tensor]:
        stream: Any = torch.cuda.current_stream()
        self.streams.add(stream.name)
        self.count += len(contents)
        return [self._decode(content, mode).to(device) for content in contents]

    @staticmethod
    def _decode(content: Tensor, mode: str) -> Tensor:
        image = Image.open(io.BytesIO(content.numpy().tobytes())).convert(mode)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def modules(self) -> dict[str, ModuleType]:
        package, module = ModuleType("torchvision"), ModuleType("torchvision.io")
        vars(module).update(decode_jpeg=self.decode_jpeg, ImageReadMode=SimpleNamespace(RGB="RGB", GRAY="L"))
        vars(package).update(io=module)
        return {"torchvision": package, "torchvision.io": module}
