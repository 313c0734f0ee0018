"""The quality of an encoder's features, measured on the checkpoints of a run while it trains on."""

from __future__ import annotations

import torch

from crate_ray.config import PretrainConfig, ProbeConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.knn import knn_predict
from crate_ray.evaluation.probe import fit_probe, labelled_features
from crate_ray.runs.metrics import EFFECTIVE_RANK, KNN_ACCURACY, PROBE_ACCURACY
from crate_ray.runs.quality import Quality, write_quality
from crate_ray.runs.references import load_encoder
from crate_ray.storage.interface import open_storage
from crate_ray.structure.coding_rate import effective_rank


def measure_checkpoint(config: PretrainConfig, step: int) -> dict[str, float]:
    """Measure the features of a run's checkpoint, store the quality in the run, and return it as metrics.

    Args:
        config: settings of the run, with its `probe` and absolute paths.
        step: of a committed checkpoint.

    Raises:
        UserError: the checkpoint does not exist any more, or a dataset has no labels.
    """
    assert config.probe is not None
    probe = ProbeConfig(**config.probe.model_dump(exclude={"every"}))
    run = open_storage(config.storage, config.s3).under(config.name)
    model, description = load_encoder(f"{run.uri}@{step}", config.tracking, config.s3)
    train, test = (load_dataset(open_storage(uri, config.s3)) for uri in (probe.train, probe.test))
    fitted, tested = labelled_features(EvaluatedModel("trained", model, description), train, test, probe)
    predicted = knn_predict(fitted.features, fitted.labels, tested.features)
    values = {
        KNN_ACCURACY: float((predicted == tested.labels).mean()),
        PROBE_ACCURACY: fit_probe(fitted.features, fitted.labels, tested.features, tested.labels).accuracy,
        EFFECTIVE_RANK: effective_rank(torch.from_numpy(tested.features)).item(),
    }
    best_by = {"knn_accuracy": KNN_ACCURACY, "probe_accuracy": PROBE_ACCURACY}.get(config.checkpoint.keep_best_by)
    write_quality(run, step, Quality(values=values, best_by=best_by))
    return values
