"""Compiled layers: they compute the same, and training goes on without them where the compiler fails."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from crate_ray.config import CrateMAEConfig, TrainingConfig
from crate_ray.models import build_model
from crate_ray.training.compilation import compile_layers, should_compile
from crate_ray.training.parallel import settle
from tests.unit.test_step import CONFIG, batch64, close, gradients, model64

pytestmark = pytest.mark.usefixtures("one_thread")

FRESH = """
from functools import partial
import torch
from crate_ray.config import CrateMAEConfig
from crate_ray.models import build_model
from crate_ray.training.compilation import compile_layers
torch.compile = partial(torch.compile, backend="eager")
model = build_model(CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=1))
assert compile_layers(model, model.encoder, (torch.randn(2, 3, 8, 8), torch.rand(2, 16)))
assert torch._functorch.config.force_non_lazy_backward_lowering
assert issubclass(torch._dynamo.exc.TorchDynamoException, RuntimeError)
"""


def test_the_private_names_of_the_compiler_are_there_in_a_fresh_process() -> None:
    """In other tests, something else may have imported them. tests/integration/test_demo.py trains compiled layers."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiled_layers_compute_the_same_and_evaluation_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    torch._dynamo.reset()
    config = CrateMAEConfig(image_size=16, patch_size=2, dim=16, num_subspaces=2, depth=2, sparsity_lambda=0.1)
    torch.manual_seed(0)
    model, noise = build_model(config), torch.rand(4, config.num_patches)
    images = torch.randn(4, 3, 16, 16)
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
    programs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        programs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
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
    for choice, expected in (("auto", (False, True)), ("layers", (True, True)), ("off", (False, False))):
        training = TrainingConfig(steps=1, compile=choice)
        assert tuple(should_compile(training.compile, device) for device in devices) == expected
