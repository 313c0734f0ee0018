"""`.npy` grids of any number of channels, types and orders of axes, and channels that are the same everywhere."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from crate_ray.cli import parse_config
from crate_ray.config import CrateMAEConfig, DataConfig, PrepareConfig, PretrainConfig
from crate_ray.data.batch import Batch
from crate_ray.data.decode.errors import DecodeError
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.manifest import Manifest
from crate_ray.data.format.npy import content_of
from crate_ray.data.order.mixture import Mixture
from crate_ray.data.prepare.indexing import index_existing
from crate_ray.data.prepare.packing import pack, shard_writer
from crate_ray.data.prepare.sources import Item, Source
from crate_ray.data.prepare.statistics import DatasetStatistics, grid_statistics
from crate_ray.data.stream import stream
from crate_ray.errors import UserError
from crate_ray.evaluation.evaluated_model import EvaluatedModel, check_input
from crate_ray.evaluation.masks import to_float_image
from crate_ray.evaluation.reconstruction import measure_reconstruction
from crate_ray.jobs import prepare
from crate_ray.models import build_model
from crate_ray.models.exported import ModelDescription, Normalizer
from crate_ray.runs.planning import plan_run
from crate_ray.serving import FeatureExtractor
from crate_ray.storage.local import LocalStorage
from crate_ray.training.probe_batch import ProbeBatch

Grids = list[NDArray[Any]]


def grids(count: int, *shape: int, seed: int = 0) -> Grids:
    return list(np.random.default_rng(seed).normal(1000, 300, (count, *shape)).astype(np.float32))


def packed(folder: Path, arrays: Grids, **options: Any) -> Manifest:
    contents = map(content_of, arrays)
    items = [Item(f"{i}.npy", lambda c=content: {"npy": c}) for i, content in enumerate(contents)]  # type: ignore[misc]
    return pack(Source(items), LocalStorage(folder), PrepareConfig(output="unused", shuffle=False, **options))


def write_shard(folder: Path, arrays: Grids) -> None:
    folder.mkdir(parents=True)
    with (folder / "a.tar").open("wb") as file, shard_writer(file) as writer:
        for number, array in enumerate(arrays):
            writer.write({"__key__": f"{number}", "npy": content_of(array)})


def read(folder: Path, channels: int, hw: tuple[int, int], count: int) -> torch.Tensor:
    options: dict[str, Any] = {"crop_scale": (1, 1), "flip": False, "shuffle": False}
    with stream(str(folder), batch_size=count, image_size=hw, channels=channels, steps=1, **options) as batches:
        (batch,) = batches
        assert not batches.bad.counts
    return batch.images


# --- Channels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_runs_of_any_number_of_channels_are_planned(channels: int, tmp_path: Path) -> None:
    packed(tmp_path / "data", grids(8, channels, 40, 48))

    def plan(model_channels: int) -> int:
        flags = {
            "name": "x", "storage": tmp_path / "runs", "data.train": tmp_path / "data", "training.batch_size": 4,
            "data.validation": tmp_path / "data", "model.channels": model_channels, "model.image_size": 32,
            "training.steps": 2,
        }  # fmt: skip
        config = parse_config(PretrainConfig, [f"--{name}={value}" for name, value in flags.items()])
        return plan_run(config, config.model).total_steps

    assert plan(channels) == 2
    with pytest.raises(
        UserError, match=rf"the model has 5 channels, .* have {channels}; set model.channels {channels}$"
    ):
        plan(5)


def test_images_are_read_with_one_or_three_channels(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    pack(
        Source([Item("a", lambda: {"png": file.getvalue()})] * 4),
        LocalStorage(tmp_path),
        PrepareConfig(output="unused"),
    )
    flags = [
        "--name=x",
        f"--storage={tmp_path}",
        f"--data.train={tmp_path}",
        "--model.channels=2",
        "--training.steps=1",
    ]
    config = parse_config(PretrainConfig, flags)
    with pytest.raises(
        UserError, match=r"the model has 2 channels, but .* holds images, .* 1 or 3; set model.channels 3"
    ):
        plan_run(config, config.model)


@pytest.mark.parametrize("channels", [2, 13])
def test_models_refuse_grids_of_other_channels(channels: int, tmp_path: Path) -> None:
    manifest = packed(tmp_path, grids(4, channels, 16, 16))
    numbers = (0.0,) * 3, (1.0,) * 3
    description = ModelDescription(model=CrateMAEConfig(), mean=numbers[0], std=numbers[1], kind="grid")
    with pytest.raises(UserError, match=rf"takes grids of 3 channels, but those of there have {channels}; give other"):
        check_input(description, manifest, "there")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_pictures_and_errors_of_grids_are_finite_and_scaled_by_channel(channels: int, tmp_path: Path) -> None:
    """Channels of other magnitudes, and one that is the same everywhere."""
    arrays = [array * 10.0 ** np.arange(channels)[:, None, None] for array in grids(8, channels, 16, 16)]
    for array in arrays:
        array[channels // 2] = 7
    manifest = packed(tmp_path, arrays)
    config = CrateMAEConfig(image_size=16, patch_size=4, dim=16, num_subspaces=2, depth=2, channels=channels)
    model = build_model(config)
    probe = ProbeBatch(
        load_dataset(LocalStorage(tmp_path)),
        config,
        DataConfig(train="unused"),
        Normalizer.of(manifest.mean, manifest.std),
    )
    result = probe.draw(probe.observe(model, 0))
    assert all(np.isfinite(list(result.metrics.values())))
    with Image.open(io.BytesIO(result.pictures["reconstruction"])) as picture:
        first = np.asarray(picture)[4:100, 4:100]
    contrast = [np.ptp(first[..., c]) > 100 for c in range(3)]
    assert contrast == {1: [False] * 3, 3: [True, False, True]}.get(channels, [True] * 3)
    description = ModelDescription(model=config, mean=manifest.mean, std=manifest.std, kind="grid")
    batch = Batch(0, np.zeros(8, np.int64), probe.images, np.arange(8), [""] * 8, None)
    cpu = torch.device("cpu")
    found, pictures = measure_reconstruction([EvaluatedModel("trained", model, description)], [batch], [0.5], "x", cpu)
    assert np.isfinite([errors.pixel_mse.value for one in found.predictors.values() for errors in one.ratios]).all()
    assert ((pictures.original > -1e-6) & (pictures.original < 1 + 1e-6)).all()
    assert np.isfinite(to_float_image(probe.images)).all()


# --- Channels that are the same everywhere --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, -1234567.8, 1e30])
def test_a_constant_channel_is_told_and_becomes_0(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = grids(60, 3, 9, 11)
    for array in arrays:
        array[1] = value
    manifest = packed(tmp_path / "a", arrays)
    assert "channel 2 of 3 is " in caplog.text and "models see 0 there" in caplog.text
    assert "channel 1" not in caplog.text and "channel 3" not in caplog.text
    assert manifest.std[1] == 0 and manifest.mean[1] == np.float32(value)
    packed(tmp_path / "b", arrays[:40])
    both = Mixture(tuple(load_dataset(LocalStorage(tmp_path / name)) for name in "ab"), (2, 1))
    for mean, std in ((manifest.mean, manifest.std), both.mean_std):
        normalizer = Normalizer.of(mean, std)
        images = read(tmp_path / "a", 3, (8, 8), 60)
        normalised = normalizer(images)
        assert not normalised[:, 1].any() and normalised.isfinite().all()
        assert normalised[:, [0, 2]].std() == pytest.approx(1, abs=0.3)
        assert torch.allclose(normalizer.undo(normalised), images, rtol=1e-4)


def test_a_black_channel_of_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def image(seed: int) -> dict[str, bytes]:
        pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)
        pixels[..., 2] = 128
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return {"png": file.getvalue()}

    source = Source([Item(f"{seed}", lambda seed=seed: image(seed)) for seed in range(50)])  # type: ignore[misc]
    manifest = pack(source, LocalStorage(tmp_path), PrepareConfig(output="unused"))
    assert f"channel 3 of 3 is {128 / 255:g}" in caplog.text and manifest.std[2] == 0 < min(manifest.std[:2])
    caplog.clear()
    index_existing(LocalStorage(tmp_path), overwrite=True)
    assert "channel 3 of 3" in caplog.text


@given(st.lists(st.integers(0, 3), min_size=2, max_size=5))
def test_constant_channels_are_those_whose_values_are_all_equal(values: list[int]) -> None:
    statistics = DatasetStatistics()
    for value in values:
        part = DatasetStatistics()
        part.add(grid_statistics(content_of(np.stack([np.full((2, 3), value), np.full((2, 3), 5)]))))
        statistics.merge(DatasetStatistics.model_validate_json(part.model_dump_json()))
    assert statistics.constants() == ({0: values[0]} if len(set(values)) == 1 else {}) | {1: 5}


def test_numbers_far_from_0_are_centred(tmp_path: Path) -> None:
    arrays = [1_234_567 + 3 * np.random.default_rng(i).normal(size=(1, 30, 30)) for i in range(20)]
    manifest = packed(tmp_path, arrays)
    normalised = Normalizer.of(manifest.mean, manifest.std)(read(tmp_path, 1, (30, 30), 20))
    assert abs(normalised.mean()) < 0.1 and normalised.std() == pytest.approx(1, abs=0.1)


# --- Numbers --------------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_finite_are_bad_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arrays = grids(40, 2, 8, 8)
    for number, value in enumerate((np.nan, np.inf, -np.inf)):
        arrays[10 * number][1, 3, 2] = value
    assert packed(tmp_path / "packed", arrays).num_samples == 37
    assert "3 of 40 samples cannot be decoded, skipped: 0.npy (holds numbers that are not finite)" in caplog.text
    write_shard(tmp_path / "shards", arrays)
    index_existing(LocalStorage(tmp_path / "shards"))
    with stream(str(tmp_path / "shards"), batch_size=40, image_size=8, channels=2, steps=1) as batches:
        (batch,) = batches
        assert batches.bad.counts == {"not_finite": 3} and batch.images.isfinite().all()


DTYPES = ("f2", "f4", "f8", ">f4", ">f2", "i1", "u1", ">i2", "<u2", ">u4", "i8", "?")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_of_all_types_are_read_and_named(
    dtype: str, order: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).integers(0, 100, (6, 2, 9, 8))
    arrays = [np.asarray(value.astype(dtype), order=order) for value in values]
    packed(tmp_path, arrays)
    assert np.array_equal(read(tmp_path, 2, (9, 8), 6).numpy(), np.stack(arrays).astype(np.float32))
    said = " ".join(capsys.readouterr().err.split())
    name = ("big-endian " if dtype.startswith(">") else "") + np.dtype(dtype).name
    assert f"grids such as (2, 9, 8) are (channels, height, width); numbers are {name}, read as float32" in said


# --- Order of the axes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_channels_last_is_packed_as_channels_first(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = [np.asfortranarray(array) if i % 2 else array for i, array in enumerate(grids(6, 20, 24, channels))]
    manifest = packed(tmp_path / "packed", arrays)
    assert (manifest.channels, manifest.height, manifest.width) == (channels, 20, 24)
    expected = np.stack(arrays).transpose(0, 3, 1, 2)
    assert np.array_equal(read(tmp_path / "packed", channels, (20, 24), 6).numpy(), expected)
    said = " ".join(capsys.readouterr().err.split())
    assert f"grids such as (20, 24, {channels}) are (height, width, channels), stored as (channels, height, " in said
    write_shard(tmp_path / "shards", arrays)
    with pytest.raises(UserError, match=rf"one of shape \(20, 24, {channels}\), seem to be .* pack them with --source"):
        index_existing(LocalStorage(tmp_path / "shards"))


@pytest.mark.parametrize("shape", [(20, 24, 3), (8, 8, 13), (4, 4, 4), (30, 8, 5)])
def test_a_setting_decides_what_the_shape_does_not(shape: tuple[int, int, int], tmp_path: Path) -> None:
    arrays = grids(4, *shape)
    height, width, channels = shape
    last = packed(tmp_path / "last", arrays, grid_axes="HWC")
    assert (last.channels, last.height, last.width) == (channels, height, width)
    assert (tmp_path / "last/shard-000000.tar").read_bytes().count(np.moveaxis(arrays[0], 2, 0).tobytes()) == 1
    first = packed(tmp_path / "first", arrays, grid_axes="CHW")
    assert (first.channels, first.height, first.width) == shape
    write_shard(tmp_path / "shards", arrays)
    index_existing(LocalStorage(tmp_path / "shards"), grid_axes="CHW")
    with pytest.raises(UserError, match="cannot be indexed in place"):
        index_existing(LocalStorage(tmp_path / "shards"), grid_axes="HWC", overwrite=True)


def test_the_command_takes_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "shards", grids(4, 30, 8, 5))
    flags = ["--output", str(tmp_path / "shards"), "--grid_axes"]
    prepare.main(parse_config(PrepareConfig, [*flags, "CHW"]))
    assert "4 grids in 1 shard" in (said := capsys.readouterr().out) and "30 × 8×5" in said
    with pytest.raises(UserError, match="seem to be"):
        prepare.main(parse_config(PrepareConfig, [*flags, "auto", "--overwrite", "true"]))


def test_large_channels_last_grids_are_taken_and_damaged_ones_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More rows than there may be channels; pickles, cut files and other forms in between."""
    arrays = [np.ones((5000, 20, 3), np.uint8)] * 2
    contents = [content_of(array) for array in arrays]
    contents += [contents[0][:-9], b"\x80\4N.", b"", content_of(np.ones((30, 20))), content_of(np.ones((4, 20, 30, 3)))]
    items = [Item(f"{i}.npy", lambda c=content: {"npy": c}) for i, content in enumerate(contents)]  # type: ignore[misc]
    with caplog.at_level(logging.WARNING):
        manifest = pack(Source(items), LocalStorage(tmp_path), PrepareConfig(output="unused"))
    assert (manifest.num_samples, manifest.channels, manifest.height) == (2, 3, 5000)
    assert "5 of 7 samples cannot be decoded, skipped: " in caplog.text


# --- Models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [2, 13])
def test_exported_models_take_files_and_arrays(channels: int) -> None:
    config = CrateMAEConfig(image_size=16, patch_size=4, dim=16, num_subspaces=2, depth=1, channels=channels)
    mean, std = (1000.0,) * channels, (300.0,) * (channels - 1) + (0.0,)
    description = ModelDescription(model=config, mean=mean, std=std, kind="grid")
    extractor = FeatureExtractor(build_model(config), description)
    arrays = grids(3, channels, 16, 20)
    features = extractor(extractor.load(arrays))
    assert features.isfinite().all() and torch.equal(features, extractor(extractor.load([*map(content_of, arrays)])))
    with pytest.raises(DecodeError, match=rf"but the model expects \({channels}, height, width\)"):
        extractor.load([arrays[0].transpose(1, 2, 0)])
