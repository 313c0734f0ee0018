"""The check for machines with a GPU, rehearsed on the emulated device from start to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.check import RAY_SECONDS, SECONDS, Results, report, verdicts
from tests.jobs import ROOT


def rehearse(out: Path, *options: str) -> tuple[Results, str]:
    """Results of a rehearsal in which no part has failed, and what it has printed."""
    command = [sys.executable, "-m", "tests.gpu.check", "--dry-run", "--minutes", "9", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    results: Results = json.loads((out / "check.json").read_text())["parts"]
    assert done.returncode == 0, {name: found["failed"] for name, found in results.items() if "failed" in found}
    return results, done.stdout


@pytest.mark.daily
def test_the_gpu_check_runs_from_start_to_end(tmp_path: Path) -> None:
    results, printed = rehearse(tmp_path)
    assert set(SECONDS) - set(results) == {"train_small", "train_base", "train_large"}
    assert all(verdict != "FAILED" for _, _, verdict in verdicts(results)), printed
    assert printed.endswith((tmp_path / "check.md").read_text() + "\n")


@pytest.mark.daily
@pytest.mark.ray
def test_the_second_call_trains_on_ray_stops_and_resumes(tmp_path: Path) -> None:
    results, printed = rehearse(tmp_path, "--ray")
    assert set(results) == set(RAY_SECONDS)
    assert {verdict for _, _, verdict in verdicts(results)} == {"reached"}, printed


def test_a_part_that_failed_fails_its_goals() -> None:
    results = {
        "machine": {"device": "X", "torch": "2", "cuda": "13", "seconds": 1.0},
        "ddp": {"failed": "took longer than 40 s", "seconds": 40.0},
        "not_finite": {"unchanged": False, "next_step_works": True, "seconds": 1.0},
        "checkpoint": {"bitwise": True, "seconds": 1.0},
    }
    by_goal = {goal: (value, verdict) for goal, value, verdict in verdicts(results)}
    assert by_goal["DDP over NCCL equals one process"] == ("took longer than 40 s", "FAILED")
    assert by_goal["a step that is not finite is skipped"] == ("False", "MISSED")
    assert by_goal["checkpoints restore bit by bit"] == ("True", "reached")
    assert by_goal["all models compile"] == ("", "not run")
    assert "| ddp | 40.0 | took longer than 40 s |" in report(results, dry=False)
