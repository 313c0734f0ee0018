"""Exported models compute what the model computes, wherever they run; the timm-like backbone equals its model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import crate_ray
from crate_ray.cli import parse_config
from crate_ray.config import ClassifierConfig, CrateMAEConfig, ModelConfig, ViTMAEConfig
from crate_ray.config.export import ExportConfig
from crate_ray.errors import UserError
from crate_ray.exporting.checking import largest_difference
from crate_ray.exporting.export import export
from crate_ray.exporting.huggingface import modeling_source
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.backbone import Backbone
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, Normalizer, export_model, load_any

SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 3}
MODELS: dict[str, ModelConfig] = {
    "crate": CrateMAEConfig(**SIZES, num_subspaces=4),
    "ablated": CrateMAEConfig(
        **SIZES, num_subspaces=4, attention="linear", output_map="tied", decoder_maps="tied", encoder_tokens="visible"
    ),
    "successor": CrateMAEConfig(
        **SIZES,
        num_subspaces=4,
        residual="all",
        dictionary="overcomplete",
        layer_scale=0.5,
        threshold="learned",
        attend_to="visible",
    ),
    "crate encoder": CrateMAEConfig(
        **SIZES,
        num_subspaces=4,
        decoder_depth=0,
        output_bias=False,
        positions="learned",
        patch_norm=True,
        norm_eps=0.1,
        last_norm_eps=0.2,
    ),
    "vit": ViTMAEConfig(**SIZES, num_heads=4),
    "no decoder": ViTMAEConfig(**SIZES, num_heads=4, decoder_depth=0, qkv_bias=False),
    "gray": CrateMAEConfig(**SIZES, num_subspaces=4, channels=1),
    "grid": ViTMAEConfig(**SIZES | {"image_size": (8, 16), "patch_size": (2, 4)}, num_heads=4, channels=5),
}
HEADS: dict[str, ClassifierConfig | None] = {
    "encoder": None,
    "cls": ClassifierConfig(num_classes=7, pooling="cls", classes=tuple("abcdefg")),
    "mean": ClassifierConfig(num_classes=7, pooling="mean"),
}
KINDS = [(model, head) for model in MODELS for head in HEADS if model in ("crate", "vit", "grid") or head != "mean"]


def make(model: str, head: str, folder: Path) -> tuple[MaskedAutoencoder | Classifier, ModelDescription]:
    """Write a model with random weights and a description into a folder, and load it."""
    torch.manual_seed(len(model) + len(head))
    config, classifier = MODELS[model], HEADS[head]
    module = build_model(config) if classifier is None else Classifier(config, classifier)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1 or "head" in name:  # those that start at zero or one would hide a mistake
            nn.init.normal_(parameter, std=0.5)
    statistics = {"mean": torch.rand(config.channels).tolist(), "std": (0.2 + torch.rand(config.channels)).tolist()}
    description = ModelDescription(
        model=config, classifier=classifier, kind="grid" if model == "grid" else "image", step=3, **statistics
    )
    export_model(folder, module.state_dict(), description)
    return load_any(folder)


def pixels(description: ModelDescription, size: int) -> Tensor:
    shape = (size, description.model.channels, *description.model.image_hw)
    generator = torch.Generator().manual_seed(size + 100)
    if description.kind == "grid":
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@torch.no_grad()
def expected(
    model: MaskedAutoencoder | Classifier, description: ModelDescription, images: Tensor
) -> dict[str, np.ndarray[Any, Any]]:
    """Features by the model's own methods."""
    x = Normalizer.of(description.mean, description.std)(images)
    logits = {}
    if isinstance(model, Classifier):
        tokens, _ = model.autoencoder.embed(x)
        for layer in model.encoder:
            tokens = layer(tokens)
        logits = {"logits": model(x).scores.numpy()}
    else:
        tokens = model.encode(x).tokens
    features = {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "patch": tokens[:, 1:]}
    return {name: value.numpy() for name, value in features.items()} | logits


def run_export(folder: Path, output: Path, *options: str) -> Any:
    return export(parse_config(ExportConfig, ["--model", str(folder), "--output", str(output), *options]))


