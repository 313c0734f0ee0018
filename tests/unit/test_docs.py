"""README and docs: links lead somewhere, commands parse, named files exist, quoted error messages are in the code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crate_ray.__main__ import COMMANDS
from crate_ray.cli import parse_config
from crate_ray.config.values import merge
from crate_ray.jobs.configs import JOBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "cluster/README.md", ROOT / "docker/README.md"]  # fmt: skip


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of a job in a shell block of a page: the page and the words after `crate-ray`."""
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.search(
                    r"(?:(?<!secret )crate-ray |python jobs/(\w+)\.py ?)(.*)", line.partition("  #")[0]
                ):
                    words = [*([match[1]] if match[1] else []), *shlex.split(match[2])]
                    yield f"{page.relative_to(ROOT)}: {line.strip()}", words


@pytest.mark.parametrize(("line", "words"), commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_commands_parse(line: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name, *arguments = words
    assert name in COMMANDS
    if "…" in line or "..." in line or "--help" in arguments or name == "configs":
        return  # not the whole command
    name = {"evaluate compare": "compare"}.get(" ".join([name, *arguments[:1]]), name)
    if (longer := " ".join([name, *arguments[:1]])) in JOBS or words[:2] == ["evaluate", "compare"]:
        name, arguments = (longer if longer in JOBS else name), arguments[1:]
    (config_class,) = JOBS[name]
    if "--config" in arguments:
        at = arguments.index("--config")
        path = Path(arguments[at + 1])
        if "runs" in path.parts:  # left by the job before it
            arguments = [*arguments[:at], *arguments[at + 2 :], "--data.train", "data"]

    def complete(values: dict[str, Any], data: str) -> dict[str, Any]:
        return merge({"data": {"train": data}, "training": {"epochs": 1}}, values)

    parse_config(config_class, arguments, complete)


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve()
            assert file.exists(), f"{page.name} links to {target}"
            if anchor and file.suffix == ".md":
                headings = {
                    re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
                    for h in re.findall(r"^#+ (.*)$", file.read_text(), re.M)
                }
                assert anchor in headings, f"{page.name} links to {target}"


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text() + (ROOT / "README.md").read_text()
    for name in set(
        re.findall(
            r"`((?:crate_ray/|tests/|jobs/|models/|data/|runs/|storage/|training/)[\w/]+(?:\.py|\.yaml|/)?)`", text
        )
    ):
        places = (ROOT / name, ROOT / "crate_ray" / name, (ROOT / "crate_ray" / name).with_suffix(".py"))
        assert any(place.exists() for place in places), name


def test_error_messages_in_troubleshooting_are_those_of_the_code() -> None:
    """The first column quotes messages; '…' stands for what differs."""
    source = " ".join(path.read_text() for path in sorted((ROOT / "crate_ray").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # messages of several lines
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(rows) >= 15
    for row in rows:
        for part in filter(None, (part.strip() for part in row.split("…"))):
            assert part in source, f"no message has {part!r}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_metrics_named_in_the_docs_exist() -> None:
    source = (ROOT / "crate_ray/runs/metrics.py").read_text()
    pages = [ROOT / "CHANGELOG.md", *PAGES]
    names = {
        n
        for page in pages
        for n in re.findall(r"`((?:train|train_\w+|validation|validation_\w+)/\w+)", page.read_text())
    }
    assert "train/loss" in names
    for name in names:
        assert f'"{name}' in source, name
