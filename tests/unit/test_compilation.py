"""Compiled layers: they compute the same, and training goes on without them where the compiler fails."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crate_ray.config import CrateMAEConfig, PrepareConfig, PretrainConfig, TrainingConfig
from crate_ray.data.prepare.builtin import shapes_source
from crate_ray.data.prepare.packing import pack
from crate_ray.models import build_model
from crate_ray.storage.interface import open_storage
from crate_ray.training.compilation import compile_layers, should_compile
from crate_ray.training.parallel import settle
from tests.programs import recorded_programs
from tests.unit.test_step import CONFIG, batch64, close, gradients, model64

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = """
from functools import partial
import torch
from crate_ray.config import CrateMAEConfig
from crate_ray.models import build_model
from crate_ray.training.compilation import compile_layers
torch.compile = partial(torch.compile, backend="eager")
model = build_model(CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=1))
assert compile_layers(model, model.encoder, (torch.randn(2, 3, 8, 8), torch.rand(2, 16)))
"""


@pytest.mark.slow
def test_compilation_imports_the_parts_of_the_compiler_that_it_uses() -> None:
    """They are private, and in other tests something else may have imported them."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


COMPILED = CrateMAEConfig(image_size=16, patch_size=2, dim=16, num_subspaces=2, depth=2, sparsity_lambda=0.1)
BATCH = 4

JOB = """
import logging
import sys
from crate_ray.config import PretrainConfig
from crate_ray.runs.pretraining import open_run
from crate_ray.training.bare_loop import train
from crate_ray.training.pretraining import PretrainTask

logging.basicConfig(level=logging.WARNING)
run = open_run(PretrainConfig.model_validate_json(sys.argv[1]))
train(PretrainTask, run.config, run.record.model_copy(update={"threads": 1}), run.total_steps)
print("trained", run.total_steps)
"""


@pytest.mark.daily
@pytest.mark.slow
def test_a_job_compiles_its_layers_in_a_fresh_process(tmp_path: Path) -> None:
    """As every job does on a GPU."""
    prepared = PrepareConfig(source="shapes", output=str(tmp_path / "shapes"))
    pack(shapes_source("all", 20, 16, 0), open_storage(prepared.output, prepared.s3), prepared)
    training = {"steps": 2, "batch_size": BATCH, "compile": "layers", "precision": "fp32"}
    values = {"storage": str(tmp_path), "data": {"train": prepared.output}, "training": training}
    config = PretrainConfig.model_validate(values | {"model": COMPILED.model_dump()})
    command = [sys.executable, "-c", JOB, config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("trained 2\n"), done.stderr
    assert "cannot be compiled" not in done.stderr


@pytest.mark.slow
def test_compiled_layers_compute_the_same_and_evaluation_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, noise = build_model(COMPILED), torch.rand(BATCH, COMPILED.num_patches)
    images = torch.randn(BATCH, 3, 16, 16)
    results: list[list[Tensor]] = []
    names = list(model.state_dict())
    for compiled in (False, True):
        if compiled:
            assert compile_layers(model, [*model.encoder, *model.decoder], (images, noise))
        model.zero_grad()
        loss = model(images, noise).loss
        loss.backward()
        results.append([loss, *gradients(model)])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)
    assert "cannot be compiled" not in caplog.text and list(model.state_dict()) == names
    counters = torch._dynamo.utils.counters["stats"]
    programs = counters["unique_graphs"]
    with torch.no_grad():  # would be compiled anew, as another number of images
        assert model(images[:1], noise[:1]).loss.isfinite()
    assert counters["unique_graphs"] == programs > 0


