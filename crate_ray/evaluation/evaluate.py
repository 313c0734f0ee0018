"""Evaluate models on datasets and build the report. Each section needs its own data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crate_ray.config import EvaluateConfig
from crate_ray.data.batch import Batch
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.errors import UserError
from crate_ray.evaluation import conclusions, figures
from crate_ray.evaluation.classification import classify
from crate_ray.evaluation.evaluated_model import EvaluatedModel, check_input
from crate_ray.evaluation.extraction import Extraction
from crate_ray.evaluation.feature_cache import FeatureCache
from crate_ray.evaluation.features import compute_device, iterate_dataset
from crate_ray.evaluation.figures import Image
from crate_ray.evaluation.layers import measure_structure
from crate_ray.evaluation.learning import measure_learning
from crate_ray.evaluation.reconstruction import measure_reconstruction
from crate_ray.evaluation.report import ModelFacts, Report, charts, describe
from crate_ray.evaluation.segmentation import ATTENTION_MASS, measure_segmentation
from crate_ray.storage.interface import open_storage
from crate_ray.storage.node_folders import feature_folder
from crate_ray.structure.coding_rate import EPSILON


def evaluate(
    config: EvaluateConfig, trained: EvaluatedModel, baseline: EvaluatedModel | None, log: Callable[[str], None]
) -> tuple[Report, dict[str, list[Image]]]:
    """Measure every section that has data. Returns the report and its figures by section. 'pictures' are at the top.

    All datasets are opened before anything is measured. Ray tasks compute features that are not in the cache; Ray is
    started only for them. Everything else runs in this process, on its GPU if it has one.

    Args:
        config: settings.
        trained: the model to evaluate.
        baseline: a model to compare it with.
        log: called with the name of each section before it is measured.
    """
    device = compute_device(config.gpu)
    all_evaluated = _models(config, trained, baseline)
    probe = config.probe
    labelled = [_open(uri, config) for uri in (probe.train, probe.test)] if probe else None
    held_out = _open(config.data, config) if config.data else None
    masked = _open(config.masks, config) if config.masks else None
    loaded = _load(held_out, trained, config) if held_out else []
    pictures: list[Image] = []
    said: dict[str, list[str]] = {}

    classification = reconstruction = structure = learning = segmentation = None
    if probe and labelled:
        log("linear probe and k-NN")
        folder = Path(config.features_dir) if config.features_dir else feature_folder()
        cache = FeatureCache(folder, config.features_bytes)
        extraction = Extraction(cache, config.s3, config.workers, config.gpu)
        classification = classify(all_evaluated, labelled[0], labelled[1], config, probe, extraction)
        said["classification"] = conclusions.on_classification(classification)
    left_out = _left_out(config)
    if held_out:
        uri = held_out.storage.uri
        if without := [evaluated.title for evaluated in all_evaluated if not evaluated.model.has_decoder]:
            left_out["reconstruction"] = f"the {without[0]} has no decoder"
        else:
            log("reconstruction")
            reconstruction, reconstructed = measure_reconstruction(
                all_evaluated, loaded, config.mask_ratios, uri, device
            )
            pictures.append(figures.reconstruction_pictures(reconstructed))
            said["reconstruction"] = conclusions.on_reconstruction(reconstruction)
        log("structure of the layers")
        structure = measure_structure(all_evaluated, loaded, uri, EPSILON, device)
        said["structure"] = conclusions.on_structure(structure)
        log("signals of learning")
        if (learning := measure_learning(all_evaluated, loaded, uri, device)) is not None:
            said["learning"] = conclusions.on_learning(learning)
    if masked:
        log("attention and segmentation")
        seed = probe.seed if probe else 0
        segmentation, examples = measure_segmentation(
            all_evaluated, masked, config.max_images, ATTENTION_MASS, seed, device
        )
        pictures.append(figures.foreground_pictures(examples))
        said["segmentation"] = conclusions.on_segmentation(segmentation)

    created, version, settings = describe(config)
    report = Report(
        created=created,
        version=version,
        model=ModelFacts.of(trained, config.model),
        baseline=ModelFacts.of(baseline, config.baseline or "") if baseline else None,
        settings=settings,
        image_size=config.image_size,
        left_out=left_out,
        classification=classification,
        reconstruction=reconstruction,
        structure=structure,
        learning=learning,
        segmentation=segmentation,
        conclusions=said,
    )
    return report, {"pictures": pictures, **charts(report)}


def _models(config: EvaluateConfig, trained: EvaluatedModel, baseline: EvaluatedModel | None) -> list[EvaluatedModel]:
    if baseline is not None:
        ours, theirs = trained.description.model, baseline.description.model
        if (ours.image_hw, ours.channels, trained.description.kind) != (
            theirs.image_hw,
            theirs.channels,
            baseline.description.kind,
        ):
            raise UserError(
                f"the baseline takes {theirs.channels} × {theirs.image_hw} {baseline.description.kind}s, the model "
                f"{ours.channels} × {ours.image_hw} {trained.description.kind}s; give a baseline of the same input"
            )
    seed = config.probe.seed if config.probe else 0
    return [trained, *([baseline] if baseline else []), trained.untrained(seed)]


def _open(uri: str, config: EvaluateConfig) -> ShardSet:
    return load_dataset(open_storage(uri, config.s3))


def _load(shards: ShardSet, evaluated: EvaluatedModel, config: EvaluateConfig) -> list[Batch]:
    uri = shards.storage.uri
    check_input(evaluated.description, shards.manifest, uri)
    loaded = list(iterate_dataset(shards, evaluated.description.model, config.max_images))
    if sum(len(batch.keys) for batch in loaded) < 2:
        raise UserError(f"{uri} has fewer than two usable samples; --data needs at least two")
    return loaded


def _left_out(config: EvaluateConfig) -> dict[str, str]:
    out = {}
    if config.probe is None:
        out["linear probe and k-NN"] = "no labelled datasets (--probe.train, --probe.test)"
    if config.data is None:
        out["reconstruction, structure of the layers"] = "no held-out dataset (--data)"
    if config.masks is None:
        out["attention and segmentation"] = "no dataset with masks (--masks)"
    return out
