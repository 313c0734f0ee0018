"""Fine-tuning: rates by layer, drop path, mixing and augmentation follow their papers, for any number of workers. A
resumed run continues bitwise. A run's start weights are looked up once, and unsuitable ones give an error."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from crate_ray.cli import parse_config
from crate_ray.config import (
    AugmentConfig,
    ClassifierConfig,
    CrateMAEConfig,
    FinetuneConfig,
    OptimConfig,
    PrepareConfig,
    ViTMAEConfig,
)
from crate_ray.data.loader import training_loader
from crate_ray.data.order.sequence import worker_slots
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import Item, Source
from crate_ray.errors import UserError
from crate_ray.finetuning.augment import RandAugmentation
from crate_ray.finetuning.batches import PAIR, TrainingBatches
from crate_ray.finetuning.mixing import branch_scales, class_targets, draw_mix, mix_pairs
from crate_ray.finetuning.optim import build_layerwise_optimizer
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import new_classifier
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.classifier import Classifier, Targets
from crate_ray.models.exported import ModelDescription, Normalizer, load_any, load_exported
from crate_ray.runs.checkpoint_files import checkpoint_tensors, restore_checkpoint
from crate_ray.runs.commits import fetch_newest
from crate_ray.runs.export import export_run
from crate_ray.runs.planning import Run
from crate_ray.runs.record import write_record
from crate_ray.served_model import ServedModel
from crate_ray.storage.interface import open_storage
from crate_ray.training.optimizer import learning_rate
from crate_ray.training.step import train_step
from tests.checkpoints import save

pytestmark = pytest.mark.usefixtures("one_thread")

CRATE = CrateMAEConfig(image_size=8, patch_size=2, channels=1, dim=16, depth=3, num_subspaces=2)
VIT = ViTMAEConfig(image_size=8, patch_size=2, channels=1, dim=16, depth=3, num_heads=2)
CLASSES = ClassifierConfig(num_classes=10, pooling="mean")
DIGITS = Normalizer.of((0.3,), (0.35,))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = PrepareConfig(source="digits", split="test", output=str(tmp_path_factory.mktemp("digits")))
    pack(digits_source("test"), open_storage(config.output, config.s3), config)
    return config.output


def configured(digits: str, folder: Path, **changes: Any) -> FinetuneConfig:
    """A run with everything that is random."""
    values: dict[str, Any] = {
        "recipe": "mae",
        "name": "tuned",
        "storage": str(folder / "runs"),
        "data": {"train": digits, "flip": False},
        "training": {"steps": 6, "batch_size": 22, "micro_batch_size": 5, "precision": "fp32"},
        "optim": {"lr": 0.003},
        "scaling": {"cpus_per_worker": 1},
        **changes,
    }
    return FinetuneConfig.model_validate(values)


# --- Rates by layer -------------------------------------------------------------------------------------------------


class SameGradient(nn.Module):
    """A loss whose gradient is 3 for each number of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, given: Tensor) -> Any:
        return SimpleNamespace(sample_loss=sum(3.0 * p.sum() for p in self.model.parameters())[None])


@pytest.mark.parametrize("encoder", [CRATE, VIT])
def test_each_layer_moves_at_the_rate_of_its_depth(encoder: CrateMAEConfig | ViTMAEConfig) -> None:
    """AdamW's first step moves every number by the learning rate, whatever its gradient, and decays weights by it."""
    model = Classifier(encoder, CLASSES)
    optimizer = build_layerwise_optimizer(model, OptimConfig(weight_decay=0.5, eps=1e-12), layer_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # rates are set anew each time, and do not build up
        train_step(SameGradient(model), optimizer, torch.zeros(1), torch.zeros(1), batch_size=1, lr=0.01)
    for name, parameter in model.named_parameters():
        layer = {"autoencoder.patch_embed": 0, "autoencoder.cls_token": 0, "norm": 4, "head": 4}
        layer |= {f"autoencoder.encoder.{number}": number + 1 for number in range(3)}
        rate = 0.01 * 0.5 ** (4 - next(place for start, place in layer.items() if name.startswith(start)))
        decay = 0.5 if parameter.ndim > 1 and "token" not in name else 0.0
        expected = before[name]
        for _ in range(2):
            expected = expected * (1 - rate * decay) - rate
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)


