"""Signals of whether a model can learn, against their definitions, token by token."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from crate_ray.config import CrateMAEConfig, OptimConfig, ViTMAEConfig
from crate_ray.evaluation import figures
from crate_ray.evaluation.learning import Learning, ModelLearning, by_name
from crate_ray.models import build_model
from crate_ray.structure.coding_rate import effective_rank
from crate_ray.structure.signals import measure_signals
from crate_ray.training.optimizer import build_optimizer
from crate_ray.training.step import train_step

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 3}
MODELS = [
    pytest.param(CrateMAEConfig(**SMALL, num_subspaces=4), id="published"),
    pytest.param(CrateMAEConfig(**SMALL, num_subspaces=4, decoder_maps="tied"), id="tied"),
    pytest.param(
        CrateMAEConfig(**SMALL, num_subspaces=4, attend_to="visible", decoder_attend_to="visible", residual="all"),
        id="visible keys",
    ),
    pytest.param(
        CrateMAEConfig(**SMALL, num_subspaces=4, residual="all", dictionary="overcomplete"), id="overcomplete"
    ),
    pytest.param(ViTMAEConfig(**SMALL, num_heads=4), id="vit"),
]


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 16, 16, generator=generator), torch.rand(3, 16, generator=generator)


@pytest.mark.parametrize("config", MODELS)
def test_signals_follow_their_definitions(config: CrateMAEConfig | ViTMAEConfig) -> None:
    torch.manual_seed(1)
    model, (images, noise) = build_model(config), inputs()
    out = model(images, noise, return_layers=True)
    out.loss.backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    found = measure_signals(model, images, noise)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before, strict=True))
    assert found.visible_share == 4 / 16

    for signals, layers in ((found.encoder, out.encoder_layers), (found.decoder, out.decoder_layers)):
        for i, z_BTD in enumerate(layers):
            pairs = [
                F.cosine_similarity(z[a], z[b], dim=0).item()
                for z in z_BTD
                for a, b in itertools.permutations(range(z_BTD.shape[1]), 2)
            ]
            assert signals.token_cosine[i] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
            assert signals.token_rank[i] == pytest.approx(effective_rank(z_BTD).mean().item(), rel=1e-5)
    encoded = model.encode(images, noise, return_attention=True)
    for i, maps_BKTT in enumerate(encoded.attention):
        tokens = maps_BKTT.shape[-1]
        entropy = -(maps_BKTT * maps_BKTT.clamp_min(1e-30).log()).sum(-1).mean() / math.log(tokens)
        assert found.encoder.attention_entropy[i] == pytest.approx(entropy.item(), abs=1e-5)
        if model.visible_only:
            continue
        shares = [
            maps_BKTT[b, k, 1 + n, 1:][~encoded.masking.removed[b]].sum().item()
            for b in range(3)
            for k in range(maps_BKTT.shape[1])
            for n in range(16)
            if encoded.masking.removed[b, n]
        ]
        assert found.encoder.visible_attention[i] == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    gradients = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    names = {"U": "mssa.subspaces", "D": "ista.dictionary", "QKV": "qkv.weight"}
    for part, values in found.encoder.gradients.items():
        if part in names:
            assert values == [pytest.approx(gradients[f"encoder.{i}.{names[part]}"], rel=1e-4) for i in range(3)]
    assert found.encoder.gradients and (found.decoder.gradients or config.architecture == "crate_mae")
    for part, layers in ((found.encoder, model.encoder), (found.decoder, model.decoder)):
        for i, norm in enumerate(part.gradient_norm):
            squares = [part.gradients[name][i] ** 2 for name in part.gradients]
            assert norm == pytest.approx(math.sqrt(sum(squares)))
        assert len(part.gradient_norm) in (0, len(layers))


def test_signals_leave_distributed_training_as_it_is() -> None:
    """DDP synchronises gradients by hooks in the backward pass."""
    images, noise = inputs()
    config = CrateMAEConfig(**SMALL, num_subspaces=4)
    weights = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for measured in (False, True):
            torch.manual_seed(4)
            model = build_model(config)
            trained = DistributedDataParallel(model, static_graph=True, gradient_as_bucket_view=True)
            optimizer = build_optimizer(model, OptimConfig())
            for _ in range(4):
                if measured:
                    measure_signals(model, images.flip(0), noise)
                train_step(trained, optimizer, images, noise, batch_size=3, lr=1e-2)
            weights.append(list(model.parameters()))
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_layers_without_weights_of_their_own_have_no_gradients() -> None:
    """A tied decoder with tied output maps; the report draws it all the same."""
    model = build_model(CrateMAEConfig(**SMALL, num_subspaces=4, decoder_maps="tied", output_map="tied"))
    signals = measure_signals(model, *inputs())
    assert len(signals.encoder.gradient_norm) == 3 and signals.decoder.gradient_norm == []
    trained = ModelLearning(title="trained", encoder=by_name(signals.encoder), decoder=by_name(signals.decoder))
    drawn = figures.signals(Learning(data="here", images=3, visible_share=0.25, models={"trained": trained}))
    assert b"gradient norm" in drawn.data


def test_a_collapsed_model_is_seen() -> None:
    """Tokens of deep published stacks coincide at initialisation; residuals and small weights keep them apart."""
    images, noise = inputs()
    cosines = {}
    for initialization, residual in itertools.product(("published", "small"), ("attention", "all")):
        torch.manual_seed(2)
        config = CrateMAEConfig(
            **SMALL | {"depth": 10, "dim": 64}, num_subspaces=4, initialization=initialization, residual=residual
        )
        found = measure_signals(build_model(config), images, noise)
        cosines[initialization, residual] = found.encoder.token_cosine[-1]
    assert cosines["published", "attention"] > 0.98 and cosines["published", "attention"] == max(cosines.values())
    assert cosines["small", "attention"] < 0.8


def test_branches_are_compared_with_their_stream() -> None:
    images, noise = inputs()
    ratios = []
    for factor in (0.1, 0.2):
        torch.manual_seed(3)
        config = CrateMAEConfig(**SMALL | {"depth": 1}, num_subspaces=4, residual="all", layer_scale=factor)
        signals = measure_signals(build_model(config), images, noise).encoder
        ratios.append(signals.attention_branch[0])
    assert ratios[1] == pytest.approx(2 * ratios[0], rel=1e-5)


def test_codes_that_never_fire_are_unused() -> None:
    images, noise = inputs()
    model = build_model(CrateMAEConfig(**SMALL, num_subspaces=4, threshold="learned"))
    with torch.no_grad():
        model.encoder[1].ista.log_threshold[:8] = 20.0
    unused = measure_signals(model, images, noise).encoder.unused_codes
    assert unused[1] >= 8 / 32 > unused[0]


def test_uniform_attention_has_the_share_of_the_visible_patches() -> None:
    images, noise = inputs()
    model = build_model(CrateMAEConfig(**SMALL, num_subspaces=4))
    with torch.no_grad():
        for layer in model.encoder:
            layer.mssa.subspaces.zero_()
    signals = measure_signals(model, images, noise).encoder
    assert signals.attention_entropy == [pytest.approx(1)] * 3
    assert signals.visible_attention == [pytest.approx(4 / 17)] * 3  # CLS has its share too
