"""The source text of functions and classes with everything of crate_ray that they use, as one file."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

_OURS = "crate_ray."
_PARTS = "crate_ray.models."
"""Names of these modules are copied. Others of crate_ray occur in annotations only, as configs do."""


def inline(template: str, plain: Mapping[str, str]) -> str:
    """Replace the imports from crate_ray.models in a source text by the source of what they import.

    Args:
        template: the source. Its imports from crate_ray stand together.
        plain: sources to use for some names instead of their own.
    """
    tree = ast.parse(template)
    copied = _Copied(plain, {name for name, _ in _definitions(tree)})
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and _is_part(node.module)]
    for node in imports:
        for alias in node.names:
            copied.add(str(node.module), alias.name)
    lines = template.splitlines()
    first, last = imports[0].lineno - 1, imports[-1].end_lineno
    return "\n".join([*lines[:first], *copied.imports(), "", *copied.sources, "", *lines[last:], ""])


def _is_part(module: str | None) -> bool:
    return module is not None and module.startswith(_PARTS)


class _Copied:
    """Sources of definitions, each after those that it uses."""

    def __init__(self, plain: Mapping[str, str], known: Collection[str]) -> None:
        self.sources: list[str] = []
        self._plain, self._known = plain, known
        self._done: set[tuple[str, str]] = set()
        self._imports: set[str] = set()

    def imports(self) -> list[str]:
        """Import lines of other packages that the sources need."""
        return sorted(self._imports)

    def add(self, module: str, name: str) -> None:
        """Add a module's definition of a name, unless it is there."""
        if (module, name) in self._done:
            return
        self._done.add((module, name))
        text = _text(module)
        known = dict(_definitions(ast.parse(text)))
        node = known[name]
        source = self._plain.get(name) or "\n".join(_lines_of(node, text))
        for used in _names_in(ast.parse(source)):
            self._use(module, known.get(used), used)
        self.sources.append(f"\n\n{source}")

    def _use(self, module: str, node: ast.stmt | None, name: str) -> None:
        if isinstance(node, ast.ImportFrom) and _is_part(node.module):
            self.add(str(node.module), name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if name not in self._known and not (
                isinstance(node, ast.ImportFrom) and str(node.module).startswith(_OURS)
            ):
                alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
                self._imports.add(ast.unparse(_one(node, alias)))
        elif node is not None:
            self.add(module, name)


def _one(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    if isinstance(node, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(node.module, [alias], node.level)


def _text(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin).read_text(encoding="utf-8")


def _definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Names that a module defines or imports, with the statement."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    yield target.id, node


def _lines_of(node: ast.stmt, text: str) -> list[str]:
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    return text.splitlines()[first - 1 : node.end_lineno]


def _names_in(tree: ast.Module) -> list[str]:
    """Names that a source reads, in the order of their first use."""
    found = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return list(dict.fromkeys(found))
