"""The table of equations in docs/equations.md holds: each function is where it says and has its equation's number."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

import crate_ray.models
import crate_ray.structure
from crate_ray.models import crate, reference
from tests.jobs import ROOT

TABLE = ROOT / "docs" / "equations.md"
ROW = re.compile(r"\| \((\d+)\) \| .+ \| `([\w.]+)` \| \[([\w/.]+)\]\(\.\./crate_ray/([\w/.]+)\) \|")


def rows() -> list[tuple[str, ...]]:
    return [match.groups() for line in TABLE.read_text().splitlines() if (match := ROW.fullmatch(line))]


def numbers(item: Any) -> list[str]:
    """Numbers of equations in the first line of a docstring."""
    return re.findall(r"\((\d+)\)$", (inspect.getdoc(item) or "").partition("\n")[0])


def test_each_equation_is_where_the_table_says() -> None:
    table = rows()
    assert [number for number, *_ in table] == [str(n) for n in range(1, 12)]
    for number, name, shown, path in table:
        assert shown == path
        module = importlib.import_module("crate_ray." + path.removesuffix(".py").replace("/", "."))
        item = reduce(getattr, name.split("."), module)
        assert item.__module__ == module.__name__, f"{name} is only imported into {path}"
        assert numbers(item) == [number], f"({number}) is not in the docstring of {name}"


def test_links_of_the_page_exist() -> None:
    links = re.findall(r"\]\((\.\./[^)]+)\)", TABLE.read_text())
    assert len(links) > 11 and all((TABLE.parent / link).exists() for link in links)


def test_one_page_has_the_layers_in_order() -> None:
    def in_order(module: Any) -> list[str]:
        own = [item for item in vars(module).values() if getattr(item, "__module__", None) == module.__name__]
        own.sort(key=lambda item: inspect.getsourcelines(item)[1])
        return [number for item in own for number in numbers(item)]

    assert in_order(crate) == ["4", "5", "6", "7", "8"]
    assert in_order(reference)[:2] == ["4", "6"] and {"5", "7", "8"} <= {*in_order(reference)}


def public_functions() -> Iterator[tuple[str, Any]]:
    """Functions and methods of models/ and structure/ that others call."""
    for package in (crate_ray.models, crate_ray.structure):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            for name, item in vars(module).items():
                if getattr(item, "__module__", None) != info.name or name.startswith("_"):
                    continue
                members = vars(item).items() if inspect.isclass(item) else [("", item)]
                for member, function in members:
                    if inspect.isfunction(function) and not re.match(r"_(?!_)", member):
                        yield f"{info.name}.{name}.{member}", function


def test_public_parameters_have_no_shape_suffix() -> None:
    found = list(public_functions())
    assert len(found) > 60
    wrong = [
        f"{where}({parameter})"
        for where, function in found
        for parameter in inspect.signature(function).parameters
        if re.search(r"_[A-Z][A-Z0-9a-z]*$", parameter)
    ]
    assert not wrong
    forward = inspect.signature(crate_ray.models.CrateMAE.forward).parameters
    assert list(forward) == ["self", "images", "noise", "return_layers"]
