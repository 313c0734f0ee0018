"""Runs a comparison. Every variant and seed is a separate pretraining run, and all are measured in the same way.

Results are stored, so an interrupted comparison continues and measures nothing twice. If the probe settings change, the
models are probed again. If training settings change, the comparison needs another name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel

from crate_ray.comparison.results_cache import Conditions, check_unchanged, flat, once
from crate_ray.comparison.table import Comparison, PixelFigures, PretrainFigures, RunFigures, Variant, summarize
from crate_ray.comparison.variants import OURS, count_parameters, plan_finetunings, plan_variants
from crate_ray.config import CompareConfig, EvaluateConfig, FinetuneConfig, PretrainConfig
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.errors import UserError
from crate_ray.evaluation.classification import classify_by, classify_by_pixels
from crate_ray.evaluation.evaluated_model import EvaluatedModel
from crate_ray.evaluation.feature_source import FeatureSource
from crate_ray.evaluation.probe import check_classes
from crate_ray.finetuning.run import check_augmentation
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription
from crate_ray.runs.commits import newest_complete
from crate_ray.runs.planning import Run, with_absolute_paths
from crate_ray.runs.pretraining import open_run
from crate_ray.runs.record import read_record
from crate_ray.storage.interface import Storage, open_storage


class Trainer(Protocol):
    """Trains the runs of a comparison: on Ray (on_ray), or in processes on this machine without Ray (alone)."""

    @property
    def features(self) -> FeatureSource:
        """Computes the features that are probed."""

    def pretrain(self, config: PretrainConfig) -> PretrainFigures:
        """Train, and export the model to `model` in the run's folder."""

    def load(self, config: PretrainConfig) -> tuple[MaskedAutoencoder, ModelDescription]:
        """Load the model that `pretrain` exported, and its description."""

    def finetune(self, config: FinetuneConfig) -> float:
        """Fine-tune. Returns the accuracy on the held-out data after the last step."""


class _Probed(BaseModel):
    probe: float
    probe_best: float
    knn: float
    knn_best: float


class _Untrained(BaseModel):
    probe_untrained: float
    knn_untrained: float


class _Accuracy(BaseModel):
    top1: float


class _Given(NamedTuple):
    """What the figures of a run depend on."""

    pretraining: Conditions
    finetunings: dict[str, Conditions]
    probing: Conditions


_ConfigT = TypeVar("_ConfigT", PretrainConfig, FinetuneConfig)

_MEANS: Any = {
    **dict.fromkeys(("name", "storage", "tracking", "s3", "scaling", "checkpoint"), True),
    "data": {"cache_dir", "cache_bytes", "part_bytes", "fetch_threads", "decode_threads", "prefetch_batches"},
}
"""Settings that change where and how fast a run is computed, but not its result."""


def compare(config: CompareConfig, trainer: Trainer, say: Callable[[str], None]) -> Comparison:
    """Train and measure every variant with every seed. The others are compared with the first variant."""
    plan = plan_variants(config)
    train, test = (load_dataset(open_storage(uri, config.s3)) for uri in (config.probe.train, config.probe.test))
    check_classes(train, test)
    labelled = (train, test)
    folder = open_storage(config.storage, config.s3).under(config.name)
    given: dict[str, _Given] = {}
    for runs in plan.values():
        for run in runs:
            # Check all runs before the first one starts, so that a mistake in the last one is found now.
            given[run.name] = _given(config, open_run(run), labelled)
            check_unchanged(folder, f"{run.name}.pretrained", given[run.name].pretraining)
            _check_begun(run)
            for settings in plan_finetunings(config, run).values():
                check_augmentation(settings, train.manifest.kind, run.model.channels)
                check_unchanged(folder, settings.name, given[run.name].finetunings[settings.name])
                _check_begun(settings)
    variants: dict[str, Variant] = {}
    for name, runs in plan.items():
        variants[name] = Variant(
            parameters=count_parameters(runs[0].model),
            model=runs[0].model.model_dump(mode="json"),
            runs=[_figures(config, run, given[run.name], trainer, folder, labelled, say) for run in runs],
        )
    summarize(variants)

    def probe_pixels() -> PixelFigures:
        say("linear probe and k-NN of raw pixels")
        run = plan[OURS][0]
        description, settings = trainer.load(run)[1], _evaluation(config, run)
        scores = classify_by_pixels(description, *labelled, settings, config.probe, trainer.features)
        return PixelFigures(probe=scores.linear.accuracy, knn=scores.knn.value)

    probing = given[plan[OURS][0].name].probing
    return Comparison(variants=variants, pixels=once(folder, "pixels", PixelFigures, probing, probe_pixels))


