"""The scaling estimate's formulas, against collectives that are played through and a count by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.benchmarks.scaling import collective_seconds, estimate, sent_bytes
from crate_ray.config import BenchmarkScalingConfig
from crate_ray.models.flops import training_flops
from tests.jobs import ROOT


def ring_all_reduce(numbers: list[list[int]]) -> tuple[list[list[int]], int]:
    """Play a ring all-reduce through: W lists of W numbers each; their sums everywhere, and numbers that each sent."""
    gpus, sent = len(numbers), 0
    held = [list(row) for row in numbers]
    for phase in range(2):
        for turn in range(gpus - 1):
            moving = [(gpu, (gpu - turn + phase) % gpus, held[gpu][(gpu - turn + phase) % gpus]) for gpu in range(gpus)]
            for gpu, chunk, value in moving:
                target = (gpu + 1) % gpus
                held[target][chunk] = held[target][chunk] + value if phase == 0 else value
            sent += 1
    return held, sent


@given(st.integers(1, 12), st.data())
def test_all_reduce_sends_what_a_ring_sends(gpus: int, data: st.DataObject) -> None:
    row = st.lists(st.integers(-99, 99), min_size=gpus, max_size=gpus)
    numbers = [data.draw(row) for _ in range(gpus)]
    held, sent = ring_all_reduce(numbers)
    assert held == [[sum(column) for column in zip(*numbers, strict=True)]] * gpus
    assert sent_bytes("ddp", gpus, gpus) == pytest.approx(4 * sent)


def test_estimate_follows_the_bandwidth_where_nothing_hides_it() -> None:
    config = BenchmarkScalingConfig()
    parameters = 44_000_000
    few, many = (estimate("ddp", parameters, gpus, config) for gpus in (8, 512))
    assert few.exposed_seconds == 0 and few.efficiency == 1 and many.samples_per_gpu == 8
    assert few.compute_seconds == pytest.approx(training_flops(config.model, 512) / (989e12 * 0.5))
    slow = config.model_copy(update={"node_bytes_per_second": 1e9})
    bound = estimate("ddp", parameters, 512, slow)
    assert bound.communication_seconds == pytest.approx(2 * 511 / 512 * 4 * parameters / 1e9, rel=0.01)
    assert bound.efficiency < 0.01
    assert sent_bytes("fsdp", parameters, 512) == sent_bytes("ddp", parameters, 512)
    # One node does not use the network.
    assert collective_seconds(1e9, 8, slow) == collective_seconds(1e9, 8, config) < collective_seconds(1e9, 9, config)
    efficiencies = [estimate("fsdp", parameters, gpus, slow).efficiency for gpus in (8, 16, 64, 512)]
    assert efficiencies == sorted(efficiencies, reverse=True)


@pytest.mark.slow
def test_the_job_writes_what_the_formulas_give(tmp_path: Path) -> None:
    config = "jobs/configs/benchmark-scaling.yaml"
    command = [sys.executable, "jobs/benchmark.py", "scaling", "--config", config, "--json", str(tmp_path / "found")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "43.7 M parameters" in done.stdout, done.stderr
    report = json.loads((tmp_path / "found").read_text())
    for strategy in ("ddp", "fsdp"):
        rows = report[strategy]
        assert [row["gpus"] for row in rows] == [8, 16, 32, 64, 128, 256, 512]
        for row in rows:
            assert row["samples_per_gpu"] == 4096 / row["gpus"]
            assert row["efficiency"] == row["compute_seconds"] / (row["compute_seconds"] + row["exposed_seconds"])
