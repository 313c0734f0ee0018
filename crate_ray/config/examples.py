"""The example configurations that come with the package. In the repository they are in jobs/configs."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "configs"


def example_configs() -> list[Path]:
    """Every example, sorted by name."""
    return sorted(_FOLDER.glob("*.yaml"))


def find_example(name: str) -> Path | None:
    """The example of a name, with or without `.yaml`; None if there is none."""
    path = _FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    return path if path.name != ".yaml" and path.is_file() else None


def summary(path: Path) -> str:
    """Summary of an example: the first line of its opening comment."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").rstrip(".:")