# --- Drop path ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [CRATE, VIT])
def test_a_skipped_branch_does_nothing_and_a_kept_one_is_scaled(encoder: CrateMAEConfig | ViTMAEConfig) -> None:
    torch.manual_seed(0)
    model = build_model(encoder).double()
    layer: Any = model.encoder[0]
    z = torch.randn(3, 17, 16, dtype=torch.float64)
    whole = torch.ones(3, layer.num_branches, dtype=torch.float64)
    torch.testing.assert_close(layer(z, whole), layer(z))
    mixed = layer(z, torch.stack([0 * whole[0], whole[0], 2 * whole[0]]))
    without = layer.sparsify(z) if isinstance(encoder, CrateMAEConfig) else z
    torch.testing.assert_close(mixed[0], without[0])
    torch.testing.assert_close(mixed[1], layer(z)[1])
    if isinstance(encoder, CrateMAEConfig):
        twice = layer.sparsify(z + 2 * layer.mssa(layer.mssa_norm(z)))
        torch.testing.assert_close(mixed[2], twice[2])
    assert not torch.allclose(mixed[2], layer(z)[2])


def test_drop_path_has_expectation_one_and_rates_that_rise_with_depth() -> None:
    branches = [2, 2, 2, 2]
    scales = torch.cat(
        [scale for step in range(40) if (scale := branch_scales(3, step, (0, 256), branches, 0.3)) is not None]
    )
    assert scales.shape == (40 * 256, 8)
    skipped = (scales == 0).double().mean(0)
    np.testing.assert_allclose(skipped, np.repeat([0, 0.1, 0.2, 0.3], 2), atol=0.015)
    np.testing.assert_allclose(scales.double().mean(0), 1, atol=0.02)
    assert abs(np.corrcoef((scales == 0).numpy()[:, 2:].T) - np.eye(6)).max() < 0.04  # branches know nothing of others
    assert branch_scales(3, 0, (0, 8), branches, 0.0) is None


# --- Mixing ---------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    step=st.integers(0, 10**6),
    alphas=st.sampled_from([(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)]),
    pairs=st.integers(1, 4),
    smoothing=st.floats(0, 0.5),
)
def test_mixing_is_what_its_papers_say(
    seed: int, step: int, alphas: tuple[float, float], pairs: int, smoothing: float
) -> None:
    random = np.random.default_rng(seed)
    images = random.random((2 * pairs, 2, 6, 9))
    labels = random.integers(0, 7, 2 * pairs)
    classes = class_targets(labels, 7, smoothing)
    mix = draw_mix(seed, step, AugmentConfig(mixup=alphas[0], cutmix=alphas[1]), (6, 9))
    mixed, targets = mix_pairs(torch.from_numpy(images), classes, mix)
    assert 0 <= mix.weight <= 1
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    for i in range(2 * pairs):
        j = i + 1 if i % 2 == 0 else i - 1
        expected = np.full(7, smoothing / 7)
        expected[labels[i]] += (1 - smoothing) * mix.weight
        expected[labels[j]] += (1 - smoothing) * (1 - mix.weight)
        np.testing.assert_allclose(targets[i], expected, atol=1e-6)
        if mix.box is None:
            np.testing.assert_allclose(mixed[i], mix.weight * images[i] + (1 - mix.weight) * images[j], atol=1e-12)
        else:
            own = np.ones((6, 9), bool)
            own[mix.box[0] : mix.box[1], mix.box[2] : mix.box[3]] = False
            np.testing.assert_array_equal(mixed[i], np.where(own, images[i], images[j]))
            assert mix.weight == pytest.approx(own.mean())
    if not any(alphas):
        assert mix.weight == 1 and torch.equal(mixed, torch.from_numpy(images))


