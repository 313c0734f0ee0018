"""Models and checkpoints whose files state sizes that they do not have."""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.config import ClassifierConfig, CrateMAEConfig
from crate_ray.errors import UserError
from crate_ray.models import CrateMAE, load_published
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, export_model, load_any
from crate_ray.models.fit import check_plain_zip, safetensors_shapes
from crate_ray.runs.checkpoint_files import read_tensors, write_part
from tests.sentences import sentence_of

CONFIG = CrateMAEConfig(image_size=8, patch_size=4, dim=16, depth=2, num_subspaces=2)
DESCRIPTION = ModelDescription(model=CONFIG, mean=(0.5,) * 3, std=(0.25,) * 3, kind="image")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return CrateMAE(CONFIG).state_dict()


def refusal(folder: Path) -> str:
    begun = time.thread_time()
    with pytest.raises(UserError) as error:
        load_any(folder)
    assert time.thread_time() - begun < 5 and "\n" not in str(error.value)
    return str(error.value)


def changed_description(folder: Path, **changed: Any) -> None:
    path = folder / "model.json"
    values = json.loads(path.read_text())
    values["model"] |= changed.pop("model", {})
    path.write_text(json.dumps(values | changed))


@pytest.mark.parametrize(
    "model",
    [
        {"dim": 40_000, "subspace_dim": 20_000},
        {"dim": 4 * 10**9, "subspace_dim": 2 * 10**9},
        {"depth": 10**9, "decoder_depth": 10**9},
        {"decoder_depth": 10**9},
        {"depth": 900, "decoder_depth": 1},
        {"image_size": 4 * 10**9},
        {"image_size": 400_000},
        {"channels": 10**9},
        {"num_subspaces": 10**6},
        {"patch_size": 1, "image_size": 65_536},
    ],
    ids=str,
)
def test_configs_that_do_not_fit_the_weights(
    tmp_path: Path, weights: dict[str, torch.Tensor], model: dict[str, Any]
) -> None:
    export_model(tmp_path, weights, DESCRIPTION)
    assert torch.equal(load_any(tmp_path)[0].state_dict()["cls_token"], weights["cls_token"])
    changed_description(tmp_path, model=model)
    assert "does not hold a model" in refusal(tmp_path)


@pytest.mark.parametrize("changed", [{"dim": 40_000, "subspace_dim": 20_000}, {"decoder_depth": 10**9}, {}], ids=str)
def test_classifiers_that_do_not_fit_the_weights(tmp_path: Path, changed: dict[str, Any]) -> None:
    head = ClassifierConfig(num_classes=3)
    description = DESCRIPTION.model_copy(update={"classifier": head})
    export_model(tmp_path, Classifier(CONFIG, head).state_dict(), description)
    assert isinstance(load_any(tmp_path)[0], Classifier)
    classifier = {"classifier": head.model_dump() | {"num_classes": 10**12}} if not changed else {}
    changed_description(tmp_path, model=changed, **classifier)
    assert "does not hold a model" in refusal(tmp_path)


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADERS = {
    "zero width": header({"a": {"dtype": "F32", "shape": [10**12, 0], "data_offsets": [0, 0]}}),
    "more than there is": header({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
    "overflowing": header({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    "a long header": struct.pack("<Q", 2**40) + b"{}",
    "a longer header": struct.pack("<Q", 2**63) + b"{}",
    "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "nothing": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_are_checked_before_tensors_are_read(tmp_path: Path, name: str) -> None:
    export_model(tmp_path, {}, DESCRIPTION)
    (tmp_path / "model.safetensors").write_bytes(HEADERS[name])
    refusal(tmp_path)
    (tmp_path / "published.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_published(tmp_path / "published.safetensors")


@given(st.data())
def test_damaged_weights_are_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, weights: dict[str, torch.Tensor], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("model")
    export_model(folder, weights, DESCRIPTION)
    content = bytearray((folder / "model.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(content[: data.draw(st.sampled_from([len(content), 2000, 7]))])
    assert "\n" not in sentence_of(lambda: load_any(folder))


# --- Published checkpoints ------------------------------------------------------------------------------------------


def published(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    """As much of a checkpoint as its sizes are read from."""
    tensors = {
        "patch_embed.proj.weight": torch.zeros(384, 3, 16, 16),
        "decoder_pos_embed": torch.zeros(1, 5, 384),
        "blocks.0.layers.0.0.fn.qkv.weight": torch.zeros(384, 384),
    }
    return tensors | changed


EXPANDED = {
    "expanded": {"decoder_pos_embed": torch.zeros(1, 1, 1).expand(1, 10**6 * 10**6 + 1, 384)},
    "zero width": {"decoder_pos_embed": torch.zeros(1, 10**12 + 1, 0)},
    "sparse": {"decoder_pos_embed": torch.sparse_coo_tensor(size=(1, 50001, 384))},
    "one patch": {"decoder_pos_embed": torch.zeros(1, 2, 384)},
    "long table": {"decoder_pos_embed": torch.zeros(1, 1000**2 + 1, 1)},
    "no patches": {"decoder_pos_embed": torch.zeros(1, 1, 384)},
}


@pytest.mark.parametrize("name", EXPANDED)
def test_checkpoints_hold_all_their_numbers(tmp_path: Path, name: str) -> None:
    torch.save(published(**EXPANDED[name]), tmp_path / "x.pth")
    begun = time.thread_time()
    with pytest.raises(UserError):
        load_published(tmp_path / "x.pth")
    assert time.thread_time() - begun < 5


def test_compressed_checkpoints_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2**20)}, file)
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    (tmp_path / "plain.pth").write_bytes(file.getvalue())
    check_plain_zip(tmp_path / "plain.pth")
    with pytest.raises(UserError, match="compressed"):
        load_published(tmp_path / "x.pth")


@pytest.mark.slow
@pytest.mark.parametrize("content", [pickle.dumps(bytearray(10)), b"\x80\x02" + b"(" * 10**6, b"", b"PK\x03\x04" * 99])
def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError) as error:
        load_published(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


# --- Checkpoints of runs --------------------------------------------------------------------------------------------


def test_checkpoints_of_runs_state_no_more_than_they_hold(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    write_part(tmp_path, weights, 0, 1)
    assert read_tensors(tmp_path).keys() == weights.keys()
    path = next(tmp_path.glob("model-*.safetensors"))
    content = path.read_bytes()
    size = struct.unpack_from("<Q", content)[0]
    entries = json.loads(content[8 : 8 + size])
    sharding = json.loads(entries["__metadata__"]["DCP_SHARDING_INFO"])
    sharding["cls_token"]["saved_offsets"] = [10**6, 10**6, 10**6]
    entries["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(sharding)
    path.write_bytes(header(entries, content[8 + size :]))
    assert safetensors_shapes(path)["cls_token"] == (1, 1, 16)
    with pytest.raises(UserError, match="its files state more numbers than they hold"):
        read_tensors(tmp_path)
    path.write_bytes(content[:-9])
    with pytest.raises(UserError, match="the checkpoint's tensors cannot be read"):
        read_tensors(tmp_path)
