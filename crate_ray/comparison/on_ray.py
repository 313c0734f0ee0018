"""The runs of a comparison on Ray, tracked in MLflow, each as `jobs/pretrain.py` and `jobs/finetune.py` would do it."""

from __future__ import annotations

from pydantic import BaseModel

from crate_ray.comparison.table import PretrainFigures, settled_speed
from crate_ray.config import CompareConfig, FinetuneConfig, PretrainConfig
from crate_ray.errors import UserError
from crate_ray.evaluation.extraction import Extraction
from crate_ray.evaluation.feature_cache import FeatureCache, default_folder
from crate_ray.finetuning.run import open_finetuning
from crate_ray.finetuning.task import FinetuneTask
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.exported import ModelDescription
from crate_ray.ray_cluster import start_ray
from crate_ray.runs.listener import Listener
from crate_ray.runs.planning import Run, driver_lease
from crate_ray.runs.pretraining import open_run
from crate_ray.runs.references import pretrained_model
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.lease import Lease
from crate_ray.tracking.pretraining import is_published, publish, track
from crate_ray.tracking.registry import load_described
from crate_ray.training.display import ProgressDisplay
from crate_ray.training.pretraining import PretrainTask
from crate_ray.training.ray.driver import train_on_ray
from crate_ray.training.task import Task

_CACHE_BYTES = 20 * 2**30


class OnRay:
    """See compare.Trainer. Every run resumes where it was cut off."""

    def __init__(self, config: CompareConfig) -> None:
        self._config = config
        self.features = Extraction(FeatureCache(default_folder(), _CACHE_BYTES), config.s3)

    def pretrain(self, config: PretrainConfig) -> PretrainFigures:
        """Train what is missing."""
        with driver_lease(config) as lease:
            run = open_run(config)
            return self._train(run, lease, PretrainTask).figures(run)

    def load(self, config: PretrainConfig) -> tuple[MaskedAutoencoder, ModelDescription]:
        """From the run's folder."""
        return load_described(f"{config.storage}/{config.name}", config.tracking, config.s3)

    def finetune(self, config: FinetuneConfig) -> float:
        """Train what is missing."""
        with driver_lease(config) as lease:
            run = open_finetuning(config, lambda reference: pretrained_model(reference, config.tracking, config.s3))
            return self._train(run, lease, FinetuneTask).at_the_end("top1", run)

    def _train(self, run: Run, lease: Lease, task_class: type[Task]) -> _Follower:
        follower = _Follower(
            open_storage(self._config.storage, self._config.s3).under(self._config.name),
            f"figures/{run.config.name}.followed.json",
        )
        if not (run.is_finished and is_published(run)):
            start_ray()
            with track(run, lease, {"crate_ray.comparison": self._config.name}) as tracker:
                with ProgressDisplay(run.first_step, run.total_steps) as display:
                    train_on_ray(run, lease, task_class, [tracker, display, follower])
                publish(run, tracker)
        return follower


class _Follower(Listener):
    """Keeps speed, memory and held-out metrics of a run, in a file too: a run may be finished by a later start."""

    def __init__(self, folder: Storage, name: str) -> None:
        self._folder, self._name = folder, name
        self._kept = _Followed()
        if folder.exists(name):
            self._kept = _Followed.model_validate_json(folder.read(name))

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        kept = self._kept
        if "images_per_second" in values:
            kept.images_per_second[step] = values["images_per_second"]
            memory = values.get("gpu_memory_bytes", values.get("memory_bytes", 0.0))
            kept.memory_bytes = max(kept.memory_bytes, memory)
        if "validation_loss" in values:
            for name, value in values.items():
                kept.held_out.setdefault(name, {})[step] = value
            self._folder.write(self._name, kept.model_dump_json().encode())

    def at_the_end(self, name: str, run: Run) -> float:
        """A metric on the held-out data after a run's last step. Raises UserError where nobody heard of it."""
        found = self._kept.held_out.get(name, {}).get(run.total_steps)
        if found is None:
            raise UserError(
                f"run {run.config.name!r} is finished, but the comparison did not follow its end; delete "
                f"{run.storage.uri} to train it again, or give the comparison another name"
            )
        return found

    def figures(self, run: Run) -> PretrainFigures:
        """Loss after the last step, median speed, most memory. Raises as `at_the_end` does."""
        kept = self._kept
        return PretrainFigures(
            loss=self.at_the_end("validation_loss", run),
            images_per_second=settled_speed([speed for _, speed in sorted(kept.images_per_second.items())]),
            memory_bytes=kept.memory_bytes,
        )


class _Followed(BaseModel):
    images_per_second: dict[int, float] = {}
    memory_bytes: float = 0.0
    held_out: dict[str, dict[int, float]] = {}
