"""The section on GPUs in docs/performance.md is made from results in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu import report
from tests.gpu.bundle import PACKAGES, RAY_PACKAGES, pins

REHEARSED = {
    "command": "python -m tests.gpu.check --ray --minutes 6",
    "dry_run": True,
    "parts": {
        "ray_whole": {"finished": True, "first_loss": 1.0, "last_loss": 0.5, "seconds": 20.0},
        "ray_stopped": {"exit_code": 143, "asked_at": 30, "saved_at": 80, "steps": 300, "seconds": 20.0},
        "ray_resumed": {"saved_at": 80, "resumed_at": 80, "finished": True, "difference": 1e-6, "seconds": 20.0},
        "ray_usual": {"failed": "took longer than 90 s", "seconds": 90.0},
    },
}


def test_the_page_is_up_to_date() -> None:
    page = report.PAGE.read_text()
    assert report.with_section(page, report.section(report.known())) == page


def test_results_become_a_section_with_a_verdict_for_each_goal() -> None:
    text = report.section([REHEARSED])
    assert text.startswith("`python -m tests.gpu.check --ray --minutes 6`\n\nRehearsal without a GPU")
    assert "| on Ray: the same command resumes at the saved step and finishes | True | reached |" in text
    assert "bit by bit (deterministic algorithms) | 1e-06 | MISSED |" in text
    assert "| on Ray: losses fall with the usual settings | took longer than 90 s | FAILED |" in text
    assert "MFU of base" not in text  # a goal of the other call
    assert report.section([]) == "Nothing was measured on a GPU yet.\n"


def test_measured_results_are_kept_and_rehearsed_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "performance.md")
    report.PAGE.write_text("a\n<!-- gpu-check: begin -->\nold\n<!-- gpu-check: end -->\nb\n")
    file = tmp_path / "check.json"
    file.write_text(json.dumps(REHEARSED))
    with pytest.raises(SystemExit, match="rehearsal"):
        report.main([str(file)])
    machine = {"device": "NVIDIA H200", "torch": "2.11", "cuda": "13.0", "seconds": 1.0}
    file.write_text(json.dumps(REHEARSED | {"dry_run": False, "parts": {"machine": machine, **REHEARSED["parts"]}}))
    report.main([str(file)])
    assert (tmp_path / "gpu-check-ray.json").exists()
    page = report.PAGE.read_text()
    assert page.startswith("a\n") and page.endswith("b\n") and "NVIDIA H200, torch 2.11" in page and "old" not in page


def test_all_packages_of_the_bundles_have_a_version() -> None:
    assert len(pins([*PACKAGES, *RAY_PACKAGES])) == len({*PACKAGES, *RAY_PACKAGES})