def test_weights_of_mixing_are_beta_distributed() -> None:
    mixes = [draw_mix(1, step, AugmentConfig(mixup=0.8, cutmix=1.0), (64, 64)) for step in range(4000)]
    weights = np.array([mix.weight for mix in mixes if mix.box is None])
    assert abs(len(weights) - 2000) < 150  # either as likely
    variance = 0.25 / (2 * 0.8 + 1)
    assert weights.mean() == pytest.approx(0.5, abs=0.03) and weights.var() == pytest.approx(variance, rel=0.1)
    boxes = np.array([mix.box for mix in mixes if mix.box is not None])
    assert (boxes[:, 0] <= boxes[:, 1]).all() and boxes.min() == 0 and boxes.max() == 64


# --- RandAugment ----------------------------------------------------------------------------------------------------


def references(image: Image.Image, magnitude: float) -> dict[str, Image.Image]:
    """What torchvision's RandAugment makes of a picture by Pillow, at a magnitude of 30, in either direction."""
    share, side = magnitude / 30, image.width

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)

    made = {
        "identity": image,
        "auto_contrast": ImageOps.autocontrast(image),
        "equalize": ImageOps.equalize(image),
        "posterize": ImageOps.posterize(image, 8 - round(4 * share)),
        "solarize": ImageOps.solarize(image, int(255 * (1 - share))),
    }
    for sign in (-1, 1):
        for enhance in (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness):
            made[f"{enhance.__name__} {sign}"] = enhance(image).enhance(1 + sign * 0.9 * share)
        made[f"rotate {sign}"] = image.rotate(sign * 30 * share, Image.Resampling.BILINEAR)
        shear, shift, half = sign * 0.3 * share, sign * 150 / 331 * share * side, side / 2
        made[f"shear_x {sign}"] = affine(1, shear, -shear * half, 0, 1, 0)
        made[f"shear_y {sign}"] = affine(1, 0, 0, shear, 1, -shear * half)
        made[f"translate_x {sign}"] = affine(1, 0, shift, 0, 1, 0)
        made[f"translate_y {sign}"] = affine(1, 0, 0, 0, 1, shift)
    return made


def test_randaugment_applies_the_operations_that_pillow_knows() -> None:
    side = 64
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(7 * x + 2 * y), np.cos(3 * x - 5 * y), np.sin(4 * x * y + 1)]
    fine = np.sin(70 * (x + y))[:, :, None] * 15
    pixels = (np.stack(waves, 2) * 60 + 125 + fine).round().astype(np.uint8)
    made = {name: np.asarray(picture) / 255 for name, picture in references(Image.fromarray(pixels), 14).items()}
    count = 400
    batch = torch.from_numpy(pixels).permute(2, 0, 1).expand(count, -1, -1, -1).float() / 255
    augmented = RandAugmentation(1, 14, seed=5)(batch, np.zeros(count, np.int64), np.arange(count))
    seen: dict[str, int] = {}
    for picture in augmented.permute(0, 2, 3, 1).numpy():
        distances = {name: np.abs(picture - other)[3:-3, 3:-3].mean() for name, other in made.items()}
        nearest = min(distances, key=distances.__getitem__)
        assert distances[nearest] < 0.008, (nearest, distances[nearest])
        seen[nearest] = seen.get(nearest, 0) + 1
    assert seen.keys() == made.keys()
    assert all(count / 28 / 3 < number < 3 * count / 14 for number in seen.values()), seen


