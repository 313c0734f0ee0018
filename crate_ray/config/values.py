"""Reads settings from YAML files as nested values, merges them, and validates the result."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from crate_ray.addresses import redact
from crate_ray.bounded import MAX_YAML_BYTES, MAX_YAML_VALUES, read_small
from crate_ray.config.base import Settings
from crate_ray.errors import UserError

ConfigT = TypeVar("ConfigT", bound=Settings)

_ALTERNATIVES = {"steps": "epochs", "epochs": "steps", "lr": "base_lr", "base_lr": "lr"}
"""Pairs of alternative settings in one group. The one that is set last replaces the other."""


_MAX_DIGITS = 40  # of a number in YAML


class _Shorten(reprlib.Repr):
    def repr_str(self, text: str, level: int) -> str:
        return super().repr_str(redact(text), level)  # a shortened address is one no more


_shorten = _Shorten()
_shorten.maxstring = _shorten.maxother = 200


def load_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a YAML file.

    Raises:
        UserError: it cannot be read, is too large, or holds no mapping.
    """
    try:
        values = _parse_yaml(read_small(path, MAX_YAML_BYTES).decode())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from None
    except Exception as error:  # for values such as `!!bool x`, PyYAML raises anything
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not settings by name")
    return values


def _parse_yaml(text: str) -> Any:
    """The value of a YAML document. Its size is checked before values are made."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > MAX_YAML_VALUES:
            raise ValueError(f"it holds more than {MAX_YAML_VALUES} values, those that aliases repeat included")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Number of values in a node. An aliased node counts again at each alias. A node within itself has too many."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > _MAX_DIGITS:
            raise ValueError(f"it holds a number of {len(node.value)} digits")
        return 1
    if id(node) not in counted:
        counted[id(node)] = MAX_YAML_VALUES + 1
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        counted[id(node)] = 1 + sum(_count_values(part, counted) for part in inner)
    return counted[id(node)]


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
    """Validate settings. Raises one UserError that lists every problem."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = {_where(config_class, problem): problem for problem in reversed(error.errors())}
        raise UserError("; ".join(_explain(config_class, *item) for item in reversed(problems.items()))) from None


def dotted_names(config_class: type[BaseModel]) -> list[str]:
    """Names of all settings, such as `training.steps`, groups included."""
    names: list[str] = []
    for name, field in config_class.model_fields.items():
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
    known, where = set(dotted_names(config_class)), ""
    for part in problem["loc"]:
        longer = f"{where}.{part}" if where else str(part)
        if longer in known or (problem["type"] == "extra_forbidden" and part == problem["loc"][-1]):
            where = longer
    if problem["type"] == "union_tag_invalid":
        where += f".{problem['ctx']['discriminator'].strip(chr(39))}"
    return where


def _explain(config_class: type[BaseModel], where: str, problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        if where in dotted_names(config_class):
            return f"setting {where!r} does not belong to {problem['loc'][-2]}"
        if where in removed_names(config_class):
            return f"setting {where!r} was removed: {removed_names(config_class)[where]}; leave it out"
        hint = suggest(where, dotted_names(config_class)) or "; --help-all lists every setting"
        return f"there is no setting {where!r}{hint}"
    if problem["type"] == "union_tag_invalid":
        known = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"setting {where!r} is {_shorten.repr(problem['ctx']['tag'])}: input should be {known}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return f"setting {where!r} has too few values; give {problem['loc'][-1] + 1}"
    if problem["type"] == "missing":
        return f"setting {where!r} is required; give --{kebab(where)} or put it into the --config file"
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"setting {where!r} is {_shorten.repr(problem['input'])}: {message[0].lower() + message[1:]}"
