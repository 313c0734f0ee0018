"""YAML 1.2 as text and as values: its core schema, no key twice, and a bounded size.

PyYAML follows YAML 1.1, where `off` is false, `1:30` is 90 and `1e-4` is a text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from crate_ray.bounded import MAX_YAML_VALUES

_MAX_DIGITS = 40  # of a number
_INT, _MERGE = "tag:yaml.org,2002:int", "tag:yaml.org,2002:merge"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),  # of YAML 1.1, which many files use
}
"""Forms of plain scalars that are no texts, by their tag, and their first characters. The first that fits holds."""


class _Loader(yaml.SafeLoader):
    """Reads the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_yaml_int(self, node: Any) -> int:
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 reads as something else."""

    yaml_implicit_resolvers = {first: list(forms) for first, forms in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _tag, (_form, _first) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _first_characters = ["" if c == "\0" else c for c in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), _first_characters)
_Loader.add_constructor(_INT, _Loader.construct_yaml_int)


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML document, of which bytes are UTF-8, or UTF-16 with a byte order mark.

    Raises:
        ValueError: it is not valid YAML, has a key twice, or is too large; the message is one sentence.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _count_values(loader, node, {}) > MAX_YAML_VALUES:
                raise ValueError(f"it holds more than {MAX_YAML_VALUES} values, those that aliases repeat included")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(_place(error)) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(_unreadable(error)) from None
    except Exception as error:  # for values such as `!!bool x`, PyYAML raises anything
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def parse_number(text: str) -> float | None:
    """The number that a plain text is in YAML; None if it is none."""
    return float(text) if re.fullmatch(_PLAIN["float"][0], text) and text[-3:].lower() not in ("inf", "nan") else None


def dump_yaml(value: Any) -> str:
    """A value as YAML. Texts that look like numbers or truth values are quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _place(error: yaml.MarkedYAMLError) -> str:
    """What is wrong and in which line, in one line."""
    problem = " ".join(f"{error.problem or error.context or error}".split())
    if problem.startswith("but "):
        problem = f"{error.context} {problem}"
    if "'\\t'" in problem:
        problem += "; indent with spaces"
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _unreadable(error: yaml.reader.ReaderError) -> str:
    if error.encoding == "unicode":
        return f"it holds the control character {error.character:#04x}"
    return f"it is not {error.encoding.upper()} text ({error.reason} at byte {error.position}); save it as UTF-8"


def _count_values(loader: _Loader, node: yaml.Node, counted: dict[int, int]) -> int:
    """Number of values in a node, none of whose mappings may have a key twice.

    An aliased node counts again at each alias. A node within itself has too many.
    """
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _INT and len(node.value) > _MAX_DIGITS:
            raise ValueError(f"it holds a number of {len(node.value)} digits")
        return 1
    if id(node) not in counted:
        counted[id(node)] = MAX_YAML_VALUES + 1
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        counted[id(node)] = 1 + sum(_count_values(loader, part, counted) for part in inner)
        if isinstance(node, yaml.MappingNode):
            _check_keys(loader, node)
    return counted[id(node)]


def _check_keys(loader: _Loader, node: yaml.MappingNode) -> None:
    lines: dict[Hashable, int] = {}
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _MERGE:
            continue
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if key in lines:
            raise ValueError(f"line {line}: {key!r} is given twice, first in line {lines[key]}; give it once")
        lines[key] = line
