"""Runs that are asked to stop, started twice, or hang."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import EVERY, STEPS, pretrain
from tests.jobs import end, final_weights, finish, start, wait_for_commit, workers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_a_checkpoint_and_goes_on(
    number: signal.Signals,
    code: int,
    digits: str,
    undisturbed: str,
    tmp_path: Path,
) -> None:
    run = tmp_path / "runs" / "run"
    process = start(pretrain(digits), tmp_path)
    try:
        wait_for_commit(run, EVERY, process)
        process.send_signal(number)
        assert process.wait(120) == code, (tmp_path / "job.log").read_text()[-3000:]
        newest = max(int(path.name.split("-")[1]) for path in run.glob("commits/step-*.json"))
        assert EVERY <= newest < STEPS
        assert not (run / "driver.lease").exists()  # nobody has to wait for it
        finish(start(pretrain(digits), tmp_path), tmp_path)
    finally:
        if process.poll() is None:
            end(process)
    assert final_weights(run) == undisturbed


def test_a_second_driver_is_refused(digits: str, tmp_path: Path) -> None:
    first = start([*pretrain(digits), "--training.steps", "100000"], tmp_path)
    try:
        wait_for_commit(tmp_path / "runs" / "run", EVERY, first)
        (tmp_path / "second").mkdir()
        second = start([*pretrain(digits), "--storage", str(tmp_path / "runs")], tmp_path / "second")
        assert second.wait(120) == 2
        log = (tmp_path / "second" / "job.log").read_text()
        assert f"run 'run' is in use by process {first.pid} on" in log
    finally:
        for process in (first, second):
            if process.poll() is None:
                end(process)


def test_a_rank_that_hangs_is_named(digits: str, tmp_path: Path) -> None:
    process = start([*pretrain(digits), "--scaling.hang_seconds", "12"], tmp_path)
    try:
        wait_for_commit(tmp_path / "runs" / "run", EVERY, process)
        stalled = workers(process)[0].pid
        os.kill(stalled, signal.SIGSTOP)
        began = time.monotonic()
        assert process.wait(120) == 2
        assert time.monotonic() - began < 90
    finally:
        if process.poll() is None:
            end(process)
    log = (tmp_path / "job.log").read_text()
    assert "error: no step was made for 12 s: rank" in log and "gives no sign of life" in log