# --- Backbone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), KINDS)
@torch.no_grad()
def test_a_backbone_computes_what_its_model_computes(name: str, head: str, tmp_path: Path) -> None:
    make(name, head, tmp_path)
    model = crate_ray.load_model(str(tmp_path))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    backbone = crate_ray.Backbone(model).eval()
    x = Normalizer.of(model.preprocess.mean, model.preprocess.std)(pixels(load_any(tmp_path)[1], 3))
    config = MODELS[name]
    tokens = backbone.forward_features(x)
    assert tokens.shape == (3, 1 + config.num_patches, backbone.num_features)
    if isinstance(model, Classifier):
        assert torch.equal(backbone(x), model(x).scores)
        assert torch.equal(model.head(backbone.forward_head(tokens, pre_logits=True)), backbone(x))
        assert backbone.num_classes == 7
    else:
        encoded = model.encode(x, return_layers=True)
        assert encoded.layers is not None
        assert torch.equal(tokens, encoded.tokens)
        assert torch.equal(backbone(x), tokens[:, 1:].mean(1)) and backbone.num_classes == 0
        maps = backbone.features_only([0, -1])(x)
        rows, columns = config.grid_hw
        for index, found in zip((0, 2), maps, strict=True):
            assert found.shape == (3, config.dim, rows, columns)
            for row, column in ((0, 0), (1, 2), (rows - 1, columns - 1)):
                assert torch.equal(found[:, :, row, column], encoded.layers[index][:, 1 + row * columns + column])
        (last, prefix), = backbone.get_intermediate_layers(x, norm=True, return_prefix_tokens=True)  # fmt: skip
        assert torch.equal(torch.cat([prefix, last], 1), tokens)
        assert [layer.shape[1] for layer in backbone.get_intermediate_layers(x, 2)] == [config.num_patches] * 2
    assert not any("decoder" in key or "mask_token" in key for key in backbone.state_dict())
    for parameter in backbone.parameters():
        parameter.zero_()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_a_backbone_says_what_a_consumer_asks(tmp_path: Path) -> None:
    make("crate", "encoder", tmp_path)
    model = crate_ray.load_model(str(tmp_path))
    backbone = Backbone(model)
    features = backbone.features_only((-1, 1))
    assert features.feature_info.channels() == [32, 32] and features.feature_info.reduction() == [4, 4]
    assert features.feature_info.module_name() == ["blocks.1", "blocks.2"] == [f"blocks.{i}" for i in (1, 2)]
    assert backbone.features_only().out_indices == [0, 1, 2]
    settings = backbone.pretrained_cfg
    assert settings["input_size"] == (3, 16, 16) and settings["mean"] == model.preprocess.mean
    for wrong in ((3,), (-4,)):
        with pytest.raises(UserError, match=rf"there is no layer {wrong[0]}; the model's layers are 0 to 2"):
            backbone.features_only(wrong)


def test_a_backbone_trains_as_timm_models_do(tmp_path: Path) -> None:
    make("crate", "encoder", tmp_path)
    backbone = Backbone(load_any(tmp_path)[0])
    backbone(torch.randn(2, 3, 16, 16)).sum().backward()
    assert not [name for name, parameter in backbone.named_parameters() if parameter.grad is None]


# --- torch.export and ONNX ------------------------------------------------------------------------------------------

WITHOUT_CRATE_RAY = """
import sys
sys.modules["crate_ray"] = None
import numpy as np, torch
for folder in sys.argv[1:]:
    extra = {"model.json": ""}
    model = torch.export.load(f"{folder}/out/model.pt2", extra_files=extra).module()
    for size in (1, 4):
        images = torch.from_numpy(np.load(f"{folder}/{size}.npy"))
        np.savez(f"{folder}/found-{size}.npz", **{name: value.detach() for name, value in model(images).items()})
    assert '"step":3' in extra["model.json"]
assert not [name for name in sys.modules if name.startswith("crate_ray.")]
"""


@pytest.mark.daily
def test_a_torch_program_runs_with_torch_alone(tmp_path: Path) -> None:
    made = {}
    for name, head in (("crate", "encoder"), ("grid", "cls")):
        folder = tmp_path / name
        made[folder] = model, description = make(name, head, folder / "model")
        done = run_export(folder / "model", folder / "out", "--format", "torch-export")
        assert done.difference <= 1e-4 and list(done.files) == ["model.pt2"]
        for size in (1, 4):
            np.save(folder / f"{size}.npy", pixels(description, size).numpy())
    command = [sys.executable, "-c", WITHOUT_CRATE_RAY, *map(str, made)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    for folder, (model, description) in made.items():
        for size in (1, 4):
            wanted = expected(model, description, pixels(description, size))
            compare(np.load(folder / f"found-{size}.npz"), wanted, 1e-4)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("crate", "cls"),
        *(
            pytest.param(*kind, marks=pytest.mark.daily)
            for kind in (("ablated", "encoder"), ("successor", "encoder"), ("vit", "mean"), ("grid", "cls"))
        ),
    ],
)
def test_onnx_runtime_computes_the_same(name: str, head: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, description = make(name, head, tmp_path / "model")
    done = run_export(tmp_path / "model", tmp_path / "out", "--format", "onnx")
    assert done.difference <= 1e-4 and list(done.files) == ["model.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["model.json"])["step"] == 3
    assert session.get_inputs()[0].type == ("tensor(float)" if name == "grid" else "tensor(uint8)")
    names = [output.name for output in session.get_outputs()]
    for size in (1, 7):
        images = pixels(description, size)
        found = dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))
        compare(found, expected(model, description, images), 1e-4)