def test_an_image_is_augmented_alike_in_every_company() -> None:
    images = torch.rand(12, 1, 8, 8)
    epochs, samples = np.repeat([0, 1], 6), np.tile(np.arange(6), 2)
    augment = RandAugmentation(2, 14, seed=1)
    state = torch.random.get_rng_state()
    together = augment(images, epochs, samples)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers move
    alone = torch.cat([augment(images[i : i + 1], epochs[i : i + 1], samples[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    again = augment(images[:6], epochs[6:], samples[6:])
    assert not torch.allclose(together[:6], again) and together.min() >= 0 and together.max() <= 1
    assert not torch.allclose(together, RandAugmentation(2, 14, seed=2)(images, epochs, samples))


# --- The step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [CRATE, VIT])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_step_descends_the_soft_cross_entropy_however_it_is_cut(
    encoder: CrateMAEConfig | ViTMAEConfig, pooling: Any
) -> None:
    torch.manual_seed(1)
    model = Classifier(encoder, ClassifierConfig(num_classes=5, pooling=pooling)).double()
    nn.init.normal_(model.head.weight)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    classes = torch.rand(7, 5, dtype=torch.float64).softmax(1)
    scales = branch_scales(0, 1, (0, 7), model.branches, 0.5)
    assert scales is not None and (scales == 0).any()
    targets = Targets(classes, scales.double())
    # The loss as a plain statement of its definition, and AdamW's first step with its gradient.
    log_probabilities = torch.log(
        torch.exp(model(images, targets).scores) / torch.exp(model(images, targets).scores).sum(1, keepdim=True)
    )
    loss = -(classes * log_probabilities).sum(1).sum() / 7
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.sqrt(sum((g.square().sum() for g in gradients), torch.zeros(())))
    ends = []
    for micro_steps in (1, 3):
        model.load_state_dict(start)
        optimizer = build_layerwise_optimizer(model, OptimConfig(weight_decay=0.1), 0.7)
        parts: Any = targets
        loss_sum, measured = train_step(model, optimizer, images, parts, batch_size=7, micro_steps=micro_steps, lr=0.01)
        assert loss_sum.item() / 7 == pytest.approx(loss.item(), rel=1e-6)  # scores are in float32
        assert measured.item() == pytest.approx(norm.item(), rel=1e-5)
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[name]), name


def test_a_global_batch_is_the_same_for_every_number_of_workers(digits: str, tmp_path: Path) -> None:
    config = configured(digits, tmp_path, model="scratch", encoder=CRATE)
    run = open_finetuning(config, refuse)
    branches = new_classifier(run.record, 0).branches

    def inputs(workers: int) -> Iterator[tuple[Tensor, ...]]:
        parts: list[list[tuple[Tensor, ...]]] = []
        for rank in range(workers):
            slots = worker_slots(22, rank, workers, PAIR)
            make = TrainingBatches(config, 10, branches, DIGITS, slots)
            with training_loader(
                run.mixture, run.record.order, CRATE, config.data,
                steps=range(4), rank=rank, world_size=workers, together=PAIR,
            ) as loader:  # fmt: skip
                made = [make(batch) for batch in loader]
            parts.append([(images, t.classes, t.scales) for images, t in made if t.scales is not None])
        for step in zip(*parts, strict=True):
            yield tuple(torch.cat(pieces) for pieces in zip(*step, strict=True))

    alone = list(inputs(1))
    assert [len(images) for images, *_ in alone] == [22] * 4
    for workers in (2, 3):
        for expected, got in zip(alone, inputs(workers), strict=True):
            for a, b in zip(expected, got, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.allclose(alone[0][2], alone[1][2])


# --- A run ----------------------------------------------------------------------------------------------------------


def test_another_encoder_of_a_run_from_scratch_is_refused(digits: str, tmp_path: Path) -> None:
    config = configured(digits, tmp_path, model="scratch", encoder=CRATE)
    run = open_finetuning(config, refuse)
    write_record(run.storage, run.record)
    save(run.storage, new_classifier(run.record, 0).state_dict(), run.record, 1, tmp_path / "scratch")
    wider = config.model_copy(update={"encoder": CRATE.model_copy(update={"depth": CRATE.depth + 1})})
    with pytest.raises(UserError, match=r"was started with encoder\.depth \d, not \d"):
        open_finetuning(wider, refuse)
    open_finetuning(config, refuse)


def refuse(reference: str) -> tuple[MaskedAutoencoder, ModelDescription]:
    raise AssertionError(f"{reference} is looked up")


def pretrained(encoder: CrateMAEConfig = CRATE) -> tuple[MaskedAutoencoder, ModelDescription]:
    torch.manual_seed(7)
    description = ModelDescription(model=encoder, mean=(0.25,), std=(0.4,), kind="image", run_key="0" * 32, step=12)
    return build_model(encoder).eval(), description


class Trainer:
    """What a worker does, without Ray."""

    def __init__(self, run: Run, config: FinetuneConfig) -> None:
        self.run, self.config, self.step = run, config, 0
        self.model = new_classifier(run.record, config.seed)
        self.optimizer = build_layerwise_optimizer(self.model, config.optim, config.layer_decay)

    def train(self, until: int) -> None:
        config, order = self.config, self.run.record.order
        make = TrainingBatches(config, 10, self.model.branches, DIGITS, (0, 22))
        steps = range(self.step, until)
        with training_loader(self.run.mixture, order, CRATE, config.data, steps=steps, together=PAIR) as loader:
            for batch in loader:
                images, targets = make(batch)
                parts: Any = targets
                lr = learning_rate(batch.step, 6, config.optim, 22)
                train_step(
                    self.model, self.optimizer, images, parts, batch_size=22, micro_steps=5, lr=lr, clip_norm=1.0
                )
        self.step = until

    def save(self, scratch: Path) -> None:
        save(self.run.storage, checkpoint_tensors(self.model, self.optimizer), self.run.record, self.step, scratch)
        shutil.rmtree(scratch)


def test_a_resumed_run_goes_on_bitwise_the_same(digits: str, tmp_path: Path) -> None:
    config = configured(digits, tmp_path, model="scratch", encoder=CRATE)
    run = open_finetuning(config, refuse)
    write_record(run.storage, run.record)  # as its first start does
    whole, half = Trainer(run, config), Trainer(run, config)
    whole.train(6)
    half.train(3)
    half.save(tmp_path / "scratch")
    again = open_finetuning(config, refuse)
    assert again.first_step == 3 and again.record == run.record
    resumed = Trainer(again, config)
    for parameter in resumed.model.parameters():
        nn.init.zeros_(parameter)
    assert fetch_newest(again.storage, tmp_path / "fetched") is not None
    resumed.step = restore_checkpoint(tmp_path / "fetched", resumed.model, resumed.optimizer).step
    resumed.train(6)
    ends = [checkpoint_tensors(t.model, t.optimizer) for t in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys() and any("/exp_avg_sq" in name for name in ends[0])
    assert [name for name, tensor in ends[0].items() if not torch.equal(tensor, ends[1][name])] == []
    # What it leaves is a classifier, with all that a prediction needs.
    resumed.save(tmp_path / "scratch")
    export_run(run.storage, tmp_path / "model")
    loaded, description = load_any(tmp_path / "model")
    assert isinstance(loaded, Classifier) and description.step == 6 and description.run_key == run.record.run_key
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    predictor = ServedModel.from_folder(tmp_path / "model")
    with torch.no_grad():
        scores = resumed.model.eval()(Normalizer.of(run.record.mean, run.record.std)(images)).scores
    torch.testing.assert_close(predictor(predictor.load(list(pixels))), scores.softmax(1))
    with pytest.raises(UserError, match="fine-tuned classifier, but a pretrained model is needed"):
        load_exported(tmp_path / "model")


def test_a_run_starts_from_the_encoder_that_it_was_given_and_looks_it_up_once(digits: str, tmp_path: Path) -> None:
    config = configured(digits, tmp_path, model="models:/mine@champion")
    model, description = pretrained()
    run = open_finetuning(config, lambda reference: (model, description))
    assert (run.record.mean, run.record.std) == ((0.25,), (0.4,)) and run.record.model == CRATE
    record = open_finetuning(config, refuse).record  # a start that is repeated before its first checkpoint
    assert record == run.record and record.finetune is not None and record.finetune.parent is not None
    assert (record.finetune.parent.run_key, record.finetune.parent.step) == ("0" * 32, 12)
    assert record.finetune.classifier.num_classes == 10
    stored = tmp_path / "runs" / "tuned" / "initial"
    classifier = new_classifier(record, 0)
    weights = load_file(stored / "model.safetensors")
    classifier.load_state_dict(weights)
    for name, value in classifier.autoencoder.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    # The control: the same in all but the weights.
    control = open_finetuning(
        configured(digits, tmp_path, model="scratch:models:/mine@champion", name="control"),
        lambda r: (model, description),
    )
    assert control.record.initial_weights is None and control.record.order == run.record.order
    assert (control.record.model, control.record.mean) == (run.record.model, run.record.mean)
    assert control.record.finetune is not None and control.record.finetune.parent is None
    # Another model under the same name is refused.
    Trainer(run, config).save(tmp_path / "scratch")
    with pytest.raises(UserError, match="was started with model models:/mine@champion, not scratch; choose another"):
        open_finetuning(configured(digits, tmp_path, model="scratch", encoder=CRATE), refuse)


def packed(folder: Path, classes: int | None, names: tuple[str, ...] | None = None) -> str:
    """Thirty noisy images with so many classes, or without labels."""

    def members(number: int) -> dict[str, bytes]:
        file = io.BytesIO()
        noise = np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(noise).save(file, "PNG")
        return {"png": file.getvalue()} | ({"cls": str(number % classes).encode()} if classes else {})

    config = PrepareConfig(output=str(folder))
    items = [Item(f"{number:03d}", partial(members, number)) for number in range(30)]
    pack(Source(items, names), open_storage(config.output, config.s3), config)
    return config.output


def test_what_does_not_fit_is_refused_in_one_sentence(digits: str, tmp_path: Path) -> None:
    def message(data: dict[str, Any] | None = None, **changes: Any) -> str:
        values = {"model": "x", "data": {"train": digits, **(data or {})}, **changes}
        with pytest.raises(UserError) as caught:
            open_finetuning(configured(digits, tmp_path, **values), lambda reference: pretrained())
        return str(caught.value)

    plain = packed(tmp_path / "plain", None)
    eleven = packed(tmp_path / "eleven", 11)
    animals = packed(tmp_path / "animals", 2, ("cat", "dog")), packed(tmp_path / "others", 2, ("cat", "horse"))
    assert f"not every sample of {plain} has a class (a member `cls`" in message({"train": plain})
    assert f"not every sample of {plain} has a class" in message({"validation": plain})
    assert f"{eleven} has samples of class 10, and {digits} has no class of this name" in message(
        {"validation": eleven}
    )
    three = packed(tmp_path / "three", 3)
    assert f"{eleven} has 11 classes, {three} has 3; number" in message({"train": three, "validation": eleven})
    assert "has 1 of 2 classes that" in message({"train": animals[0], "validation": animals[1]})
    assert "several datasets" in message({"train": {digits: 1.0, plain: 1.0}})
    assert "12 workers are more than the 22 samples of a batch, which are mixed in pairs" in message(
        scaling={"workers": 12}
    )
    with pytest.raises(UserError, match=r"need an even training.batch_size, not 21"):
        parse_config(FinetuneConfig, f"--data.train {digits} --augment.mixup 0.2 --training.batch_size 21".split())


def test_recipes_fill_what_is_not_set() -> None:
    def parse(line: str) -> FinetuneConfig:
        return parse_config(FinetuneConfig, f"--data.train x {line}".split())

    crate, mae = parse(""), parse("--recipe mae")
    assert (crate.optim.lr, crate.training.epochs, crate.training.batch_size, crate.layer_decay) == (5e-5, 200, 256, 1)
    assert (crate.augment.randaugment, crate.augment.magnitude, crate.mixes) == (2, 14, False)
    assert (mae.optim.lr, mae.optim.base_lr, mae.layer_decay, mae.drop_path, mae.label_smoothing) == (
        None,
        5e-4,
        0.65,
        0.1,
        0.1,
    )
    assert (mae.augment.mixup, mae.augment.cutmix, mae.pooling, mae.training.epochs) == (0.8, 1.0, "mean", 100)
    ours = parse("--training.steps 9 --optim.base_lr 1e-3 --data.crop_scale 0.5,1 --pooling mean")
    assert (ours.training.steps, ours.training.epochs, ours.optim.lr, ours.optim.base_lr) == (9, None, None, 1e-3)
    assert ours.data.crop_scale == (0.5, 1) and ours.pooling == "mean" and ours.optim.weight_decay == 0.01
    for config in (crate, mae, ours):
        assert FinetuneConfig.model_validate(config.model_dump(mode="json")) == config
