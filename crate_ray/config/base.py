"""The base class of all settings, and the marks for advanced settings and file names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, field_validator

from crate_ray.addresses import Address, has_secret, redact

T = TypeVar("T")

PositiveInt = Annotated[int, Field(gt=0)]


Fraction = Annotated[float, Field(ge=0, le=1)]


class Mark:
    """Metadata of a field that the command line reads; validation ignores it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


ADVANCED, CONFIG_FILE = Mark("ADVANCED"), Mark("CONFIG_FILE")

Advanced = Annotated[T, ADVANCED]
"""A setting that few people need: `--help` leaves it out, `--help-all` and docs/configuration.md show it."""

ConfigFile = Annotated[T, CONFIG_FILE]
"""The name of another YAML file. In a YAML file it is relative to that file's folder."""


class Settings(BaseModel):
    """Base of all settings: unknown names are errors, numbers are finite, values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # it may hold a secret
        allow_inf_nan=False,
    )

    short_forms: ClassVar[dict[str, str]] = {}
    """Short forms: command-line options that set several settings, with their help texts."""
    removed: ClassVar[dict[str, str]] = {}
    """Settings of earlier versions, with a text on what the code does now."""

    @field_validator("*")
    @classmethod
    def _check_secrets(cls, value: Any) -> Any:
        """Settings are stored with the results, so no text in them may hold a secret."""
        for text in _texts(value):
            if not isinstance(text, Address) and "://" in text and has_secret(text):
                raise ValueError(
                    f"{redact(text)!r} holds a user name, a password or a token; leave it out: credentials come from "
                    "the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
        return value


class Record(Settings):
    """Base of measured values that are stored: unlike a setting, a figure may be infinite or no number."""

    model_config = ConfigDict(allow_inf_nan=True)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a setting's value, keys included. Groups check their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def check_name(name: str) -> str:
    """Check a run's name, which also names a folder and an MLflow run. Raises ValueError if it is invalid."""
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ValueError(f"run name {name!r} may hold letters, digits, '-', '_' and '.' only")
    return name


ServerAddress = Annotated[
    str, WrapValidator(lambda given, check: given if isinstance(given, Address) else Address(check(given)))
]
"""Address of a server, an `Address`: as text, and wherever it is stored, it has no password or token."""

RunName = Annotated[str, AfterValidator(check_name)]

Kind = Literal["image", "grid"]
"""Kind of the samples: encoded images, or arrays of numbers."""
