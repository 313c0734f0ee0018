"""Every setting of a job as text: for `--help`, `--help-all` and docs/configuration.md."""

from __future__ import annotations

import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from crate_ray.config.base import ADVANCED, Settings
from crate_ray.config.values import kebab, models_in

_NAME_WIDTH = 36  # columns of --help for name and type
_TYPES = {bool: "true|false", int: "int", float: "float", str: "text"}


@dataclass(frozen=True)
class Setting:
    """One setting of a job."""

    name: str
    """Dotted name, as in YAML."""
    type: str
    default: str | None
    """Default as written on the command line; None if the setting is required."""
    text: str
    """Its documentation."""
    advanced: bool
    only_for: str | None = None
    """The only architecture that has this setting; None if all have it."""

    @property
    def first_sentence(self) -> str:
        """The first sentence of its documentation, up to a semicolon, without the full stop."""
        return re.split(r"[.;](?: |$)", self.text, maxsplit=1)[0]


@dataclass(frozen=True)
class Group:
    """Settings under one name, such as `training`."""

    name: str
    """Empty for the job's own settings."""
    text: str
    settings: tuple[Setting, ...]


def list_groups(config_class: type[Settings]) -> list[Group]:
    """Settings of a job, group by group, in the order of the classes; the job's own come first."""
    groups = [Group("", "", tuple(_own_settings(config_class, None, "")))]
    for name, field in config_class.model_fields.items():
        models = models_in(field.annotation)
        if not models or _is_mapping(field.annotation):
            continue
        instance = field.default if isinstance(field.default, BaseModel) else None
        if len(models) == 1:
            settings = tuple(_own_settings(models[0], instance, f"{name}."))
        else:
            settings = tuple(_union_settings(models, instance, f"{name}."))
        if _is_advanced(field):
            settings = tuple(replace(setting, advanced=True) for setting in settings)
        groups.append(Group(name, _one_line(field.description or models[0].__doc__ or ""), settings))
    return groups


def help_text(config_class: type[Settings], prog: str, *, everything: bool, width: int) -> str:
    """The text of `--help`, or with `everything` of `--help-all`.

    Args:
        config_class: settings of the job.
        prog: how the job is called, for the usage line.
        everything: show advanced settings too, and whole texts instead of first sentences.
        width: columns.
    """
    doc = textwrap.dedent(config_class.__doc__ or "").strip()
    lines = [f"usage: {prog} [--config FILE] [--SETTING VALUE ...]", "", doc.partition("\n\n")[0], ""]
    lines += _entry("--config FILE", "YAML file with settings; command-line options override it.", width)
    for name, text in config_class.short_forms.items():
        lines += _entry(f"--{kebab(name)} PATH", text, width)
    hidden = 0
    for group in list_groups(config_class):
        shown = [s for s in group.settings if everything or not s.advanced]
        hidden += len(group.settings) - len(shown)
        if shown and group.name:
            lines += ["", f"{group.name}: {group.text}"]
        for setting in shown:
            text = setting.text if everything else setting.first_sentence
            if setting.only_for:
                text = f"[{setting.only_for}] {text}"
            default = "required" if setting.default is None else f"default: {setting.default}"
            if setting.default != "null":
                text = f"{text} ({default})"
            lines += _entry(f"--{kebab(setting.name)} {setting.type}", text, width)
    if hidden:
        lines += ["", f"--help-all shows {hidden} advanced settings too. In a YAML file, write '_' for '-'."]
    return "\n".join(lines)


def markdown(jobs: dict[str, tuple[type[Settings], ...]]) -> str:
    """docs/configuration.md: the settings of every job, by command."""
    lines = [
        "# Configuration",
        "",
        "<!-- Generated from crate_ray/config by `crate-ray configs --markdown`; a test compares. -->",
        "",
        "Every job reads `--config FILE.yaml`, then the command-line options, which override it. A YAML file nests the",
        "groups and writes names with `_`. The command line joins groups and names with a dot, and writes `-`:",
        "",
        "```yaml",
        "training:",
        "  batch_size: 256        # --training.batch-size 256",
        "```",
        "",
        "YAML follows version 1.2: `off`, `yes` and dates are strings, `1e-4` is a number. Dotted names work too. A",
        "name that is given twice is an error. On the command line, a list is written `a,b`, and a mapping as YAML or",
        "JSON: `--settings '{training.steps: 5}'`.",
        "",
        "Some options also replace an alternative in the file: `--training.steps` replaces `training.epochs`, and",
        "`--optim.base-lr` replaces `optim.lr`. `null` unsets a setting. `--help` shows the everyday settings,",
        "`--help-all` shows all.",
        "",
    ]
    seen: dict[tuple[Setting, ...], str] = {}
    for command, classes in jobs.items():
        for config_class in classes:
            lines += _markdown_of(command, config_class, seen)
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown_of(command: str, config_class: type[Settings], seen: dict[tuple[Setting, ...], str]) -> list[str]:
    lines = [f"## crate-ray {command}", "", _one_line(config_class.__doc__ or ""), ""]
    for name, text in config_class.short_forms.items():
        lines += [f"`--{kebab(name)} PATH`: {text}", ""]
    for group in list_groups(config_class):
        title = f"`{group.name}`: {group.text}" if group.name else ""
        if group.settings in seen:
            lines += [
                f"{title} The same as [under {seen[group.settings]}](#crate-ray-{_anchor(seen[group.settings])}).",
                "",
            ]
            continue
        if group.name:
            seen[group.settings] = command
            lines += [title, ""]
        for advanced in (False, True):
            rows = [s for s in group.settings if s.advanced is advanced]
            if rows:
                heading = "advanced setting" if advanced else "setting"
                lines += [f"| {heading} | type | default | |", "|---|---|---|---|"]
                lines += [_row(setting) for setting in rows]
                lines.append("")
    return lines