def test_outputs_and_the_type_of_pixels_are_chosen(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, description = make("gray", "encoder", tmp_path / "model")
    run_export(
        tmp_path / "model", tmp_path / "out", "--format", "onnx", "--feature", "patch,cls", "--pixels", "float32"
    )
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["patch", "cls"]
    images = pixels(description, 3)
    found = dict(zip(("patch", "cls"), session.run(None, {"images": images.float().numpy()}), strict=True))
    wanted = expected(model, description, images)
    compare(found, {name: wanted[name] for name in found}, 1e-4)


def compare(found: Any, wanted: dict[str, np.ndarray[Any, Any]], tolerance: float) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value).max() <= tolerance * max(1, np.abs(value).max()), name
        assert np.ptp(value) > 0.1, f"{name} would not show a difference"


def test_what_differs_from_the_model_is_refused() -> None:
    def with_error(error: float) -> Callable[[Tensor], dict[str, Tensor]]:
        return lambda x: {"mean": x + error * (x.shape[0] == 5)}

    def images(size: int) -> Tensor:
        return torch.full((size, 2), 3.0)

    assert largest_difference("copy", with_error(0), with_error(0), images, 1e-4) == 0
    assert 1e-5 < largest_difference("copy", with_error(0), with_error(1e-4), images, 1e-4) < 1e-4
    for error in (1e-3, float("nan"), float("inf")):
        with pytest.raises(UserError, match="the copy differs from the model by .* in mean, more than 1e-04"):
            largest_difference("copy", with_error(0), with_error(error), images, 1e-4)
    with pytest.raises(UserError, match=r"returns mean of shape \(1, 1\) instead of \(1, 2\) for a batch of 1"):
        largest_difference("copy", with_error(0), lambda x: {"mean": x[:, :1]}, images, 1e-4)


# --- Hugging Face ---------------------------------------------------------------------------------------------------

LOAD = """
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

try:
    import crate_ray
except ImportError:
    pass
else:
    raise SystemExit(f"{crate_ray.__file__} is here, so this would show nothing")

for folder in sorted(Path(sys.argv[1]).iterdir()):
    content = np.load(folder / "expected.npz")
    x = torch.from_numpy(content["x"])
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        encoded = model(x, output_hidden_states=True, output_attentions=True)
        tokens = encoded.last_hidden_state
        assert abs(tokens[:, 1:] - torch.from_numpy(content["patch"])).max() < 1e-6, folder
        assert torch.equal(encoded.hidden_states[-1], tokens) == ("logits" in content), folder
        assert len(encoded.attentions) == 3 and encoded.attentions[0].shape[-1] == tokens.shape[1]
        logits = classifier(x).logits
    if "logits" in content:
        names = list("abcdefg") if folder.name.endswith("cls") else [f"LABEL_{i}" for i in range(7)]
        assert list(classifier.config.id2label.values()) == names
        # Another number of threads rounds differently.
        assert abs(logits - torch.from_numpy(content["logits"])).max() < 1e-6 * abs(logits).max().clamp_min(1), folder
    else:  # a new head, and training reaches every parameter
        classifier(x, labels=torch.tensor([0, 1, 0])).loss.backward()
        assert all(parameter.grad is not None for parameter in classifier.parameters()), folder
    half = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert half(x).last_hidden_state.dtype == torch.bfloat16
    model.save_pretrained(folder / "again")
    again = AutoModel.from_pretrained(folder / "again", trust_remote_code=True).eval()
    assert torch.equal(again(x).last_hidden_state, model(x).last_hidden_state), folder
    processor = AutoImageProcessor.from_pretrained(folder)
    loaded = processor(list(content["pictures"]), input_data_format="channels_first", return_tensors="pt").pixel_values
    difference = abs(loaded - torch.from_numpy(content["preprocessed"])).mean()
    assert difference < 0.05, (folder, difference)
    print(folder.name, "equal")
"""


