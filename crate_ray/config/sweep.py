"""Settings of `crate-ray sweep`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, ConfigFile, PositiveInt, RunName, Settings
from crate_ray.config.evaluate import ProbeConfig
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
    trials: PositiveInt = 8
    """Number of trials."""
    max_concurrent: PositiveInt = 1
    """Trials that run at the same time; each starts scaling.workers workers."""
    objective: Literal["validation_loss", "probe_accuracy"] = "validation_loss"
    """Objective to optimise: the masked loss on data.validation, or the accuracy of a linear probe."""
    against: Literal["parameters", "images_per_second", "memory"] | None = None
    """A second objective. The search then looks for the best trade-offs: the number of parameters and the memory are to
    be small, the images per second many."""
    probe: ProbeConfig | None = None
    """Linear probe; needed for objective probe_accuracy."""
    grace_steps: PositiveInt | None = None
    """Stop bad trials early (ASHA on the validation loss), but not before this many steps; off by default. Needs
    training.validate_every and objective validation_loss."""
    reduction_factor: Advanced[Annotated[int, Field(ge=2)]] = 2
    """ASHA continues one of this many trials at each rung."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the search (Optuna's TPE)."""
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
        largest = {"probe_accuracy", "images_per_second"}
        names = [self.objective, *([self.against] if self.against else [])]
        return {name: "maximize" if name in largest else "minimize" for name in names}

    @model_validator(mode="after")
    def _check_objective(self) -> Self:
        if self.objective == "probe_accuracy" and self.probe is None:
            raise ValueError("objective 'probe_accuracy' needs probe.train and probe.test")
        if self.grace_steps and self.objective != "validation_loss":
            raise ValueError("grace_steps (ASHA) needs objective 'validation_loss', which is measured during training")
        if not self.search:
            raise ValueError("search is empty; name at least one setting to search over")
        return self
