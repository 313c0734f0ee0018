"""Foreground segmentation from attention maps and keys, measured on ground-truth masks and compared with controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from crate_ray.config import Record
from crate_ray.data.format.dataset import ShardSet
from crate_ray.evaluation.evaluated_model import EvaluatedModel, check_input
from crate_ray.evaluation.intervals import Estimate, mean
from crate_ray.evaluation.masks import (
    MaskedImages,
    above_otsu,
    coverage,
    jaccard,
    load_masked,
    orient,
    to_float_image,
    top_mass,
    upsample,
)
from crate_ray.structure.attention import patch_maps

ATTENTION_MASS = 0.6
"""Share of an attention map's mass that counts as foreground, as in DINO (arXiv 2104.14294)."""
_BATCH = 32
_COMPONENTS = 3
_PICTURES = 6
_RADII = (0.3, 0.45, 0.6, 0.75, 0.9)
_COLOUR_SIDE = 64

Threshold = Callable[[NDArray[np.float32]], NDArray[np.bool_]]


class MapScore(Record):
    """Jaccard index (IoU) of one method."""

    title: str
    """Name of the map and of the method that turns it into a foreground."""
    jaccard: Estimate
    """Mean over the images of the test half."""
    chosen_on: float | None = None
    """Mean over the images of the validation half, if that half was used to choose among candidates."""
    candidates: int = 1
    """Number of candidates."""


class EncoderSegmentation(Record):
    """Scores of one model."""

    title: str
    """Name of the model."""
    scores: dict[str, MapScore]
    """By name: 'best_head', 'best_last_head', 'mean_head', 'average_map', 'best_component'."""
    heads: tuple[tuple[float, ...], ...]
    """Mean Jaccard index on the validation half by layer and head, at the mass threshold."""


class Segmentation(Record):
    """Foregrounds from attention and keys compared with masks."""

    data: str
    """Address of the dataset."""
    images: int
    """Number of images in both halves."""
    test_images: int
    """Number of images in the test half. The others are used to choose heads, components and radii."""
    skipped: int
    """Number of samples that were left out."""
    foreground: Estimate
    """Mean share of foreground."""
    mass: float
    """Share of an attention map's mass that counts as foreground."""
    grid: tuple[int, int]
    """Rows and columns of patches, the resolution of all maps."""
    encoders: dict[str, EncoderSegmentation]
    """By name: 'trained', 'untrained', 'baseline'."""
    controls: dict[str, MapScore]
    """By name: 'everything', 'centre', 'random', 'colours', and 'grid', the best possible choice of whole patches."""

    def metrics(self) -> dict[str, float]:
        """Jaccard of the trained model and of the controls for MLflow."""
        own = {f"segmentation_{n}": s.jaccard.value for n, s in self.encoders["trained"].scores.items()}
        return own | {f"segmentation_control_{n}": s.jaccard.value for n, s in self.controls.items()}


class Example(NamedTuple):
    """One image with its maps, for a figure."""

    image: NDArray[np.float32]
    """(H, W, channels) in 0 … 1."""
    mask: NDArray[np.bool_]
    """(H, W)"""
    attention: NDArray[np.float32]
    """Attention of the trained model's best head, (h, w)."""
    attention_found: NDArray[np.bool_]
    """(h, w)"""
    component: NDArray[np.float32]
    """Its best component, with its sign chosen by `orient`: (h, w)."""
    component_found: NDArray[np.bool_]
    """(h, w)"""


class _Halves(NamedTuple):
    """Rows of the images for choosing among candidates, and of those for the reported scores."""

    validation: NDArray[np.int64]
    test: NDArray[np.int64]


class _Found(NamedTuple):
    scores: EncoderSegmentation
    attention: NDArray[np.float32]
    """Maps of the best head: (B, h, w)."""
    attention_found: NDArray[np.bool_]
    """(B, h, w)"""
    component: NDArray[np.float32]
    """Maps of the best component, with signs chosen by `orient`: (B, h, w)."""
    component_found: NDArray[np.bool_]
    """(B, h, w)"""


