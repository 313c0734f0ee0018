"""Turns a command line into a job's settings: read a YAML file, apply the options over it, then validate."""

from __future__ import annotations

import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from crate_ray.addresses import redact
from crate_ray.config.base import CONFIG_FILE, Settings
from crate_ray.config.examples import example_configs, find_example
from crate_ray.config.listing import help_text
from crate_ray.config.options import parse_options
from crate_ray.config.values import (
    ConfigT,
    closest,
    expand,
    load_yaml,
    merge,
    models_in,
    suggest,
    validate,
)
from crate_ray.errors import UserError
from crate_ray.output import guard_output, shortened, visible
from crate_ray.quiet import quiet_driver

Complete = Callable[[dict[str, Any], str], dict[str, Any]]
"""Turns a short form into settings. Its arguments are the given settings and the short form's value."""

_USAGE_ERROR = 2
_UNEXPECTED = 70  # EX_SOFTWARE
_LONGEST_CAUSE = 300


def run_job(
    config_class: type[ConfigT],
    main: Callable[[ConfigT], None],
    argv: Sequence[str] | None = None,
    complete: Complete | None = None,
    prog: str | None = None,
) -> NoReturn:
    """Parse the command line, run the job, and exit.

    The exit code is that of `reported`.
    """
    with reported():
        quiet_driver()
        main(parse_config(config_class, sys.argv[1:] if argv is None else argv, complete, prog))
    sys.exit(0)


@contextmanager
def reported() -> Iterator[None]:
    """Print an exception as one sentence on stderr, and exit.

    The exit code is 2 for a UserError, 130 for Ctrl-C, 143 for SIGTERM, and 70 for any other exception, whose traceback
    goes to a file.
    """
    guard_output()
    try:
        yield
    except UserError as error:
        print(f"error: {shortened(visible(str(error)))}", file=sys.stderr)
        sys.exit(_USAGE_ERROR)
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))
    except Exception as error:
        print(f"error: {_unexpected(error)}", file=sys.stderr)
        sys.exit(_UNEXPECTED)


def _unexpected(error: Exception) -> str:
    """The sentence about an error of ours, with the file that has its traceback."""
    lines = str(error).strip().splitlines() or [""]
    # Ray's errors quote the traceback of another process, which ends with the cause.
    cause = lines[-1 if any("Traceback" in line for line in lines) else 0].strip()[:_LONGEST_CAUSE]
    what = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
    try:
        # Only its owner can read the file.
        with tempfile.NamedTemporaryFile(
            "w", prefix="crate-ray-error-", suffix=".log", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(redact("".join(traceback.format_exception(error))))
        where = f"the traceback is in {file.name}; please report it"
    except OSError as problem:
        where = f"the traceback could not be written ({problem.strerror}); please report it"
    return visible(redact(f"{_prog()} failed unexpectedly ({what}); {where}"))


def run_subcommand(
    commands: Mapping[str, tuple[type[Any], Callable[[Any], None]]], default: str | None = None
) -> NoReturn:
    """`run_job` for a script with several commands. The first argument names the command, the others are its settings.

    `default` is the command to run if the first argument is a setting.
    """
    guard_output()
    prog, arguments = _prog(), sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        lines = [f"  {name:10} {_summary(config)}" for name, (config, _) in commands.items()]
        usage = f"usage: {prog} COMMAND [settings]"
        print("\n".join([usage, "", *lines, "", f"{prog} COMMAND --help lists the settings of a command"]))
        sys.exit(0 if arguments else _USAGE_ERROR)
    name, settings = arguments[0], arguments[1:]
    if default and name.startswith("--"):
        name, settings = default, arguments
    if name not in commands:
        hint = suggest(name, list(commands)) or f"; there are {', '.join(commands)}"
        print(f"error: there is no command {name!r}{hint}", file=sys.stderr)
        sys.exit(_USAGE_ERROR)
    run_job(*commands[name], settings, prog=f"{prog} {name}")


def parse_config(
    config_class: type[ConfigT], argv: Sequence[str], complete: Complete | None = None, prog: str | None = None
) -> ConfigT:
    """Read settings from `--config FILE.yaml`, then from options such as `--training.batch-size 64`, which win.

    `--help` prints the everyday settings and exits; `--help-all` prints every setting.

    Args:
        config_class: settings of the job.
        argv: command line without the program's name. Names are written with '-'; '_' is accepted too.
        complete: turns the class's short form, such as `--data PATH`, into settings.
        prog: how the program was called, for `--help`.

    Raises:
        UserError: an unreadable file, an unknown setting (with the name that was probably meant), a wrong value.
    """
    if {"-h", "--help", "--help-all"} & set(argv):
        width = min(shutil.get_terminal_size().columns, 120)
        print(help_text(config_class, prog or _prog(), everything="--help-all" in argv, width=width))
        sys.exit(0)
    overrides, path, shorts = parse_options(config_class, argv)
    values = _read_config(config_class, _config_path(path), shorts) if path else {}
    # Add required groups as empty ones, so that an error names the setting that is missing inside.
    groups: dict[str, Any] = {
        n: {} for n, f in config_class.model_fields.items() if f.is_required() and models_in(f.annotation)
    }
    values = merge(merge(groups, values), overrides)
    for value in shorts.values():
        if complete is None:
            raise UserError(f"{config_class.__name__} cannot be completed from {value!r} here; give --data.train")
        values = complete(values, value)
    return validate(config_class, values)


def _prog() -> str:
    """How this program was called, for messages: `crate-ray pretrain` or `pretrain.py`."""
    return Path(sys.argv[0]).name


def command(job: str) -> str:
    """How the user can start another job: `crate-ray JOB`, or `python jobs/JOB.py` from one of the scripts."""
    program = Path(sys.argv[0])
    return f"python {program.with_name(f'{job}.py')}" if program.suffix == ".py" else f"crate-ray {job}"


def _summary(config_class: type[Settings]) -> str:
    return (config_class.__doc__ or "").strip().partition("\n")[0]


def _config_path(path: Path) -> Path:
    """Path of the --config file. If there is no such file, a name without a folder may name an example."""
    if path.exists() or path.name != str(path):
        return path
    example = find_example(str(path))
    if example is None:
        close = closest(path.stem, [example.stem for example in example_configs()])
        hint = f", did you mean {close}.yaml?" if close else "; crate-ray configs lists the examples"
        raise UserError(f"there is no file {path}, and no example of that name{hint}")
    print(f"config: {example.name} is the example that comes with crate-ray ({example})", file=sys.stderr)
    return example


def _read_config(config_class: type[Settings], path: Path, shorts: dict[str, str]) -> dict[str, Any]:
    """Read a YAML file. `data: PATH` is a short form here too. Paths of other YAML files are resolved by `_beside`."""
    values = load_yaml(path)
    for name in config_class.short_forms:
        if isinstance(value := values.get(name), str):
            shorts.setdefault(name, value)
            del values[name]
    values = expand(config_class, values, str(path))
    for name, field in config_class.model_fields.items():
        if any(entry is CONFIG_FILE for entry in field.metadata) and isinstance(value := values.get(name), str):
            values[name] = _beside(path, name, value)
    return values


def _beside(path: Path, name: str, value: str) -> str:
    """Path of a file that a YAML file names: relative to the YAML file's folder, or else to the working directory."""
    beside = path.parent / value
    if beside.exists() or not Path(value).exists() or Path(value).is_absolute():
        return str(beside)
    print(
        f"{path}: {name} {value} is not beside this file; using the one in the working directory",
        file=sys.stderr,
    )
    return value
