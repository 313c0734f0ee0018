"""Evaluation against closed forms and libraries: intervals, probes, features, their cache, reconstruction, masks."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr
from skimage.filters import threshold_otsu
from skimage.metrics import structural_similarity as reference_ssim
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from crate_ray.config import (
    CrateMAEConfig,
    EvaluateConfig,
    PrepareConfig,
    ProbeConfig,
    S3Config,
    TrackingConfig,
    ViTMAEConfig,
)
from crate_ray.data.decode.samples import decode_batch
from crate_ray.data.decode.transforms import centre_crops
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.read.shard_reader import ShardReader
from crate_ray.errors import UserError
from crate_ray.evaluation import masks, segmentation
from crate_ray.evaluation.classification import Classification, EncoderScores, FeatureScores, classify, classify_by
from crate_ray.evaluation.conclusions import on_classification, on_segmentation, on_structure
from crate_ray.evaluation.evaluate import evaluate
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.extraction import read_samples
from crate_ray.evaluation.feature_cache import UNUSABLE, FeatureCache, FeatureSet
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.evaluation.features import all_feature_points, compute_device, iterate_dataset
from crate_ray.evaluation.intervals import Estimate, bootstrap, mean, share
from crate_ray.evaluation.knn import knn_predict
from crate_ray.evaluation.layers import EncoderStructure, Structure, trend
from crate_ray.evaluation.probe import ProbeScore, fit_probe
from crate_ray.evaluation.reconstruction import measure_reconstruction, structural_similarity
from crate_ray.evaluation.report import Report, render
from crate_ray.evaluation.segmentation import EncoderSegmentation, MapScore, Segmentation, measure_segmentation
from crate_ray.evaluation.torch_probe import fit_path
from crate_ray.models import CrateMAE, build_model, export_published
from crate_ray.models.exported import ModelDescription, Normalizer
from crate_ray.runs.references import load_encoder
from crate_ray.serving import FeaturePoint, pooled_features
from crate_ray.storage.interface import open_storage
from crate_ray.structure.attention import key_components, patch_maps
from crate_ray.training.step import probe_noise

SMALL = CrateMAEConfig(image_size=32, patch_size=8, dim=16, depth=2, num_subspaces=2, norm_pix_loss=True)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    config = PrepareConfig(source="shapes", output=str(tmp_path_factory.mktemp("shapes")))
    storage = open_storage(config.output, config.s3)
    pack(shapes_source("all", 40, 48, 0), storage, config)
    return load_dataset(storage)


def evaluated(shards: ShardSet, model: CrateMAEConfig | ViTMAEConfig = SMALL, name: str = "trained") -> EvaluatedModel:
    torch.manual_seed(0)
    manifest = shards.manifest
    description = ModelDescription(model=model, mean=manifest.mean, std=manifest.std, kind="image")
    return EvaluatedModel(name, build_model(model).eval(), description)


# --- Intervals ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.data())
def test_wilson_interval_solves_its_equation(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    found = share(successes, trials)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):  # the ends are where the score test just rejects
        distance = (found.value - end) ** 2 * trials
        assert distance == pytest.approx(1.959963984540054**2 * end * (1 - end), abs=1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    shares = [share(int(k), 200) for k in random.binomial(200, 0.93, 1000)]
    assert 0.93 < np.mean([s.low <= 0.93 <= s.high for s in shares]) < 0.97
    means = [mean(random.normal(3, 2, 60)) for _ in range(1000)]
    assert 0.925 < np.mean([m.low <= 3 <= m.high for m in means]) < 0.97
    slopes = []
    for seed in range(200):
        curves = np.arange(5)[:, None] * 0.3 + np.random.default_rng(seed).normal(0, 1, (5, 60))
        found = bootstrap(curves, lambda c: c @ (np.arange(5) - 2) / 10, draws=300)
        slopes.append(found.low <= 0.3 <= found.high)
    assert 0.88 < np.mean(slopes) < 0.99


def test_trends_are_rank_correlation_and_slope_of_the_mean_curve() -> None:
    random = np.random.default_rng(1)
    values = np.array([5, 4, 4.5, 2, 1])[:, None] + random.normal(0, 0.1, (5, 40))
    found = trend(values)
    assert found.spearman is not None
    assert found.spearman.value == pytest.approx(spearmanr(np.arange(5), values.mean(1)).statistic)
    assert found.slope.value == pytest.approx(np.polyfit(np.arange(5), values.mean(1), 1)[0])
    assert (found.falls, found.rises, found.steps, found.verdict) == (3, 1, 4, "falls")
    assert trend(-values).verdict == "rises"
    assert trend(random.normal(0, 1, (6, 40))).verdict == "has no clear trend"
    flat = trend(np.zeros((4, 10)))
    assert flat.spearman is None and flat.verdict == "has no clear trend"


# --- Probes ---------------------------------------------------------------------------------------------------------


def test_torch_probe_agrees_with_scikit_learn_on_digits() -> None:
    x, y = load_digits(return_X_y=True)
    x, y = x.astype(np.float32), y.astype(np.int64)
    theirs = fit_probe(x[:1200], y[:1200], x[1200:], y[1200:])
    ours = fit_probe(x[:1200], y[:1200], x[1200:], y[1200:], solver="torch")
    assert theirs.accuracy > 0.88
    assert theirs.interval.low <= ours.accuracy <= theirs.interval.high
    assert ours.interval == share(round(ours.accuracy * len(y[1200:])), len(y[1200:]))


def test_torch_probe_finds_the_minimum_of_the_stated_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    # In batches of a few rows: the sum over batches is the whole objective.
    monkeypatch.setattr("crate_ray.evaluation.torch_probe._BATCH_BYTES", 4 * 6 * 7)
    random = np.random.default_rng(0)
    x, y = random.normal(2, 3, (80, 6)).astype(np.float32), random.integers(0, 3, 80)
    (probe,) = fit_path(x, y, (0.3,), num_classes=3, max_iterations=400)
    weight, bias = (p.double().requires_grad_() for p in (probe.weight, probe.bias))
    standard = torch.from_numpy((x - x.mean(0)) / x.std(0)).double()
    loss = torch.nn.functional.cross_entropy(standard @ weight.T + bias, torch.from_numpy(y), reduction="sum")
    (0.3 * loss + weight.square().sum() / 2).backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.abs().max() < 5e-3 and bias.grad.abs().max() < 5e-3


def test_knn_is_the_weighted_vote_of_scikit_learn() -> None:
    x, y = load_digits(return_X_y=True)
    x, y = x.astype(np.float32), y.astype(np.int64)
    weights = {"weights": lambda distance: np.exp((1 - distance) / 0.07)}
    reference = KNeighborsClassifier(20, metric="cosine", algorithm="brute", **weights).fit(x[:1000], y[:1000])
    found = knn_predict(x[:1000], y[:1000], x[1000:])
    assert (found == reference.predict(x[1000:])).mean() > 0.997  # but for ties in rounding
    assert np.array_equal(knn_predict(x[:5], y[:5], x[:5], neighbours=20, temperature=1e-3), y[:5])
    some, others = np.arange(0, 1500, 2), np.arange(1, 1500, 3)
    assert np.array_equal(
        knn_predict(x, y, x, train_rows=some, test_rows=others), knn_predict(x[some], y[some], x[others])
    )


class Told:
    """A source that returns given features: some for the training set, and others for any other dataset."""

    def __init__(self, shards: ShardSet, train: list[FeatureSet], test: list[FeatureSet]) -> None:
        self.shards, self.train, self.test = shards, train, test

    def encoder(
        self, _: EvaluatedModel, shards: ShardSet, points: Sequence[FeaturePoint], __: int | None
    ) -> list[FeatureSet]:
        return (self.train if shards is self.shards else self.test)[: len(points)]

    def pixels(self, _: ModelDescription, shards: ShardSet, __: int | None) -> FeatureSet:
        return (self.train if shards is self.shards else self.test)[0]


def noise(seed: int) -> list[FeatureSet]:
    """Random features of six points, independent of the labels."""
    random, labels = np.random.default_rng(seed), np.arange(60) % 3
    return [FeatureSet(random.normal(size=(60, 8)).astype(np.float32), labels, np.arange(60)) for _ in range(6)]


def test_test_samples_choose_neither_feature_nor_strength(shapes: ShardSet) -> None:
    # On noise, the best feature, layer and strength on the test samples would change with their labels.
    probe, who, held_out = ProbeConfig(train="", test=""), evaluated(shapes), without_masks(shapes)
    config = EvaluateConfig(model="m", probe=probe)
    train, test = noise(0), noise(1)
    choices, accuracies = set(), set()
    for seed in range(4):
        labels = np.random.default_rng(seed).permutation(test[0].labels)
        source = Told(shapes, train, [replace(part, labels=labels) for part in test])
        found = classify_by(who, shapes, held_out, config, probe, source)
        assert found.chosen_linear is not None and found.chosen_knn is not None
        features = found.standard, found.chosen_linear, found.chosen_knn
        choices.add((found.layers, *((one.source, one.linear.strength) for one in features)))
        accuracies.add(found.chosen_linear.linear.accuracy)
    assert len(choices) == 1 and len(accuracies) > 1


def test_features_are_measured_by_their_principal_components(shapes: ShardSet) -> None:
    probe, who = ProbeConfig(train=shapes.storage.uri, test=shapes.storage.uri), evaluated(shapes)

    def scores(components: int | None, whiten: bool = False) -> FeatureScores:
        config = EvaluateConfig(model="x", probe=probe, all_layers=False, components=components, whiten=whiten)
        return classify_by(who, shapes, shapes, config, probe, InProcess()).standard

    (features,) = InProcess().encoder(who, shapes, [FeaturePoint("mean", None)], probe.max_samples)
    centred = features.features - features.features.mean(0)
    projected = (centred @ np.linalg.svd(centred)[2][:3].T).astype(np.float32)
    found, y = scores(3), features.labels
    assert (scores(None).dim, scores(1000).dim, found.dim) == (16, 16, 3)
    expected = fit_probe(projected, y, projected, y, probe.seed, "sklearn", CPU)
    assert found.linear.accuracy == expected.accuracy
    assert found.knn.value == pytest.approx((knn_predict(projected, y, projected, device=CPU) == y).mean())
    whitened = projected / projected.std(0)
    expected_knn = (knn_predict(whitened, y, whitened, device=CPU) == y).mean()
    assert scores(3, whiten=True).knn.value == pytest.approx(expected_knn) != found.knn.value
    assert scores(None).dim == 16 and scores(None, whiten=True).dim == 15  # the LayerNorm leaves one without variance


def test_no_gpu_is_used_where_the_settings_say_so(shapes: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # without a GPU, whatever uses one fails
    assert [compute_device(gpu).type for gpu in (None, True, False)] == ["cuda", "cuda", "cpu"]
    probe = ProbeConfig(train="", test="", solver="torch")
    config = EvaluateConfig(model="m", probe=probe, gpu=False)
    source = Told(shapes, noise(0), noise(1))
    found = classify([evaluated(shapes)], shapes, without_masks(shapes), config, probe, source)
    assert found.encoders["trained"].standard.linear.solver == "torch"


# --- Features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SMALL, ViTMAEConfig(image_size=32, patch_size=8, dim=16, depth=2, num_heads=2)])
def test_features_are_the_tokens_of_their_layers(model: CrateMAEConfig | ViTMAEConfig) -> None:
    torch.manual_seed(0)
    encoder, images = build_model(model).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        encoded = encoder.encode(images, return_layers=True)
    assert encoded.layers is not None
    points = all_feature_points(2)
    assert len(points) == 6
    for point, found in zip(points, pooled_features(encoder, images, points), strict=True):
        tokens = encoded.tokens if point.layer is None else encoded.layers[point.layer - 1]
        assert torch.equal(found, tokens[:, 1:].mean(1) if point.feature == "mean" else tokens[:, 0])
    with pytest.raises(UserError, match="no encoder layer 3; the model's layers are 1 to 2"):
        pooled_features(encoder, images, [FeaturePoint("cls", 3)])


def test_a_subject_is_identified_by_its_content(shapes: ShardSet) -> None:
    one, again = evaluated(shapes), evaluated(shapes)
    assert one.digest == again.digest
    assert one.untrained(0).digest == again.untrained(0).digest != one.untrained(1).digest
    with torch.no_grad():
        again.model.encoder_norm.bias[0] += 1e-3
    changed = EvaluatedModel("trained", again.model, again.description)
    other_input = EvaluatedModel("trained", one.model, one.description.model_copy(update={"mean": (0.0, 0.0, 0.0)}))
    assert len({one.digest, changed.digest, other_input.digest}) == 3


def fill(cache: FeatureCache, key: str, rows: int, bad: int = 0, dim: int = 4) -> None:
    with cache.write([key], rows, [dim]) as writer:
        labels = np.arange(rows)
        labels[:bad] = UNUSABLE
        writer.put(np.arange(rows), [np.full((rows, dim), 7, np.float32)], labels, np.arange(rows))


def test_cache_holds_whole_entries_only_and_makes_room(tmp_path: Path) -> None:
    a, b, c = (letter * 64 for letter in "abc")
    cache = FeatureCache(tmp_path, max_bytes=10_000)
    fill(cache, a, 10, bad=3)
    found = cache.get(a)
    assert found is not None and found.features.shape == (7, 4) and found.labels.min() == 3
    with pytest.raises(RuntimeError, match="in the middle"), cache.write([b], 10, [4]):
        raise RuntimeError("in the middle")
    assert cache.get(b) is None and sorted(path.name for path in tmp_path.iterdir()) == [".partial", a]
    (tmp_path / a / "features.npy").write_bytes(b"\x93NUMPY")
    assert cache.get(a) is None
    fill(cache, a, 10)  # a damaged entry is replaced
    assert cache.get(a) is not None
    fill(cache, c, 2000)
    assert cache.get(a) is None and cache.get(c) is not None


def test_samples_far_apart_and_near_are_the_ones_asked_for(shapes: ShardSet) -> None:
    reader = ShardReader(shapes)
    every = [sample.key for sample in reader.read(0, 40)]
    for numbers in (np.array([0, 39]), np.array([3, 4, 5, 9]), np.array([17])):
        assert [s.key for s in read_samples(reader, numbers)] == [every[i] for i in numbers]


def test_published_checkpoint_is_a_model_with_imagenets_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CrateMAE.from_preset("tiny", image_size=32)
    torch.save({"model": export_published(model)}, tmp_path / "crate_mae_tiny.pth")
    loaded, description = load_encoder(str(tmp_path / "crate_mae_tiny.pth"), TrackingConfig(), S3Config())
    assert description.mean == (0.485, 0.456, 0.406) and description.model == loaded.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(UserError, match=r"there is no checkpoint file .*nothing.pth"):
        load_encoder(str(tmp_path / "nothing.pth"), TrackingConfig(), S3Config())


# --- Reconstruction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 20, 17), (1, 8, 8), (2, 5, 9)])
def test_similarity_is_that_of_scikit_image(channels: int, height: int, width: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.random((2, 4, channels, height, width))
    b[1], b[2] = a[1], 1 - a[2]
    window = min(7, height, width)
    expected = [
        reference_ssim(x, y, win_size=window - 1 + window % 2, data_range=1.0, channel_axis=0)
        for x, y in zip(a, b, strict=True)
    ]
    found = structural_similarity(torch.from_numpy(a), torch.from_numpy(b))
    assert found is not None
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    assert found[1] == pytest.approx(1)
    assert structural_similarity(torch.zeros(1, 1, 2, 9), torch.zeros(1, 1, 2, 9)) is None


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_errors_are_the_models_own_loss_and_the_pixels_it_shows(shapes: ShardSet, norm_pix_loss: bool) -> None:
    model = SMALL.model_copy(update={"norm_pix_loss": norm_pix_loss})
    who = evaluated(shapes, model)
    batches = list(iterate_dataset(shapes, model))
    result, pictures = measure_reconstruction([who], batches, (0.5, 0.75, 0.99), "shapes", CPU)
    assert result.skipped_ratios == (0.99,)
    half, trained = result.predictors["trained"].ratios
    assert (half.hidden_patches, trained.hidden_patches) == (8, 12)
    images = torch.cat([batch.images for batch in batches])
    noise = probe_noise(np.arange(len(images)), 16)
    with torch.no_grad():
        output = who.model(Normalizer.of(who.description.mean, who.description.std)(images), noise)
    if norm_pix_loss:  # no patch of the shapes is flat, and normalising undoes the scale of the input
        assert trained.normalised_mse is not None
        assert trained.normalised_mse.value == pytest.approx(output.loss.item(), rel=1e-2)
    else:
        std = torch.tensor(who.description.std)
        squares = output.prediction - who.model.target(Normalizer.of(who.description.mean, who.description.std)(images))
        per_pixel = squares.unflatten(-1, (-1, 3)).square() * std.square()
        unclipped = ((per_pixel.mean((2, 3)) * output.mask).sum(1) / 12).mean().item()
        assert trained.pixel_mse.value <= unclipped * (1 + 1e-6)
        assert trained.pixel_mse.value == pytest.approx(unclipped, rel=0.25)
    visible = result.predictors["visible"].ratios[1]
    assert visible.pixel_mse.value < trained.pixel_mse.value or norm_pix_loss  # the model has learned nothing
    assert visible.psnr.value == pytest.approx(-10 * math.log10(visible.pixel_mse.value), abs=3)
    for _, masked, predicted in pictures.rows:
        same = masked == pictures.original
        assert torch.allclose(predicted[same], pictures.original[same]) and not same.all()


# --- Masks and attention --------------------------------------------------------------------------------------------


def test_masks_get_the_crop_of_their_images(shapes: ShardSet) -> None:
    # A mask taken for a picture must come out of the image's own crop and resize as nearly the same foreground.
    model = SMALL.model_copy(update={"image_size": (16, 32)})
    random = np.random.default_rng(0)
    blob = (random.random((6, 9)) > 0.5).repeat(12, 0).repeat(12, 1)
    out = io.BytesIO()
    Image.fromarray(blob.astype(np.uint8) * 255).save(out, "PNG")
    mask = masks._load_mask(out.getvalue(), model.image_hw)
    picture = torch.empty(1, 1, 16, 32, dtype=torch.uint8)
    decode_batch([out.getvalue()], "image", lambda h, w: centre_crops(h, w, (16, 32)), picture)
    assert mask is not None and mask.shape == (16, 32)
    sure = (picture[0, 0] < 20) | (picture[0, 0] > 235)  # away from edges
    assert sure.float().mean() > 0.4
    assert np.array_equal(mask[sure], (picture[0, 0] > 127).numpy()[sure])
    assert masks._load_mask(b"no picture", (16, 32)) is None


@given(st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 1000))
def test_kept_patches_hold_the_mass_and_no_smaller_set_would(patches: int, mass: float, seed: int) -> None:
    values = np.random.default_rng(seed).random((3, patches), np.float32)
    kept = masks.top_mass(values, mass)
    share_kept = (values * kept).sum(1) / values.sum(1)
    assert (share_kept >= mass - 1e-5).all()
    smallest = np.where(kept, values, np.inf).min(1)
    assert (values[~kept] <= np.broadcast_to(smallest[:, None], values.shape)[~kept]).all()
    assert (share_kept - smallest / values.sum(1) < mass + 1e-5).all()


def test_jaccard_thresholds_and_signs_of_known_maps() -> None:
    true, found = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    true[:, :2], found[0, 1:3], found[1] = True, True, True
    assert masks.jaccard(found, true).tolist() == [1 / 3, 0.5]
    disc = -np.hypot(*np.meshgrid(np.arange(-4, 5), np.arange(-4, 5))).astype(np.float32)
    assert np.array_equal(masks.orient(np.stack([disc, -disc])), np.stack([disc, disc]))
    two = np.array([[0.0, 0.1, 0.05, 0.9, 1.0, 0.95], [1, 1, 1, 1, 1, 1]], np.float32)
    assert masks.above_otsu(two).tolist() == [[False] * 3 + [True] * 3, [False] * 6]


@given(st.integers(4, 60), st.integers(0, 1000))
def test_otsu_is_the_best_split_and_nearly_that_of_a_histogram(patches: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(0, 1, patches).astype(np.float32)
    found = masks.above_otsu(values[None])[0]

    def between(above: np.ndarray) -> float:
        return above.mean() * (1 - above.mean()) * (values[above].mean() - values[~above].mean()) ** 2

    every = [between(values > level) for level in np.sort(values)[:-1]]
    assert between(found) == pytest.approx(max(every), rel=1e-5)
    assert between(values > threshold_otsu(values, nbins=4096)) <= between(found) * (1 + 1e-6)


def test_components_and_attention_are_those_of_the_encoder() -> None:
    torch.manual_seed(0)
    model, images = build_model(SMALL).eval(), torch.randn(2, 3, 32, 32)
    found = patch_maps(model, images)
    encoded = model.encode(images, return_attention=True, return_keys=True)
    assert encoded.attention is not None and encoded.keys is not None
    assert torch.allclose(found.attention[1, 0, 1].flatten(), encoded.attention[0][1, 1, 0, 1:])
    keys = encoded.keys[-1][0, 1:].detach().double()
    _, vectors = torch.linalg.eigh(torch.cov(keys.T))
    expected = ((keys - keys.mean(0)) @ vectors[:, -1]).abs()
    assert torch.allclose(found.components[0, 0].flatten().abs().double(), expected, atol=1e-5)
    assert key_components(torch.randn(1, 2, 5), 3).shape == (1, 3, 2)


def test_segmentation_is_bounded_by_its_patches_and_by_chance(shapes: ShardSet) -> None:
    vit = ViTMAEConfig(image_size=32, patch_size=8, dim=16, depth=1, num_heads=2)
    all_evaluated = [evaluated(shapes), evaluated(shapes, vit, "baseline"), evaluated(shapes).untrained(1)]
    result, examples = measure_segmentation(all_evaluated, shapes, 40, 0.6, 0, CPU)
    assert set(result.encoders) == {"trained", "baseline", "untrained"}
    assert result.images == 40 and result.test_images == 20 and len(examples) == 6
    best = result.controls["grid"].jaccard.value
    maps = [score for encoder in result.encoders.values() for score in encoder.scores.values()]
    assert all(0 <= score.jaccard.value <= best for score in maps)
    assert result.controls["everything"].jaccard.value == pytest.approx(result.foreground.value, abs=0.05)
    assert result.controls["random"].jaccard.value < result.controls["colours"].jaccard.value
    with pytest.raises(UserError, match=r"has no members 'mask.png'"):
        measure_segmentation(all_evaluated, without_masks(shapes), 40, 0.6, 0, CPU)


def test_an_image_chooses_heads_and_components_or_is_measured_but_never_both(
    shapes: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = evaluated(shapes)
    loaded = masks.load_masked(shapes, who.description, 8)

    def measured(changed: int | None) -> tuple[list[object], Estimate]:
        """The choices, and a Jaccard index that does not depend on them, after one image's mask is inverted."""
        turned = loaded.masks.copy()
        if changed is not None:
            turned[changed] = ~turned[changed]
        monkeypatch.setattr(segmentation, "load_masked", lambda *_: replace(loaded, masks=turned))
        result, _ = measure_segmentation([who], shapes, 8, 0.6, 0, CPU)
        own = result.encoders["trained"]
        scores = [own.scores[name] for name in ("best_head", "best_last_head", "best_component")]
        scores.append(result.controls["centre"])
        return [own.heads, *((score.title, score.chosen_on) for score in scores)], result.controls["everything"].jaccard

    choices, reported = measured(None)
    tested = 0
    for image in range(8):
        now_choices, now_reported = measured(image)
        assert (now_choices == choices) != (now_reported == reported)
        tested += now_choices == choices
    assert tested == 4