def measure_segmentation(
    all_evaluated: Sequence[EvaluatedModel],
    shards: ShardSet,
    max_images: int,
    mass: float,
    seed: int,
    device: torch.device,
) -> tuple[Segmentation, list[Example]]:
    """Jaccard index of the encoders' maps and of controls, and pictures of the first encoder's maps.

    Raises UserError if the dataset has no masks.
    """
    first = all_evaluated[0]
    check_input(first.description, shards.manifest, shards.storage.uri)
    loaded = load_masked(shards, first.description, max_images)
    shuffled = np.random.default_rng(seed).permutation(len(loaded.masks))
    halves = _Halves(np.sort(shuffled[: len(shuffled) // 2]), np.sort(shuffled[len(shuffled) // 2 :]))
    found = {evaluated.name: _measure(evaluated, loaded, halves, mass, device) for evaluated in all_evaluated}
    grid_hw = first.description.model.grid_hw
    result = Segmentation(
        data=shards.storage.uri,
        images=len(loaded.masks),
        test_images=len(halves.test),
        skipped=loaded.skipped,
        foreground=mean(loaded.masks.mean((1, 2))),
        mass=mass,
        grid=grid_hw,
        encoders={name: one.scores for name, one in found.items()},
        controls=_controls(loaded, halves, grid_hw, mass, seed),
    )
    return result, _examples(found[first.name], loaded, halves.test[:_PICTURES])


def _measure(
    evaluated: EvaluatedModel, loaded: MaskedImages, halves: _Halves, mass: float, device: torch.device
) -> _Found:
    model, normalizer = evaluated.model.to(device), evaluated.normalizer(device)
    parts = [patch_maps(model, normalizer(part.to(device)), _COMPONENTS) for part in loaded.images.split(_BATCH)]
    model.cpu()
    attention = torch.cat([part.attention for part in parts]).numpy()  # (B, L, K, h, w)
    components = orient(torch.cat([part.components for part in parts]).numpy())  # (B, M, h, w)
    batch, depth, heads = attention.shape[:3]
    masks = loaded.masks[:, None]

    def by_mass(maps: NDArray[np.float32]) -> NDArray[np.bool_]:
        return _threshold(maps, lambda flat: top_mass(flat, mass))

    every = attention.reshape(batch, depth * heads, *attention.shape[3:])
    heads_by_mass, heads_by_otsu = by_mass(every), _threshold(every, above_otsu)  # (B, L·K, h, w)
    components_found = _threshold(components, above_otsu)
    iou_mass = jaccard(upsample(heads_by_mass, masks.shape[2:]), masks)  # (B, L·K)
    iou_otsu = jaccard(upsample(heads_by_otsu, masks.shape[2:]), masks)
    iou_component = jaccard(upsample(components_found, masks.shape[2:]), masks)
    average = attention[:, -1].mean(1, keepdims=True)
    iou_average = jaccard(upsample(by_mass(average), masks.shape[2:]), masks)[:, 0]

    per_head = [f"layer {i // heads + 1}, head {i % heads + 1}" for i in range(depth * heads)]
    by_share, otsu = f"{mass:.0%} of the mass", "Otsu threshold"
    last = slice((depth - 1) * heads, depth * heads)
    candidates = np.concatenate([iou_mass, iou_otsu], 1)
    titles = [f"{name}, {by_share}" for name in per_head] + [f"{name}, {otsu}" for name in per_head]
    best_head, winner = _choose("best head of all layers", candidates, titles, halves)
    best_last, _ = _choose("best head of the last layer", iou_mass[:, last], titles[last], halves)
    names = [f"component {i + 1}, {otsu}" for i in range(iou_component.shape[1])]
    best_component, component = _choose("best component of the last keys", iou_component, names, halves)
    scores = {
        "best_head": best_head,
        "best_last_head": best_last,
        "mean_head": MapScore(
            title=f"a head of the last layer on average, {by_share}",
            jaccard=mean(iou_mass[halves.test, last].mean(1)),
        ),
        "average_map": MapScore(
            title=f"average attention of the last layer's heads, {by_share}", jaccard=mean(iou_average[halves.test])
        ),
        "best_component": best_component,
    }
    on_validation = iou_mass[halves.validation].mean(0).reshape(depth, heads)
    summary = EncoderSegmentation(
        title=evaluated.title, scores=scores, heads=tuple(tuple(row) for row in on_validation.tolist())
    )
    head = winner % (depth * heads)
    heads_found = heads_by_mass if winner < depth * heads else heads_by_otsu
    return _Found(
        summary, every[:, head], heads_found[:, head], components[:, component], components_found[:, component]
    )


def _choose(what: str, iou_BM: NDArray[np.float64], titles: list[str], halves: _Halves) -> tuple[MapScore, int]:
    """Choose the candidate with the best mean on the validation half, and score it on the test half."""
    on_validation = iou_BM[halves.validation].mean(0)
    best = int(on_validation.argmax())
    score = MapScore(
        title=f"{what}: {titles[best]}",
        jaccard=mean(iou_BM[halves.test, best]),
        chosen_on=float(on_validation[best]),
        candidates=len(titles),
    )
    return score, best


def _threshold(maps_Xhw: NDArray[np.float32], threshold: Threshold) -> NDArray[np.bool_]:
    shape = maps_Xhw.shape
    return threshold(maps_Xhw.reshape(*shape[:-2], -1)).reshape(shape)


def _controls(
    loaded: MaskedImages, halves: _Halves, grid_hw: tuple[int, int], mass: float, seed: int
) -> dict[str, MapScore]:
    masks = loaded.masks
    out_hw = masks.shape[1:]

    def score(title: str, found_BHW: NDArray[np.bool_]) -> MapScore:
        return MapScore(title=title, jaccard=mean(jaccard(found_BHW, masks)[halves.test]))

    y, x = np.meshgrid(*((np.arange(side) + 0.5) / side * 2 - 1 for side in out_hw), indexing="ij")
    discs = np.stack([np.broadcast_to(np.hypot(x, y) <= radius, masks.shape) for radius in _RADII], 1)
    centre, _ = _choose(
        "centre prior", jaccard(discs, masks[:, None]), [f"disc of radius {r} of half the side" for r in _RADII], halves
    )
    noise = np.random.default_rng(seed).random((len(masks), *grid_hw), np.float32)
    random = upsample(_threshold(noise, lambda flat: top_mass(flat, mass)), (out_hw[0], out_hw[1]))
    return {
        "everything": score("everything is foreground", np.ones_like(masks)),
        "centre": centre,
        "random": score(f"random maps, {mass:.0%} of the mass", random),
        "colours": score("k-means of the colours, two clusters", _colour_clusters(loaded, seed)),
        "grid": score("best choice of whole patches, from the masks", _best_patches(masks, grid_hw)),
    }


def _best_patches(masks_BHW: NDArray[np.bool_], grid_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """The patches with the largest Jaccard index: the k patches with most foreground, for the best k."""
    share_BN = coverage(masks_BHW, grid_hw).reshape(len(masks_BHW), -1)
    order_BN = np.argsort(-share_BN, 1, kind="stable")
    both_BN = np.take_along_axis(share_BN, order_BN, 1).cumsum(1)
    size_N = np.arange(1, share_BN.shape[1] + 1)
    best_B = (both_BN / (size_N + both_BN[:, -1:] - both_BN)).argmax(1)
    chosen = np.zeros(share_BN.shape, bool)
    np.put_along_axis(chosen, order_BN, size_N <= best_B[:, None] + 1, 1)
    return upsample(chosen.reshape(-1, *grid_hw), (masks_BHW.shape[1], masks_BHW.shape[2]))


def _colour_clusters(loaded: MaskedImages, seed: int) -> NDArray[np.bool_]:
    """Split the colours of each image into two clusters. The cluster that is rarer on the border is the foreground."""
    out = np.zeros_like(loaded.masks)
    pixels = to_float_image(loaded.images)
    step = max(1, -(-max(pixels.shape[1:3]) // _COLOUR_SIDE))  # fitted on every step-th pixel
    for i, image in enumerate(pixels):
        channels = image.shape[-1]
        kmeans = KMeans(2, n_init=1, random_state=seed).fit(image[::step, ::step].reshape(-1, channels))
        cluster = kmeans.predict(np.ascontiguousarray(image.reshape(-1, channels))).reshape(image.shape[:2])
        turned = orient(cluster.astype(np.float32))
        out[i] = turned > turned.mean()
    return out


def _examples(found: _Found, loaded: MaskedImages, rows: NDArray[np.int64]) -> list[Example]:
    images = to_float_image(loaded.images)
    return [
        Example(
            images[row],
            loaded.masks[row],
            found.attention[row],
            found.attention_found[row],
            found.component[row],
            found.component_found[row],
        )
        for row in rows.tolist()
    ]
