"""Reads settings from YAML files as nested values, merges them, and validates the result."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from crate_ray.addresses import redact
from crate_ray.bounded import MAX_YAML_BYTES, read_small
from crate_ray.config.base import Settings
from crate_ray.config.yaml_text import parse_yaml
from crate_ray.errors import UserError

ConfigT = TypeVar("ConfigT", bound=Settings)

_ALTERNATIVES = {"steps": "epochs", "epochs": "steps", "lr": "base_lr", "base_lr": "lr"}
"""Pairs of alternative settings in one group. The one that is set last replaces the other."""

_MOST_PROBLEMS = 10  # that one message lists


class _Shorten(reprlib.Repr):
    def repr_str(self, text: str, level: int) -> str:
        return super().repr_str(redact(text), level)  # a shortened address is one no more


_shorten = _Shorten()
_shorten.maxstring = _shorten.maxother = 200


def load_yaml(path: Path) -> dict[str, Any]:
    """Read the values of a YAML file.

    Raises:
        UserError: it cannot be read, is too large, has a key twice, or holds no mapping.
    """
    try:
        values = parse_yaml(read_small(path, MAX_YAML_BYTES))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not settings by name")
    return values


def load_settings(config_class: type[BaseModel], path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file, nested. They are validated later."""
    return expand(config_class, load_yaml(path), str(path))


