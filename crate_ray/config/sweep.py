"""Settings of `crate-ray sweep`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, ConfigFile, PositiveInt, RunName, Settings
from crate_ray.config.evaluate import ProbeConfig
from crate_ray.config.registry import ModelName
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class SearchSpace(Settings):
    """Values to try for one setting. Set exactly one of the fields."""

    choice: tuple[Any, ...] | None = None
    """One of these values."""
    integers: tuple[int, int] | None = None
    """An integer from the first to the second, both included."""
    uniform: tuple[float, float] | None = None
    """A number between the two, uniformly distributed."""
    loguniform: tuple[float, float] | None = None
    """A positive number between the two, its logarithm uniformly distributed."""

    @model_validator(mode="before")
    @classmethod
    def _check_form(cls, values: Any) -> Any:
        if not isinstance(values, dict | SearchSpace):
            raise ValueError("give a mapping, such as {choice: [1, 2]} or {loguniform: [1e-4, 1e-2]}")
        return values

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of choice, integers, uniform and loguniform, not {given or 'none'}")
        values = getattr(self, given[0])
        if not values:
            raise ValueError("choice needs at least one value")
        if given[0] == "choice" and (twice := _first_twice(values)):
            raise ValueError(f"choice has {twice} twice; give it once")
        if given[0] != "choice" and (values[0] >= values[1] or (given[0] == "loguniform" and values[0] <= 0)):
            raise ValueError(f"{given[0]} needs a smaller and a larger number (positive for loguniform), not {values}")
        return self


def _first_twice(values: tuple[Any, ...]) -> str:
    """The first value that is there twice, as text; empty if there is none. 1 and 1.0 are the same, true is not."""
    seen: set[str] = set()
    for value in values:
        whole = isinstance(value, float) and value.is_integer()
        text = json.dumps(int(value) if whole else value, sort_keys=True, default=str)
        if text in seen:
            return text
        seen.add(text)
    return ""


class SweepConfig(Settings):
    """Search over settings of pretraining. Every trial is a full pretraining run."""

    name: RunName = "sweep"
    """Name of the sweep; the same name and storage continue it, and finished trials are not repeated."""
    storage: str = "runs"
    """Local folder or s3://bucket/prefix for the trials' checkpoints and the results."""
    base: ConfigFile[str]
    """YAML file with the pretraining settings that all trials share. In a YAML file, relative to its folder."""
    settings: dict[str, Any] = {}
    """Dotted pretraining settings that override the base in all trials, such as {training.steps: 500}."""
    search: dict[str, SearchSpace]
    """Dotted pretraining settings to search over, with their values, such as
    {model.num_subspaces: {choice: [4, 8]}, optim.lr: {loguniform: [1e-4, 1e-2]}}."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How values are chosen: from the results so far (Optuna's multivariate TPE), at random, or every combination of
    choices and integers. No combination is tried twice."""
    trials: PositiveInt = 8
    """Largest number of trials. By default 8; for a grid all combinations; with `hours` up to 1,000."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Hours after which no new trial starts, earlier starts of the sweep included."""
    patience: PositiveInt | None = None
    """Stop the sweep if this many trials in a row have not improved the best objective."""
    min_delta: Advanced[Annotated[float, Field(ge=0)]] = 0.0
    """Smallest change of the best objective that counts as an improvement for `patience`."""
    warm_start: str | None = None
    """Settings to try first: the folder of an earlier sweep, whose best trials are taken, or a YAML file of pretraining
    settings, such as a best.yaml. Settings that are not searched, and values outside of their range, are left out."""
    max_concurrent: PositiveInt = 1
    """Trials that run at the same time. They share the cluster equally; each starts scaling.workers workers."""
    objective: Literal["validation_loss", "probe_accuracy", "knn_accuracy"] = "validation_loss"
    """Objective to optimise: the masked loss on data.validation, or the accuracy of a linear probe or of k-NN on the
    datasets of `probe`."""
    against: Literal["parameters", "images_per_second", "memory"] | None = None
    """A second objective. The search then looks for the best trade-offs: the number of parameters and the memory are to
    be small, the images per second many."""
    probe: ProbeConfig | None = None
    """Labelled datasets and the linear probe; needed for objectives probe_accuracy and knn_accuracy."""
    early_stopping: Literal["none", "asha", "median"] = "none"
    """Stop bad trials early: those that are not among the best at a rung ('asha'), or whose best objective is worse
    than the median of the other trials' means so far ('median'). The objective is measured every
    training.validate_every steps."""
    grace_steps: PositiveInt | None = None
    """Steps before which no trial is stopped early; by default a quarter of the run. Without early_stopping, this turns
    on 'asha'."""
    reduction_factor: Advanced[Annotated[int, Field(ge=2)]] = 3
    """ASHA continues one of this many trials at each rung."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the search."""
    register_best: ModelName | None = None
    """Name of a registered model. The best trial's model becomes its new version when the sweep has ended."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow: one parent run for the sweep, one child run per trial."""
    s3: S3Config = S3Config()
    """Object storage."""

    @property
    def minimizes(self) -> bool:
        """Whether the best objective is the smallest."""
        return self.objective == "validation_loss"

    @property
    def directions(self) -> dict[str, Literal["minimize", "maximize"]]:
        """Every objective by name, the first one first, and whether it is to be small or large."""
        largest = {"probe_accuracy", "knn_accuracy", "images_per_second"}
        names = [self.objective, *([self.against] if self.against else [])]
        return {name: "maximize" if name in largest else "minimize" for name in names}

    @model_validator(mode="before")
    @classmethod
    def _grace_steps_mean_asha(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("grace_steps") and "early_stopping" not in values:
            return {**values, "early_stopping": "asha"}
        return values

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.objective != "validation_loss" and self.probe is None:
            raise ValueError(f"objective {self.objective!r} needs probe.train and probe.test")
        if self.against and (self.early_stopping != "none" or self.patience):
            raise ValueError(
                "early_stopping and patience look at the first objective alone, and would end the search for "
                "trade-offs too early; leave them out, or leave out `against`"
            )
        if not self.search:
            raise ValueError("search is empty; name at least one setting to search over")
        continuous = [name for name, space in self.search.items() if space.uniform or space.loguniform]
        if self.sampler == "grid" and continuous:
            raise ValueError(f"sampler 'grid' needs a choice or integers for each setting, not {continuous[0]}")
        return self