def _check_begun(config: _ConfigT) -> None:
    """Raise UserError if a run with a checkpoint was begun with other settings: it would end as a mixture of both."""
    storage = open_storage(config.storage, config.s3).under(config.name)
    record = read_record(storage)
    if record is None or newest_complete(storage) is None:
        return
    training = config.training
    if "batch_size" not in training.model_fields_set:  # it was chosen at the first start
        training = training.model_copy(update={"batch_size": record.config.training.batch_size})
    config = with_absolute_paths(config.model_copy(update={"training": training}))
    now, begun = Conditions.of(config, _MEANS), Conditions.of(record.config, _MEANS)
    if (setting := now.change(begun.all)) is not None:
        raise UserError(
            f"run {config.name!r} was begun with {setting} {flat(begun.all).get(setting)}, not "
            f"{flat(now.all).get(setting)}; give the comparison another name, or delete {storage.uri} to train it again"
        )


def _given(config: CompareConfig, run: Run, labelled: tuple[ShardSet, ShardSet]) -> _Given:
    assert isinstance(run.config, PretrainConfig) and run.config.data.validation is not None
    validation = load_dataset(open_storage(run.config.data.validation, config.s3)).manifest.digest()
    datasets = {"train": run.record.dataset, "validation": validation}
    pretraining = Conditions.of(run.config, _MEANS).extended(datasets=datasets)
    measured = Conditions({}, {}).extended(
        pretraining=pretraining, labelled=[shards.manifest.digest() for shards in labelled]
    )
    finetunings = {
        settings.name: measured.extended(finetuning=Conditions.of(settings, _MEANS))
        for settings in plan_finetunings(config, run.config).values()
    }
    whiten = {"whiten": True} if config.whiten else {}
    probing = measured.extended(probe=Conditions.of(config.probe), components=config.components, **whiten)
    return _Given(pretraining, finetunings, probing)


def _evaluation(config: CompareConfig, run: PretrainConfig) -> EvaluateConfig:
    return EvaluateConfig(model=run.name, probe=config.probe, components=config.components, whiten=config.whiten)


def _figures(
    config: CompareConfig,
    run: PretrainConfig,
    given: _Given,
    trainer: Trainer,
    folder: Storage,
    labelled: tuple[ShardSet, ShardSet],
    say: Callable[[str], None],
) -> RunFigures:
    def pretrain() -> PretrainFigures:
        say(f"{run.name}: pretraining")
        return trainer.pretrain(run)

    def probe() -> _Probed:
        say(f"{run.name}: linear probe and k-NN")
        evaluated, settings = EvaluatedModel("trained", *trainer.load(run)), _evaluation(config, run)
        scores = classify_by(evaluated, *labelled, settings, config.probe, trainer.features)
        assert scores.chosen_linear is not None and scores.chosen_knn is not None
        return _Probed(
            probe=scores.standard.linear.accuracy,
            probe_best=scores.chosen_linear.linear.accuracy,
            knn=scores.standard.knn.value,
            knn_best=scores.chosen_knn.knn.value,
        )

    def probe_untrained() -> _Untrained:
        say(f"{run.name}: linear probe and k-NN of the untrained encoder")
        evaluated = EvaluatedModel("trained", *trainer.load(run)).untrained(run.seed)
        settings = _evaluation(config, run).model_copy(update={"all_layers": False})
        scores = classify_by(evaluated, *labelled, settings, config.probe, trainer.features).standard
        return _Untrained(probe_untrained=scores.linear.accuracy, knn_untrained=scores.knn.value)

    def finetune(settings: FinetuneConfig) -> Callable[[], _Accuracy]:
        def train() -> _Accuracy:
            say(f"{settings.name}: fine-tuning")
            return _Accuracy(top1=trainer.finetune(settings))

        return train

    pretrained = once(folder, f"{run.name}.pretrained", PretrainFigures, given.pretraining, pretrain)
    probed = once(folder, f"{run.name}.probed", _Probed, given.probing, probe)
    untrained = once(folder, f"{run.name}.untrained", _Untrained, given.probing, probe_untrained)
    accuracies = {
        kind: once(folder, settings.name, _Accuracy, given.finetunings[settings.name], finetune(settings)).top1
        for kind, settings in plan_finetunings(config, run).items()
    }
    return RunFigures(
        seed=run.seed, **pretrained.model_dump(), **probed.model_dump(), **untrained.model_dump(), **accuracies
    )