def test_without_a_compiler_training_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, (images, noise) = model64(), batch64(4)
    expected = model(images, noise).loss
    torch._dynamo.reset()
    broken = {"cpp.cxx": ("/nowhere/c++",), "force_disable_caches": True}
    with torch._inductor.config.patch(broken), caplog.at_level(logging.WARNING):
        assert not compile_layers(model, [*model.encoder, *model.decoder], (images, noise))
    (record,) = [record for record in caplog.records if record.name == "crate_ray.training.compilation"]
    assert (
        "cannot be compiled" in record.getMessage()
        and "/nowhere/c++" in record.getMessage()
        and "\n" not in record.getMessage()
    )
    assert torch.equal(model(images, noise).loss, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("half", "working", "checkpointed"), [("forward", 0, False), ("forward", 1, True), ("backward", 1, True)]
)
def test_a_layer_that_cannot_be_compiled_for_another_number_of_samples_goes_on_without(
    half: str, working: int, checkpointed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Compiling fails in either half of the program, also after `working` of the two kinds of layers were compiled."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    tried: dict[str, int] = dict.fromkeys(("forward", "backward"), 0)

    def compiler(name: str) -> Any:
        def compile_half(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            if any(getattr(given, "ndim", 0) == 3 and len(given) == 5 for given in inputs):
                tried[name] += 1
                if name == half and tried[name] > working:
                    raise RuntimeError("out of registers\nand more")
            return make_boxed_func(graph.forward)

        return compile_half

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    config = CONFIG.model_copy(update={"depth": 2, "decoder_depth": 2})
    ours, eager = model64(config), model64(config)
    ours.checkpoint_layers = checkpointed
    layers = [*ours.encoder, *ours.decoder]
    assert compile_layers(ours, layers, batch64(4)) and "cannot be compiled" not in caplog.text
    for number in (5, 4, 5):
        for model in (ours, eager):
            model.zero_grad()
            model(*batch64(number)).loss.backward()
        assert close(gradients(ours), gradients(eager), 1e-9)
    assert ["forward" in vars(layer) for layer in layers] == [working == 1] * 2 + [False] * 2
    assert tried[half] == (3 if working else 4)  # once for each layer that continues uncompiled, never again
    (record,) = [record for record in caplog.records if record.name == "crate_ray.training.compilation"]
    assert record.getMessage().startswith(
        "layers cannot be compiled for tokens of shape [5, 17, 16], training continues"
    )
    assert record.getMessage().endswith("(RuntimeError: out of registers)")


def test_settling_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = recorded_programs(monkeypatch)
    model = model64()
    layers = [*model.encoder, *model.decoder]
    assert compile_layers(model, layers, batch64(4)) and len(programs) == 2
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        settle(DistributedDataParallel(model, static_graph=True), *batch64(1))
        model(*batch64(4))
        assert len(programs) == 2
        model(*batch64(1))
        assert len(programs) == 4
    finally:
        dist.destroy_process_group()


def test_what_is_compiled_by_default() -> None:
    devices = torch.device("cpu"), torch.device("cuda")
    choices = {"auto": (False, True), "layers": (True, True), "autotune": (True, True), "off": (False, False)}
    for choice, expected in choices.items():
        training = TrainingConfig.model_validate({"steps": 1, "compile": choice})
        assert tuple(should_compile(training.compile, device) for device in devices) == expected


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_that_attend_to_visible_tokens_only_are_compiled(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are given the mask by keyword."""
    programs = recorded_programs(monkeypatch)
    masked = {"attend_to": "visible", "decoder_attend_to": "visible"}
    model, inputs = build_model(CONFIG.model_copy(update=masked)), (torch.randn(2, 3, 8, 8), torch.rand(2, 16))
    model.checkpoint_layers = checkpointed
    expected = model(*inputs).loss
    assert compile_layers(model, [*model.encoder, *model.decoder], inputs)
    torch.testing.assert_close(model(*inputs).loss, expected)
    assert len(programs) == 2  # one for the encoder's layers, one for the decoder's


@pytest.mark.parametrize(("autotune", "expected"), [(False, None), (True, "max-autotune-no-cudagraphs")])
def test_kernels_are_measured_if_asked_for(
    autotune: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = []

    def compile_with(function: Any, *, dynamic: bool, mode: str | None) -> Any:
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", compile_with)
    model = build_model(CONFIG)
    assert compile_layers(model, model.encoder, (torch.randn(2, 3, 8, 8), torch.rand(2, 16)), autotune=autotune)
    assert modes == [expected] * CONFIG.depth