def without_masks(shards: ShardSet) -> ShardSet:
    manifest = shards.manifest.model_copy(update={"suffixes": ("cls", "jpg")})
    return ShardSet(shards.storage, manifest, shards.shards, shards.index, shards.names)


# --- The report -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_report_holds_all_numbers_escapes_names_and_needs_no_network(shapes: ShardSet, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    config = EvaluateConfig(model=name, data=shapes.storage.uri, masks=shapes.storage.uri, max_images=12)
    said: list[str] = []
    report, images = evaluate(config, evaluated(shapes), None, said.append)
    assert set(report.left_out) == {"linear probe and k-NN"} and report.classification is None
    page = render(report, images).decode()
    assert name not in page and "&lt;script&gt;alert(1)" in page and "http" not in page.replace("http-equiv", "")
    assert page.count('<img src="data:image/') == sum(map(len, images.values())) == 9
    again = Report.model_validate_json(report.to_json())
    assert again == report
    assert any("R^c falls and sparsity rises" in sentence for sentence in again.conclusions["structure"])
    assert all(math.isfinite(value) for value in report.metrics().values())


@pytest.mark.slow
def test_a_baseline_is_measured_beside_the_model(
    shapes: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crate_ray.evaluation.evaluate.Extraction", lambda *_: InProcess())
    uri = shapes.storage.uri
    probe = ProbeConfig(train=uri, test=uri)
    config = EvaluateConfig(
        model="ours", baseline="theirs", probe=probe, data=uri, masks=uri, max_images=8, features_dir=str(tmp_path)
    )
    vit = ViTMAEConfig(image_size=32, patch_size=8, dim=16, depth=2, num_heads=2, decoder_depth=1)
    report, images = evaluate(config, evaluated(shapes), evaluated(shapes, vit, "baseline"), lambda _: None)
    assert report.baseline is not None and report.baseline.title == "baseline ViT-MAE" and not report.left_out
    sections = report.classification, report.reconstruction, report.structure, report.segmentation
    assert all(section is not None for section in sections)
    classification, _, structure, found = sections
    assert classification is not None and structure is not None and found is not None
    assert set(classification.encoders) == {"trained", "baseline", "untrained", "pixels"}
    assert set(structure.encoders) == set(found.encoders) == {"trained", "baseline", "untrained"}
    page = render(report, images).decode()
    again = Report.model_validate_json(report.to_json())
    assert again == report

    # Images are larger than what pixels are probed at.
    pixels = classification.encoders["pixels"]
    assert (pixels.title, pixels.standard.dim) == ("raw pixels averaged to 16 × 16", 3 * 16 * 16)
    assert "raw pixels averaged to 16 × 16, 768 values per image" in page
    assert any("Against raw pixels averaged to 16 × 16 (" in line for line in report.conclusions["classification"])
    # Every subspace has an effective rank, and the page says how far they are apart.
    trained = structure.encoders["trained"]
    for layer, ranks in zip(trained.measures["effective_rank"], trained.effective_ranks, strict=True):
        assert len(ranks) == 2 and np.mean(ranks) == pytest.approx(layer.value)
        assert f"{min(ranks):.3g} to {max(ranks):.3g})</td>" in page
    # Shares of small numbers and the errors of decoder layers are in tables.
    assert trained.undoing is not None
    rows = [[re.sub(r" ±.*", "", cell) for cell in re.findall("<td>(.*?)</td>", row)] for row in page.split("<tr>")]
    for i in range(2):
        small = [f"{100 * trained.measures[name][i].value:.3g}" for name in ("zero_share", "below_01", "below_1")]
        assert any(row[1:5] == [str(i + 1), *small] for row in rows)
        errors = [f"{trained.undoing[name][i].value:.3g}" for name in ("relative", "scaled", "other_image")]
        assert any(row[1:] == [str(i + 1), str(2 - i), *errors] for row in rows)
    # The baseline's decoder is shallower than its encoder.
    assert structure.encoders["baseline"].undoing is None
    sentences = [line for line in report.conclusions["structure"] if "differs from the encoder in depth" in line]
    assert len(sentences) == 1 and sentences[0].startswith("For the baseline ViT-MAE, the inversion")


counts = st.integers(0, 400)


def differs(one: Estimate, other: Estimate) -> bool:
    return one.low > other.high or one.high < other.low


@given(counts, counts, counts, counts)
def test_sentences_on_accuracies_say_which_is_better_and_whether_it_is_sure(a: int, b: int, c: int, d: int) -> None:
    def scores(title: str, linear: int, knn: int) -> EncoderScores:
        interval = share(linear, 400)
        probe = ProbeScore(accuracy=interval.value, interval=interval, strength=1.0, solver="sklearn")
        return EncoderScores(
            title=title, standard=FeatureScores(source="features", dim=4, linear=probe, knn=share(knn, 400))
        )

    own, other = scores("trained CRATE-MAE", a, b), scores("untrained CRATE-MAE", c, d)
    said = on_classification(
        Classification(
            train="a", test="b", train_samples=400, test_samples=400, num_classes=2, majority=share(200, 400),
            neighbours=20, temperature=0.07, encoders={"trained": own, "untrained": other},
        )
    )  # fmt: skip
    (sentence,) = (line for line in said if line.startswith("Against the untrained CRATE-MAE"))
    found = re.findall(r"([\d.]+) points (better|worse)( \(within the intervals\))?", sentence)
    pairs = (own.standard.linear.interval, other.standard.linear.interval), (own.standard.knn, other.standard.knn)
    for (points, direction, unsure), (ours, theirs) in zip(found, pairs, strict=True):
        assert float(points) == pytest.approx(100 * abs(ours.value - theirs.value), abs=0.051)
        assert direction == ("better" if ours.value >= theirs.value else "worse")
        assert bool(unsure) != differs(ours, theirs)


@given(counts, counts, counts)
def test_sentences_on_maps_compare_the_one_that_validation_chose(head: int, component: int, control: int) -> None:
    def score(title: str, count: int, chosen_on: float | None = None) -> MapScore:
        return MapScore(title=title, jaccard=share(count, 400), chosen_on=chosen_on)

    # Which is best is what the validation half says, here the reverse of the test half.
    maps = {
        "best_head": score("head", head, 1 - head / 400),
        "mean_head": score("mean", 100),
        "best_component": score("component", component, 1 - component / 400),
    }
    result = Segmentation(
        data="a", images=800, test_images=400, skipped=0, foreground=share(100, 400), mass=0.6, grid=(4, 4),
        encoders={"trained": EncoderSegmentation(title="trained CRATE-MAE", scores=maps, heads=((0.5,),))},
        controls={name: score(name, control) for name in ("everything", "centre", "random", "colours", "grid")},
    )  # fmt: skip
    ours, theirs = maps["best_head" if head <= component else "best_component"].jaccard, share(control, 400)
    sentences = [line for line in on_segmentation(result) if "the trained model's best is" in line]
    assert len(sentences) == 4
    for sentence in sentences:
        assert (
            f" {abs(ours.value - theirs.value):.3f} {'above' if ours.value >= theirs.value else 'below'} it" in sentence
        )
        assert ("(within the intervals)" in sentence) != differs(ours, theirs)


EVEN, MOSTLY, FLAT = (5.0, 4.0, 3.0, 2.0, 1.0), (5.0, 3.0, 3.5, 2.0, 1.0), (3.0, 2.9, 3.1, 2.9, 3.0)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (EVEN, EVEN, "falls at every step"),
        (EVEN, MOSTLY, "falls overall, but not at every step"),
        (EVEN, FLAT, "falls by one of its two measures only"),
        (EVEN[::-1], EVEN, "falls by one of its two measures only"),
        (EVEN[::-1], EVEN[::-1], "does not fall"),
        (FLAT, FLAT, "does not fall"),
    ],
)
def test_the_claim_on_compression_and_sparsity_follows_the_curves(
    first: tuple[float, ...], second: tuple[float, ...], verdict: str
) -> None:
    curves = [np.array(curve)[:, None] + np.random.default_rng(0).normal(0, 0.01, (5, 40)) for curve in (first, second)]
    rate, rate_span = map(trend, curves)
    zeros, gini = (trend(-curve) for curve in curves)  # what rates do, sparsity does the other way round
    one = EncoderStructure(
        title="trained CRATE-MAE", codebook="U", subspace_dim=4, num_subspaces=2, measures={}, effective_ranks=(),
        trends={"rate_after": rate, "rate_after_span": rate_span, "rate_after_raw": rate, "zero_share": zeros,
                "gini": gini},
        compressing_layers=5, compressing_layers_span=5, coherence_largest=(0.1,) * 5, coherence_mean=(0.1,) * 5,
        undoing=None,
    )  # fmt: skip
    said = on_structure(Structure(data="a", images=40, epsilon=0.5, encoders={"trained": one}))
    (claim,) = (line for line in said if line.startswith("The paper says"))
    assert claim.endswith(f"Here, R^c {verdict}, and sparsity {verdict.replace('fall', 'rise')}.")


def test_what_a_user_can_mend_is_one_sentence(shapes: ShardSet) -> None:
    with pytest.raises(ValueError, match="nothing to measure on; give --probe.train"):
        EvaluateConfig(model="runs/mine")
    config = EvaluateConfig(model="m", data=shapes.storage.uri)
    other = evaluated(shapes, ViTMAEConfig(image_size=16, patch_size=8, dim=16, depth=1, num_heads=2), "baseline")
    with pytest.raises(UserError, match="give a baseline of the same input"):
        evaluate(config, evaluated(shapes), other, print)
