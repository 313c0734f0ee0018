"""Lion and Muon: their steps, which parameters they take, and what they need. That a run resumes bitwise, skips steps
that are not finite, and never waits is tested for all optimizers in test_checkpoint, test_guard and test_step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crate_ray.cli import parse_config
from crate_ray.config import (
    ClassifierConfig,
    CrateMAEConfig,
    FinetuneConfig,
    OptimConfig,
    OptimizerName,
    PrepareConfig,
    PretrainConfig,
    SweepConfig,
    ViTMAEConfig,
)
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.finetuning.optim import build_layerwise_optimizer, layer_of
from crate_ray.models import build_model
from crate_ray.models.classifier import Classifier
from crate_ray.models.training_memory import least_training_bytes
from crate_ray.runs.pretraining import open_run
from crate_ray.runs.record import write_record
from crate_ray.storage.local import LocalStorage
from crate_ray.sweeps.search import TrialSearch
from crate_ray.sweeps.space import shared_values, trial_config
from crate_ray.training.lion import Lion
from crate_ray.training.optimizer import build_optimizer
from tests.checkpoints import save

pytestmark = pytest.mark.usefixtures("one_thread")

CRATE = CrateMAEConfig(image_size=8, patch_size=2, dim=16, num_subspaces=2, depth=2, decoder_depth=1)
ALPHA = CRATE.model_copy(
    update={"dictionary": "overcomplete", "residual": "all", "threshold": "learned", "layer_scale": 0.1}
)
VIT = ViTMAEConfig(image_size=8, patch_size=2, dim=16, num_heads=2, depth=2, decoder_depth=1)


# --- Lion -----------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1000),
    betas=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    weight_decay=st.floats(0, 2),
    rates=st.lists(st.floats(0, 0.5), min_size=1, max_size=6),
)
def test_lion_is_the_papers_algorithm(
    seed: int, betas: tuple[float, float], weight_decay: float, rates: list[float]
) -> None:
    random = np.random.default_rng(seed)
    theta, m = random.standard_normal((3, 4)), np.zeros((3, 4))
    parameter = nn.Parameter(torch.from_numpy(theta.copy()))
    optimizer = Lion([{"params": [parameter], "weight_decay": weight_decay}], betas)
    beta1, beta2 = betas
    for rate in rates:
        g = random.standard_normal((3, 4))
        g[0] = 0.0  # a number without a gradient does not move
        parameter.grad = torch.from_numpy(g.copy())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        # Algorithm 2 of arXiv 2302.06675, in its order.
        c = beta1 * m + (1 - beta1) * g
        theta = theta - rate * (np.sign(c) + weight_decay * theta)
        m = beta2 * m + (1 - beta2) * g
        np.testing.assert_allclose(parameter.detach().numpy(), theta, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[parameter]["exp_avg"].numpy(), m, rtol=1e-12, atol=1e-12)


def test_lions_betas_are_its_own_unless_they_are_given() -> None:
    assert OptimConfig(optimizer="lion").betas == (0.9, 0.99)
    assert OptimConfig(optimizer="lion", betas=(0.8, 0.9)).betas == (0.8, 0.9)
    assert OptimConfig(optimizer="muon").betas == OptimConfig().betas == (0.9, 0.95)
    for recipe in ("crate", "mae"):
        values: dict[str, Any] = {"data": {"train": "x"}, "recipe": recipe, "optim": {"optimizer": "lion"}}
        assert FinetuneConfig.model_validate(values).optim.betas == (0.9, 0.99)
        values["optim"] |= {"betas": (0.8, 0.9)}
        assert FinetuneConfig.model_validate(values).optim.betas == (0.8, 0.9)


# --- Muon -----------------------------------------------------------------------------------------------------------


def groups_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if any(p is parameter for p in group["params"])]


MATRICES = {
    "published": (CRATE, {"mssa.subspaces", "mssa.output.weight", "ista.dictionary", "expansion"}),
    "tied": (
        CRATE.model_copy(update={"decoder_maps": "tied", "decoder_depth": 2}),
        {"mssa.subspaces", "mssa.output.weight", "ista.dictionary"},
    ),
    "alpha": (ALPHA, {"mssa.subspaces", "mssa.output.weight", "ista.dictionary", "ista.synthesis"}),
    "vit": (VIT, {"qkv.weight", "attention_output.weight", "mlp_input.weight", "mlp_output.weight"}),
}


@pytest.mark.parametrize("form", MATRICES)
@pytest.mark.parametrize("classifier", [False, True])
def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(form: str, classifier: bool) -> None:
    config, expected = MATRICES[form]
    optim = OptimConfig(optimizer="muon", weight_decay=0.3)
    if classifier:
        model: Any = Classifier(config, ClassifierConfig(num_classes=3))
        layers = list(model.encoder)
        optimizer = build_layerwise_optimizer(model, optim, 0.5)
        expected = expected - {"expansion"}
    else:
        model = build_model(config)
        layers = [*model.encoder, *model.decoder]
        optimizer = build_optimizer(model, optim)
    found = set()
    for name, parameter in model.named_parameters():
        (group,) = groups_of(optimizer, parameter)  # in one group, and once
        if "ns_steps" in group:
            found.add(name.split(".", 3 if classifier else 2)[-1])
            assert parameter.ndim == 2 and any(p is parameter for layer in layers for p in layer.parameters())
        assert group["weight_decay"] == (0.3 if parameter.ndim > 1 and not name.endswith("_token") else 0.0), name
    assert found == expected


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_a_step_of_muon_is_that_of_torchs_muon_and_adamw(layer_decay: float) -> None:
    """With each parameter in an optimizer of its own."""
    torch.manual_seed(0)
    model, twin = (Classifier(CRATE, ClassifierConfig(num_classes=3)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    optim = OptimConfig(optimizer="muon", weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    ours = build_layerwise_optimizer(model, optim, layer_decay)
    theirs: list[torch.optim.Optimizer] = []
    for name, parameter in twin.named_parameters():
        rate = 0.01 * layer_decay ** (3 - layer_of(name, 2))
        decay = 0.3 if parameter.ndim > 1 and "token" not in name else 0.0
        if parameter.ndim == 2 and "encoder." in name:
            theirs.append(torch.optim.Muon([parameter], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        else:
            theirs.append(
                torch.optim.AdamW([parameter], lr=rate, weight_decay=decay, betas=(0.8, 0.9), eps=1e-6, fused=True)
            )
    for _ in range(3):
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for group in ours.param_groups:
            group["lr"] = 0.01 * group["lr_scale"]
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_what_muon_cannot_do_is_refused() -> None:
    training = {"steps": 1, "cuda_graph": True}
    for kind in (PretrainConfig, FinetuneConfig):
        values = {"data": {"train": "x"}, "training": training}
        assert kind.model_validate({**values, "optim": {"optimizer": "lion"}}).optim.optimizer == "lion"
        with pytest.raises(ValueError, match=r"training\.cuda_graph needs optim\.optimizer adamw or lion"):
            kind.model_validate({**values, "optim": {"optimizer": "muon"}})


# --- What else depends on the optimizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CRATE, ALPHA, VIT])
def test_memory_is_that_of_weights_gradients_and_state(config: CrateMAEConfig | ViTMAEConfig) -> None:
    def stored(optimizer: OptimizerName) -> int:
        model = build_model(config)
        built = build_optimizer(model, OptimConfig(optimizer=optimizer))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        built.step()
        state = [t for entry in built.state.values() for t in entry.values() if t.ndim]  # without step counts
        return sum(t.nbytes for t in state)

    names: tuple[OptimizerName, ...] = get_args(OptimizerName)
    assumed = {name: least_training_bytes(config, 1, optimizer=name) for name in names}
    for name in names:
        assert assumed["adamw"] - assumed[name] == stored("adamw") - stored(name), name
    assert stored("lion") < stored("muon") < stored("adamw")


def test_a_run_keeps_its_optimizer(tmp_path: Path) -> None:
    digits, uri = tmp_path / "digits", str(tmp_path / "digits")
    pack(digits_source("test"), LocalStorage(digits), PrepareConfig(source="digits", output=uri))
    values: dict[str, Any] = {
        "name": "mine",
        "storage": str(tmp_path / "runs"),
        "model": {**CRATE.model_dump(), "channels": 1},
        "data": {"train": uri},
        "training": {"steps": 4, "batch_size": 4},
    }
    run = open_run(PretrainConfig.model_validate(values))
    old = run.record.model_dump(mode="json")
    del old["config"]["optim"]["optimizer"]  # a record of before there was a choice
    record = type(run.record).model_validate(old)
    assert record == run.record
    write_record(run.storage, record)
    model = build_model(record.model)
    save(run.storage, model.state_dict(), record, 2, tmp_path / "scratch")
    assert open_run(PretrainConfig.model_validate(values)).first_step == 2
    for optimizer in ("lion", "muon"):
        changed = PretrainConfig.model_validate({**values, "optim": {"optimizer": optimizer}})
        message = rf"was started with optim\.optimizer adamw, not {optimizer}; choose another --name"
        with pytest.raises(UserError, match=message):
            open_run(changed)


def test_a_sweep_searches_the_optimizer(tmp_path: Path) -> None:
    base = {
        "model": CRATE.model_dump(),
        "data": {"train": "somewhere", "validation": "elsewhere"},
        "training": {"steps": 10, "batch_size": 8},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    search = "{optim.optimizer: {choice: [adamw, lion, muon]}, optim.lr: {choice: [1e-3, 1e-4]}}"
    (tmp_path / "sweep.yaml").write_text(f"base: base.yaml\nsampler: grid\nsearch: {search}\n")
    config = parse_config(SweepConfig, ["--config", str(tmp_path / "sweep.yaml")])
    shared = shared_values(config)
    trials = TrialSearch(config, [])
    suggested = [trials.suggest(f"t{trial}") for trial in range(6)]
    optims = [trial_config(config, shared, values["values"], "t").optim for values in suggested if values]
    assert {(o.optimizer, o.lr) for o in optims} == {
        (name, lr) for name in get_args(OptimizerName) for lr in (1e-3, 1e-4)
    }
    assert all(o.betas == ((0.9, 0.99) if o.optimizer == "lion" else (0.9, 0.95)) for o in optims)
    wrong = search.replace("lion", "lino")
    (tmp_path / "sweep.yaml").write_text(f"base: base.yaml\nsearch: {wrong}\n")
    with pytest.raises(UserError, match="optim.optimizer.*lino"):
        shared_values(parse_config(SweepConfig, ["--config", str(tmp_path / "sweep.yaml")]))