def export_all(folder: Path) -> None:
    """Export every kind of model, with inputs and outputs."""
    for name, head in KINDS:
        model, description = make(name, head, folder / "models" / f"{name}-{head}")
        output = folder / "exported" / f"{name}-{head}"
        done = run_export(folder / "models" / f"{name}-{head}", output, "--format", "huggingface")
        assert done.difference <= 1e-6
        assert list(done.files) == ["config.json", "model.safetensors", "modeling_crate.py", "preprocessor_config.json"]
        images = pixels(description, 3)
        x = Normalizer.of(description.mean, description.std)(images)
        hw = (40, 60) if description.kind == "image" else description.model.image_hw
        random = np.random.default_rng(0)
        pictures = random.integers(0, 256, (2, 3, 5, 6), np.uint8).repeat(8, 2).repeat(10, 3)  # smooth enough
        if description.kind == "grid":
            pictures = random.standard_normal((2, 5, *hw), np.float32)
        pictures = pictures[:, : description.model.channels]
        preprocess = crate_ray.load_model(str(folder / "models" / f"{name}-{head}")).preprocess
        arrays = list(pictures if description.kind == "grid" else pictures.transpose(0, 2, 3, 1))
        np.savez(
            output / "expected.npz", x=x, pictures=pictures, preprocessed=preprocess(arrays),
            **expected(model, description, images),
        )  # fmt: skip


@pytest.mark.slow
def test_a_hugging_face_folder_holds_a_model_that_computes_the_same(tmp_path: Path) -> None:
    """The modelling file runs with stand-ins for transformers, as at each export."""
    export_all(tmp_path)
    names = json.loads((tmp_path / "exported/vit-cls/config.json").read_text())["id2label"]
    assert names == {str(i): name for i, name in enumerate("abcdefg")}
    source = (tmp_path / "exported/vit-cls/modeling_crate.py").read_text()
    assert source == modeling_source()
    assert "import crate_ray" not in source and "from crate_ray" not in source
    checked = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", "-"]
    done = subprocess.run(checked, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_hugging_face_folder_that_computes_something_else_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crate_ray.exporting import huggingface

    make("crate", "encoder", tmp_path / "model")
    monkeypatch.setitem(
        huggingface._PLAIN, "gram", "def gram(weight: Tensor) -> Tensor:\n    return weight @ weight.t()"
    )
    with pytest.raises(UserError, match="the Hugging Face model differs from the model by .* nothing was written"):
        run_export(tmp_path / "model", tmp_path / "out", "--format", "huggingface")
    assert not (tmp_path / "out").exists()


@pytest.mark.daily
@pytest.mark.timeout(1800)
def test_transformers_loads_the_folder_in_an_environment_without_crate_ray(tmp_path: Path) -> None:
    export_all(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    version = torch.__version__.split("+")[0]
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, f"torch=={version}", "transformers", "pillow"], check=True)
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [python, "-c", LOAD, str(tmp_path / "exported")]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == len(KINDS)


# --- safetensors, and what is refused -------------------------------------------------------------------------------


def test_safetensors_are_the_model_with_its_decoder(tmp_path: Path) -> None:
    model, description = make("crate", "encoder", tmp_path / "model")
    done = run_export(tmp_path / "model", tmp_path / "out", "--format", "safetensors")
    assert list(done.files) == ["model.json", "model.safetensors"]
    again, described = load_any(tmp_path / "out")
    assert described == description
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert isinstance(crate_ray.load_model(str(tmp_path / "out")), MaskedAutoencoder)


def test_an_output_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    make("crate", "encoder", tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for form in ("safetensors", "huggingface", "torch-export"):
        with pytest.raises(UserError, match=r"out is not empty, it holds thesis\.txt; name another output or empty it"):
            run_export(tmp_path / "model", tmp_path / "out", "--format", form)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    with pytest.raises(UserError, match=r"thesis\.txt is a file; name a folder"):
        run_export(tmp_path / "model", tmp_path / "out" / "thesis.txt", "--format", "huggingface")


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("crate", "encoder", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        UserError, match=r"needs onnx, onnxscript.* not installed; run: pip install 'crate-ray\[onnx\]'"
    ):
        run_export(tmp_path / "model", tmp_path / "out", "--format", "onnx")


def test_settings_that_do_not_fit_the_format_are_refused(tmp_path: Path) -> None:
    for name, value in (("feature", "cls"), ("pixels", "float32")):
        with pytest.raises(UserError, match=f"{name} is for the formats onnx and torch-export; huggingface "):
            run_export(tmp_path, tmp_path / "out", "--format", "huggingface", f"--{name}", value)
    with pytest.raises(UserError, match="feature names an output twice"):
        run_export(tmp_path, tmp_path / "out", "--format", "onnx", "--feature", "cls,cls")
