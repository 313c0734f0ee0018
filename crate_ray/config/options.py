"""Turns command-line options into values, by the types of the settings. They are validated later.

--training.steps 5                       a text
--data.mean 0.5,0.5,0.5                  a list
--settings '{training.steps: 5}'         YAML, of which JSON is a part
--scaling.label-selector zone=a,disk=b   a mapping
--data.train s3://b/photos=3,s3://b/maps=1    a folder, or a mixture
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from crate_ray.config.base import Settings
from crate_ray.config.values import (
    closest,
    dotted_names,
    expand,
    kebab,
    models_in,
    removed_names,
)
from crate_ray.config.yaml_text import parse_yaml
from crate_ray.errors import UserError

_SHARE = re.compile(r"(.*)=([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?inf|nan)", re.DOTALL)
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # those that word processors write too


class Options(NamedTuple):
    """What a command line says."""

    values: dict[str, Any]
    """Settings, nested."""
    config: Path | None
    """The --config file."""
    shorts: dict[str, str]
    """Values of the short forms, such as `--data PATH`."""


def parse_options(config_class: type[Settings], argv: Sequence[str]) -> Options:
    """Parse `--NAME VALUE` and `--NAME=VALUE`. Names are written with '-' or '_'.

    Raises:
        UserError: an unknown name, a name twice, or a value that is missing or of the wrong form.
    """
    forms = _forms(config_class)
    given: dict[str, Any] = {}
    config: Path | None = None
    shorts: dict[str, str] = {}
    seen: set[str] = set()
    for name, text in _pairs(config_class, argv, {*forms, *config_class.short_forms, "config"}):
        if name in seen:
            several = "list" in forms.get(name, ())
            advice = f"give all values at once, as --{kebab(name)} FIRST,SECOND" if several else "give it once"
            raise UserError(f"--{kebab(name)} is given twice; {advice}")
        seen.add(name)
        if name == "config":
            config = Path(text)
        elif name in config_class.short_forms and not text.startswith("{"):
            shorts[name] = text
        else:
            given[name] = _value(config_class, name, text, forms[name])
    return Options(expand(config_class, given, "command line"), config, shorts)


def _pairs(config_class: type[Settings], argv: Sequence[str], known: set[str]) -> list[tuple[str, str]]:
    """Names, written with '_', and values."""
    pairs: list[tuple[str, str]] = []
    arguments = iter(argv)
    for argument in arguments:
        written, equals, value = argument.removeprefix("--").partition("=")
        name = written.replace("-", "_")
        if not argument.startswith("--") or name not in known:
            raise UserError(_unknown(config_class, argument))
        if not equals:
            value = next(arguments, "--")
            if value.startswith("--"):
                raise UserError(f"argument --{kebab(name)}: expected one argument")
        if not value:
            raise UserError(f"--{kebab(name)} is empty; give a value, or leave the option out")
        pairs.append((name, value))
    return pairs


def _unknown(config_class: type[Settings], argument: str) -> str:
    written = argument.partition("=")[0]
    name = written.lstrip(_DASHES).replace("-", "_")
    is_option = written[:1] in _DASHES and name[:1].isalpha()
    shown = f"--{kebab(name)}" if written.startswith("--") else written
    removed = removed_names(config_class)
    if is_option and name in removed:
        return f"setting --{kebab(name)} was removed: {removed[name]}; leave it out"
    close = closest(name, [*dotted_names(config_class), "config"])
    hint = f", did you mean --{kebab(close)}?" if close else "; --help-all lists every setting"
    return f"there is no setting {shown}{hint}"


def _value(config_class: type[Settings], name: str, text: str, forms: set[str]) -> Any:
    if text == "null":
        return None
    if (text.startswith("{") and forms & {"group", "mapping", "list"}) or (text.startswith("[") and "list" in forms):
        return _parsed(name, text)
    if "mapping" in forms:
        return _mixture(name, text) if "plain" in forms else _mapping(name, text)
    if "list" in forms and ("," in text or "plain" not in forms):
        return [part.strip() for part in text.split(",")]
    if "plain" not in forms:
        inside = next(other for other in dotted_names(config_class) if other.startswith(f"{name}."))
        raise UserError(f"--{kebab(name)} is a group of settings; set one of them, such as --{kebab(inside)}")
    return text


def _parsed(name: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise UserError(
            f"the value of --{kebab(name)} is not valid YAML ({error}); give it such as '{{name: value}}', or put it "
            "into the --config file"
        ) from None


def _mapping(name: str, text: str) -> dict[str, str]:
    """The mapping 'name=value,name=value'."""
    found: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key:
            raise UserError(f"--{kebab(name)}: {part!r} is not NAME=VALUE; give it such as '{{name: value}}'")
        if key in found:
            raise UserError(f"--{kebab(name)}: {key!r} is given twice; give it once")
        found[key] = value
    return found


def _mixture(name: str, text: str) -> str | dict[str, str]:
    """One folder, or a mixture of several as ADDRESS=SHARE,ADDRESS=SHARE.

    A folder's name may hold '=' and ',' too, as in s3://bucket/year=2024/month=05. So a text is a mixture only if each
    part ends with '=' and a number which is not itself a part of such a name.
    """
    parts = [part.strip() for part in text.split(",")]
    matches = [match for part in parts if (match := _SHARE.fullmatch(part))]
    if len(parts) == 1 or not matches:
        return text
    shares = {match[1]: match[2] for match in matches}
    if len(shares) == len(parts) and not any(map(_is_partition, parts)):
        return shares
    raise UserError(
        f"--{kebab(name)} {text!r} may be one folder or several with shares; give it such as "
        "'{s3://bucket/a: 3, s3://bucket/b: 1}'"
    )


def _is_partition(part: str) -> bool:
    """Whether an address may end with a folder 'key=number': without a key, or if a folder above has this form."""
    above, _, last = part.rpartition("/")
    return last.count("=") == 1 and ("=" in above or last.startswith("="))


def _forms(config_class: type[BaseModel], prefix: str = "") -> dict[str, set[str]]:
    """What the value of each option may be: a group, a mapping, a list or a plain text."""
    forms: dict[str, set[str]] = {}
    for python_name, field in config_class.model_fields.items():
        name = prefix + (field.alias or python_name)
        forms.setdefault(name, set()).update(_forms_of(field.annotation))
        for model in models_in(field.annotation):
            for inner, found in _forms(model, f"{name}.").items():
                forms.setdefault(inner, set()).update(found)
    return forms


def _forms_of(annotation: Any) -> set[str]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _forms_of(args[0])
    if origin is Union or type(annotation).__name__ == "UnionType":
        return {form for part in args for form in _forms_of(part)}
    if origin in (tuple, list):
        return {"list"}
    if origin is dict:
        return {"mapping"}
    if annotation is type(None):
        return set()
    return {"group"} if models_in(annotation) else {"plain"}