def expand(config_class: type[BaseModel], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Values with dotted names, such as {'training.steps': 5}, as nested ones. Nested ones may be mixed with them.

    Keys inside a setting that is a mapping, such as the `settings` of a sweep, are the user's and stay.

    Raises:
        UserError: a setting is given in both ways. `source` says where.
    """
    out: dict[str, Any] = {}
    try:
        for name, value in values.items():
            _put(config_class, out, str(name), value, "")
    except _GivenTwiceError as error:
        raise UserError(f"{source}: setting {str(error)!r} is given twice; give it once") from None
    return out


class _GivenTwiceError(Exception):
    """The name of a setting."""


def _put(config_class: type[BaseModel], out: dict[str, Any], name: str, value: Any, prefix: str) -> None:
    """Add a value under a name, which may be dotted, to the nested values of a class."""
    group, dot, inner = name.partition(".")
    field = config_class.model_fields.get(group)
    models = models_in(field.annotation) if field else []
    if dot and models:
        value = {inner: value}
    elif dot:
        group = name
    elif field and models and value is None and type(None) not in get_args(field.annotation):
        value = {}  # a section whose lines are all comments
    if not (models and isinstance(value, dict)):
        if group in out:
            raise _GivenTwiceError(prefix + group)
        out[group] = value
        return
    under = out.setdefault(group, {})
    if not isinstance(under, dict):
        raise _GivenTwiceError(prefix + group)
    for key, part in value.items():
        owner = next((model for model in models if str(key).partition(".")[0] in model.model_fields), models[0])
        _put(owner, under, str(key), part, f"{prefix}{group}.")


def nested(dotted: dict[str, Any]) -> dict[str, Any]:
    """{'a.b': 1} as {'a': {'b': 1}}."""
    out: dict[str, Any] = {}
    for name, value in dotted.items():
        *groups, last = name.split(".")
        level = out
        for group in groups:
            level = level.setdefault(group, {})
        level[last] = value
    return out


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with overrides applied.

    An override of `steps` also removes the base's `epochs`, and the other way round; the same holds for `lr` and
    `base_lr`.
    """
    out = dict(base)
    for name, value in overrides.items():
        under = out.get(name)
        out[name] = merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
        other = _ALTERNATIVES.get(name)
        if other is not None and value not in (None, "null") and other not in overrides:
            out.pop(other, None)
    return out


def validate(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Validate settings. Raises one UserError that lists the problems."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = {_where(config_class, problem): problem for problem in reversed(error.errors())}
        shown = [_explain(config_class, *item) for item in list(reversed(problems.items()))[:_MOST_PROBLEMS]]
        more = f"; and {len(problems) - _MOST_PROBLEMS} more problems" if len(problems) > _MOST_PROBLEMS else ""
        raise UserError("; ".join(shown) + more) from None


def dotted_names(config_class: type[BaseModel]) -> list[str]:
    """Names of all settings, such as `training.steps`, groups included."""
    names: list[str] = []
    for python_name, field in config_class.model_fields.items():
        name = field.alias or python_name
        names.append(name)
        for model in models_in(field.annotation):
            names += [f"{name}.{inner}" for inner in dotted_names(model) if f"{name}.{inner}" not in names]
    return names


def removed_names(config_class: type[BaseModel]) -> dict[str, str]:
    """Dotted names of settings of earlier versions, with a text on what the code does now."""
    names = dict(getattr(config_class, "removed", {}))
    for name, field in config_class.model_fields.items():
        for model in models_in(field.annotation):
            names |= {f"{name}.{inner}": text for inner, text in removed_names(model).items()}
    return names


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Settings classes that an annotation names: one for a group, several for a union, none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [m for part in get_args(annotation) for m in models_in(part)]
    return [m for part in get_args(annotation)[:1] for m in models_in(part)] if get_origin(annotation) else []


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that a misspelt one probably means.

    A name that equals the last part of a dotted one means that one: `batch_size` means `training.batch_size`.
    """
    last = name.rsplit(".", 1)[-1]
    close = [n for n in known if n.rsplit(".", 1)[-1] == last] or difflib.get_close_matches(name, known, 1, 0.6)
    return close[0] if close else None


def suggest(name: str, known: Sequence[str]) -> str:
    """', did you mean …?' for a misspelt name, or nothing."""
    close = closest(name, known)
    return f", did you mean {close!r}?" if close else ""


def kebab(name: str) -> str:
    """A setting's name as it is written on the command line: `data.cache_dir` becomes `data.cache-dir`."""
    return name.replace("_", "-")


def _where(config_class: type[BaseModel], problem: Any) -> str:
    """Dotted name of the setting that a problem is about, without the tags and types of union members."""
    known, where, mapping = set(dotted_names(config_class)), "", False
    for part in problem["loc"]:
        longer = f"{where}.{part}" if where else str(part)
        if mapping and isinstance(part, str) and part != "[key]":  # a key that the user chose, and what is inside
            where = longer
        elif longer in known or (problem["type"] == "extra_forbidden" and part == problem["loc"][-1]):
            where = longer
            mapping = _mapped(config_class, where) is not None
    if problem["type"] == "union_tag_invalid":
        where += f".{problem['ctx']['discriminator'].strip(chr(39))}"
    return where


def _explain(config_class: type[BaseModel], where: str, problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return _no_setting(config_class, where, problem["loc"])
    if problem["type"] == "union_tag_invalid":
        known = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"setting {where!r} is {_shorten.repr(problem['ctx']['tag'])}: input should be {known}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return f"setting {where!r} has too few values; give {problem['loc'][-1] + 1}"
    if problem["type"] == "missing":
        return f"setting {where!r} is required; give --{kebab(where)} or put it into the --config file"
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    if problem["type"] == "string_type" and isinstance(problem["input"], int | float):
        message += "; put it in quotes"
    return f"setting {where!r} is {_shorten.repr(problem['input'])}: {message[0].lower() + message[1:]}"


def _no_setting(config_class: type[BaseModel], where: str, loc: tuple[int | str, ...]) -> str:
    """The sentence about a name that no setting has."""
    known, removed = dotted_names(config_class), removed_names(config_class)
    if where in known and len(loc) > 1:
        return f"setting {where!r} does not belong to {loc[-2]}"
    if where in removed:
        return f"setting {where!r} was removed: {removed[where]}; leave it out"
    if mapped := _mapped(config_class, str(loc[0])):  # inside a mapping, such as search of a sweep
        names = dotted_names(mapped)
        hint = suggest(str(loc[-1]), names) or f"; there are {', '.join(names)}"
    else:
        hint = suggest(where, known) or "; --help-all lists every setting"
    return f"there is no setting {where!r}{hint}"


def _mapped(config_class: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of the values of a setting that is a mapping of groups; None if it is none."""
    field = config_class.model_fields.get(name)
    if field is None or get_origin(field.annotation) is not dict:
        return None
    return next(iter(models_in(get_args(field.annotation)[1])), None)
