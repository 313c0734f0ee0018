"""Writes what the GPU check has measured into docs/performance.md.

    python -m tests.gpu.report gpu-check/check.json gpu-check-ray/check.json

The files are copied to docs/gpu-check.json and docs/gpu-check-ray.json, and the section between the two markers in
docs/performance.md is made from them. Without arguments, it is made from the files that are there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.check import ROOT, report

DOCS = ROOT / "docs"
PAGE = DOCS / "performance.md"
_BEGIN, _END = "<!-- gpu-check: begin -->\n", "<!-- gpu-check: end -->\n"


def section(measured: Sequence[dict[str, Any]]) -> str:
    """The section about some check.json files: of each, its command, its machine and its tables."""
    if not measured:
        return "Nothing was measured on a GPU yet.\n"
    parts = [f"`{each['command']}`\n\n{report(each['parts'], dry=each['dry_run'])}" for each in measured]
    return "\n".join(parts)


def known() -> list[dict[str, Any]]:
    """The measurements in the repository."""
    return [json.loads(path.read_text()) for path in sorted(DOCS.glob("gpu-check*.json"))]


def with_section(page: str, text: str) -> str:
    """A page with another text between the markers."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{text}{_END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep the given files in the repository, and write the section."""
    for path in map(Path, sys.argv[1:] if arguments is None else arguments):
        measured = json.loads(path.read_text())
        if measured["dry_run"]:
            raise SystemExit(f"{path} is from a rehearsal, which measures nothing")
        name = "gpu-check-ray.json" if "--ray" in measured["command"] else "gpu-check.json"
        (DOCS / name).write_text(json.dumps(measured, indent=1) + "\n")
    PAGE.write_text(with_section(PAGE.read_text(), section(known())))


if __name__ == "__main__":
    main()
