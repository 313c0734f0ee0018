"""From a command line to a job: YAML file, then dotted overrides, then strict validation; the same for every job."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from crate_ray.config import Settings
from crate_ray.errors import UserError

ConfigT = TypeVar("ConfigT", bound=Settings)
_USAGE_ERROR = 2


def run_job(
    config_class: type[ConfigT], main: Callable[[ConfigT], None], argv: Sequence[str] | None = None
) -> NoReturn:
    """Parse the command line, run the job, exit: 0 when done, 2 with one sentence on stderr for what the user can mend.

    Ctrl-C exits with 130, SIGTERM with 143. Other exceptions are ours to mend and keep their traceback.
    """
    try:
        main(parse_config(config_class, sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_USAGE_ERROR)
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))
    sys.exit(0)


def run_subcommand(commands: Mapping[str, tuple[type[Any], Callable[[Any], None]]]) -> NoReturn:
    """`run_job` for a script with several commands: its first argument names one, the rest are that one's settings."""
    script, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10} {(config.__doc__ or '').strip()}" for name, (config, _) in commands.items()]
        print(
            "\n".join(
                [f"usage: {script} COMMAND [settings]", "", *lines, "", f"{script} COMMAND --help lists settings"]
            )
        )
        sys.exit(0 if arguments else _USAGE_ERROR)
    name = arguments[0]
    if name not in commands:
        hint = suggest(name, list(commands)) or f"; there are {', '.join(commands)}"
        print(f"error: there is no command {name!r}{hint}", file=sys.stderr)
        sys.exit(_USAGE_ERROR)
    run_job(*commands[name], arguments[1:])


def parse_config(config_class: type[ConfigT], argv: Sequence[str]) -> ConfigT:
    """Settings from `--config FILE.yaml` and dotted overrides such as `--training.steps 100`, which win.

    Raises UserError for an unreadable file, an unknown setting (with the name that was probably meant) or a wrong
    value. `--help` prints every setting with its default and unit, and exits.
    """
    names = dotted_names(config_class)
    parser = _Parser(
        description=(config_class.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.setting_names = names
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with any of the settings below")

    # A settings class of the same fields, only so that pydantic-settings builds the command line from them.
    cli_class: Any = type(
        config_class.__name__,
        (config_class, BaseSettings),
        {"model_config": SettingsConfigDict(extra="forbid"), "__doc__": config_class.__doc__},
    )
    try:
        source: Any = CliSettingsSource(
            cli_class,
            root_parser=parser,
            cli_use_class_docs_for_groups=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_enforce_required=False,
            cli_implicit_flags=False,
            cli_parse_none_str="null",
            cli_exit_on_error=True,
            cli_parse_args=list(argv),
        )
    except SettingsError as error:
        name, _, cause = str(error).removeprefix("Parsing error encountered for ").partition(": ")
        raise UserError(
            f"the value of --{name} is not JSON ({cause}); give it such as '{{\"name\": value}}', or put it into the "
            "--config file"
        ) from None
    overrides = source()
    path = _config_path(argv)
    values = load_yaml(path) if path else {}
    # Required groups exist at least as empty ones, so that an error names the setting inside that is missing.
    groups: dict[str, Any] = {
        n: {} for n, f in config_class.model_fields.items() if f.is_required() and _models_in(f.annotation)
    }
    return validate(config_class, merge(merge(groups, values), overrides))


def validate(config_class: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Validated settings; every problem becomes part of one clear UserError."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = {_where(config_class, problem): problem for problem in reversed(error.errors())}
        raise UserError("; ".join(_explain(config_class, *item) for item in reversed(problems.items()))) from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Mapping in a YAML file; UserError when there is none."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, not settings by name")
    return values


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
    """Nested settings with the overrides put in."""
    out = dict(base)
    for name, value in overrides.items():
        under = out.get(name)
        out[name] = merge(under, value) if isinstance(value, dict) and isinstance(under, dict) else value
    return out


def dotted_names(config_class: type[BaseModel]) -> list[str]:
    """Names of all settings, such as `training.steps`, groups included."""
    names: list[str] = []
    for name, field in config_class.model_fields.items():
        names.append(name)
        for model in _models_in(field.annotation):
            names += [f"{name}.{inner}" for inner in dotted_names(model) if f"{name}.{inner}" not in names]
    return names


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        return [m for part in get_args(annotation) for m in _models_in(part)]
    return [m for part in get_args(annotation)[:1] for m in _models_in(part)] if get_origin(annotation) else []


def suggest(name: str, known: Sequence[str]) -> str:
    """', did you mean …?' for a misspelt name; its last part counts where the whole is unlike all. Or nothing."""
    last = name.rsplit(".", 1)[-1]
    close = [n for n in known if n.rsplit(".", 1)[-1] == last] or difflib.get_close_matches(name, known, 1, 0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def _where(config_class: type[BaseModel], problem: Any) -> str:
    """Name of the setting that a problem is about; tags and types of union members in its location are left out."""
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
        return f"there is no setting {where!r}{suggest(where, dotted_names(config_class)) or '; --help lists them all'}"
    if problem["type"] == "union_tag_invalid":
        known = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"setting {where!r} is {problem['ctx']['tag']!r}: input should be {known}"
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return f"setting {where!r} has too few values; give {problem['loc'][-1] + 1}"
    if problem["type"] == "missing":
        return f"setting {where!r} is required; give --{where} or put it into the --config file"
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"setting {where!r} is {problem['input']!r}: {message[0].lower() + message[1:]}"


def _config_path(argv: Sequence[str]) -> Path | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args(list(argv))[0].config


class _Parser(argparse.ArgumentParser):
    """Turns argparse's errors into UserErrors that name the setting which was probably meant."""

    setting_names: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (?:--)?([\w.-]+)", message)
        if unknown:
            name = unknown[1]
            raise UserError(
                f"there is no setting {name!r}{suggest(name, self.setting_names) or '; --help lists them all'}"
            )
        raise UserError(message)