def _row(setting: Setting) -> str:
    text = f"(`{setting.only_for}`) {setting.text}" if setting.only_for else setting.text
    default = "required" if setting.default is None else f"`{setting.default}`"
    cells = (f"`{setting.name}`", f"`{setting.type}`", default, text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _anchor(command: str) -> str:
    return command.replace(" ", "-")


def _entry(name: str, text: str, width: int) -> list[str]:
    """Lines of one setting: name and type on the left, the text on the right."""
    left = f"  {name}"
    room = max(width - _NAME_WIDTH, 30)
    wrapped = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False)
    if len(left) >= _NAME_WIDTH:
        return [left, *(f"{'':{_NAME_WIDTH}}{line}" for line in wrapped)]
    first, *rest = wrapped
    return [f"{left:{_NAME_WIDTH}}{first}", *(f"{'':{_NAME_WIDTH}}{line}" for line in rest)]


def _own_settings(model: type[BaseModel], instance: BaseModel | None, prefix: str) -> Iterator[Setting]:
    """Settings of one class, without groups. Defaults are the values that the instance sets, else the class's."""
    given = {} if instance is None else _given_values(instance)
    for name, field in model.model_fields.items():
        if models_in(field.annotation) and not _is_mapping(field.annotation):
            continue
        yield _setting(prefix + (field.alias or name), field, given.get(name, field.default))


def _given_values(instance: BaseModel) -> dict[str, Any]:
    """The values that an instance sets, without those that validation computes from others (such as `subspace_dim`)."""
    return {name: getattr(instance, name) for name in instance.model_fields_set if not _is_derived(instance, name)}


def _is_derived(instance: BaseModel, name: str) -> bool:
    """Whether a value without a default of its own is what validation computes if it is left out."""
    if type(instance).model_fields[name].default is not None:
        return False
    others = instance.model_dump(include=instance.model_fields_set - {name})
    try:
        return bool(getattr(type(instance).model_validate(others), name) == getattr(instance, name))
    except ValidationError:
        return False


def _union_settings(models: Sequence[type[BaseModel]], instance: BaseModel | None, prefix: str) -> Iterator[Setting]:
    """Settings of several classes, one of which is chosen by `architecture`: common settings first, then those of each.

    If defaults differ, the text shows those of the last class, which is the default architecture.
    """
    *others, usual = models
    for setting in _own_settings(usual, instance, prefix):
        name = setting.name.removeprefix(prefix)
        if name == "architecture":
            names = [str(m.model_fields[name].default) for m in (usual, *others)]
            yield Setting(setting.name, "|".join(names), names[0], setting.text, setting.advanced)
        elif all(name in model.model_fields for model in others):
            yield setting
    for model in (usual, *others):
        for setting in _own_settings(model, instance if isinstance(instance, model) else None, prefix):
            name = setting.name.removeprefix(prefix)
            if not all(name in other.model_fields for other in models):
                only_for = str(model.model_fields["architecture"].default)
                yield Setting(setting.name, setting.type, setting.default, setting.text, setting.advanced, only_for)


def _setting(name: str, field: FieldInfo, default: Any) -> Setting:
    shown = None if default is PydanticUndefined else _as_text(default)
    return Setting(name, _type_text(field.annotation), shown, _one_line(field.description or ""), _is_advanced(field))


def _is_advanced(field: FieldInfo) -> bool:
    return any(entry is ADVANCED for entry in field.metadata)


def _as_text(value: Any) -> str:
    """A value as written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(_as_text, value))
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"{value} ({value // 2**20:,} MiB)" if value < 2**30 or value % 2**30 else f"{value} ({value >> 30} GiB)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type_text(annotation: Any) -> str:
    """A type as a user reads it: `int`, `a|b`, `int,int`."""
    if isinstance(annotation, BaseModel) or annotation is Any:
        return "value"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(args[0])
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (Union, types.UnionType):
        parts = dict.fromkeys(_type_text(part) for part in args if part is not type(None))
        return "|".join(sorted(parts, key=lambda part: part == "JSON"))
    if origin is tuple:
        return f"{_type_text(args[0])},..." if args[-1] is ... else ",".join(map(_type_text, args))
    if origin is dict:
        return "JSON"
    return _TYPES.get(annotation, getattr(annotation, "__name__", "value"))


def _is_mapping(annotation: Any) -> bool:
    """Whether a value is a mapping whose names the user chooses."""
    return get_origin(annotation) is dict


def _one_line(text: str) -> str:
    return " ".join(text.split())
