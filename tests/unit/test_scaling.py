"""The scaling estimate's formulas, against collectives that are played through and a count by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.benchmarks.scaling import collective_seconds, estimate, sent_bytes, step_flops
from crate_ray.config import BenchmarkScalingConfig, CrateMAEConfig


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


def test_flops_are_those_of_the_equations() -> None:
    config = CrateMAEConfig(image_size=64, patch_size=8, dim=64, depth=3, num_subspaces=4)
    flops, parameters = step_flops(config)
    tokens, dim, pixels = 65, 64, 8 * 8 * 3
    attention = 2 * 2 * tokens * tokens * dim
    layer = {
        "encoder": 4 * tokens * dim * dim,
        "decoder": 3 * tokens * dim * dim,
    }  # products with U, W, D twice; E, U, W
    forward = sum(3 * (2 * products + attention) for products in layer.values())
    embedding, prediction = 2 * 64 * pixels * dim, 2 * 64 * pixels * dim
    # Backward computes two products for each of the forward pass, but none for the pixels.
    assert flops == pytest.approx(3 * (forward + prediction) + 2 * embedding, rel=0.01)
    assert parameters == 3 * (64 * 64 * 3 + 64 + 4 * 64) + 3 * (64 * 64 * 3 + 64 + 4 * 64) + pixels * dim * 2 + (
        64 + pixels + 2 * 64 + 4 * 64
    )


def test_estimate_follows_the_bandwidth_where_nothing_hides_it() -> None:
    config = BenchmarkScalingConfig()
    flops, parameters = 60e9, 44_000_000
    few, many = (estimate("ddp", flops, parameters, gpus, config) for gpus in (8, 512))
    assert few.exposed_seconds == 0 and few.efficiency == 1 and many.samples_per_gpu == 8
    assert few.compute_seconds == pytest.approx(512 * flops / (989e12 * 0.5))
    slow = config.model_copy(update={"node_bytes_per_second": 1e9})
    bound = estimate("ddp", flops, parameters, 512, slow)
    assert bound.communication_seconds == pytest.approx(2 * 511 / 512 * 4 * parameters / 1e9, rel=0.01)
    assert bound.efficiency < 0.01
    assert sent_bytes("fsdp", parameters, 512) == sent_bytes("ddp", parameters, 512)
    # One node does not use the network.
    assert collective_seconds(1e9, 8, slow) == collective_seconds(1e9, 8, config) < collective_seconds(1e9, 9, config)
    efficiencies = [estimate("fsdp", flops, parameters, gpus, slow).efficiency for gpus in (8, 16, 64, 512)]
    assert efficiencies == sorted(efficiencies, reverse=True)
