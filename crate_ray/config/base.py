"""What all settings have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]


Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all settings: unknown names are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def check_name(name: str) -> str:
    """A run's name becomes a folder and a record in MLflow."""
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ValueError(f"run name {name!r} may hold letters, digits, '-', '_' and '.' only")
    return name


RunName = Annotated[str, AfterValidator(check_name)]

Kind = Literal["image", "grid"]
"""What samples are: encoded pictures, or arrays of numbers."""
