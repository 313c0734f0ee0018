"""The models of a comparison have the documented sizes and settings, and its intervals are correct."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from crate_ray.cli import parse_config
from crate_ray.comparison.alone import _pretrain
from crate_ray.comparison.compare import compare
from crate_ray.comparison.figure import draw
from crate_ray.comparison.follower import Follower, follower_of
from crate_ray.comparison.results_cache import Conditions
from crate_ray.comparison.table import (
    Comparison,
    PixelFigures,
    PretrainFigures,
    RunFigures,
    Variant,
    interval,
    summarize,
    write_report,
)
from crate_ray.comparison.variants import (
    ABLATIONS,
    OURS,
    SAME_PARAMETERS,
    SAME_SIZE,
    SUCCESSORS,
    count_parameters,
    plan_variants,
    vit_of_as_many_parameters,
    vit_of_the_same_size,
)
from crate_ray.config import (
    CompareConfig,
    CrateMAEConfig,
    FinetuneConfig,
    PrepareConfig,
    PretrainConfig,
    S3Config,
    ViTMAEConfig,
)
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import open_source
from crate_ray.errors import UserError
from crate_ray.evaluation.feature_source import InProcess
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.exported import ModelDescription
from crate_ray.runs.export import describe
from crate_ray.runs.listener import Listener
from crate_ray.runs.pretraining import open_run
from crate_ray.storage.interface import open_storage
from crate_ray.training.signals import Stopped


def test_the_baseline_of_the_same_size_is_the_published_one() -> None:
    base = vit_of_the_same_size(CrateMAEConfig(preset="base"))
    assert count_parameters(base) == count_parameters(ViTMAEConfig(preset="base"))


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 3, 4, 6]),
    width=st.integers(2, 12),
    depth=st.integers(1, 6),
    decoder_depth=st.integers(1, 6),
    patch=st.sampled_from([2, 4]),
)
def test_the_matched_baseline_has_as_many_parameters(
    heads: int, width: int, depth: int, decoder_depth: int, patch: int
) -> None:
    config = CrateMAEConfig(
        image_size=16, patch_size=patch, dim=12 * width, num_subspaces=heads, subspace_dim=12 * width // heads or 1,
        depth=depth, decoder_depth=decoder_depth, norm_pix_loss=True,
    )  # fmt: skip
    matched = vit_of_as_many_parameters(config)
    assert count_parameters(matched) == pytest.approx(count_parameters(config), rel=0.03)
    assert (matched.depth, matched.decoder_depth) == (depth, decoder_depth)
    for name in ("image_size", "patch_size", "mask_ratio", "norm_pix_loss"):
        assert getattr(matched, name) == getattr(config, name)


BASE = """
model: {image_size: 8, patch_size: 2, channels: 1, dim: 32, num_subspaces: 2, depth: 2}
data: {train: somewhere, validation: elsewhere}
training: {steps: 10, batch_size: 8}
"""


def compare_config(folder: Path, **values: Any) -> CompareConfig:
    (folder / "base.yaml").write_text(BASE)
    return CompareConfig.model_validate(
        {"base": str(folder / "base.yaml"), "probe": {"train": "a", "test": "b"}, **values}
    )


def test_runs_differ_in_their_model_and_seed_alone(tmp_path: Path) -> None:
    config = compare_config(
        tmp_path, ablations=True, variants={"wide": {"model.dim": 64}}, settings={"training.steps": 20}, seeds=(3, 5)
    )
    plan = plan_variants(config)
    assert list(plan) == [OURS, SAME_SIZE, SAME_PARAMETERS, *ABLATIONS, "wide"]
    names = {run.name for runs in plan.values() for run in runs}
    assert len(names) == 2 * len(plan)
    first = plan[OURS][0]
    models = []
    for runs in plan.values():
        assert [run.seed for run in runs] == [3, 5]
        for run in runs:
            assert run.model_copy(update={"model": first.model, "seed": 3, "name": first.name}) == first
        models.append(runs[0].model.model_dump_json())
    assert len(set(models)) == len(plan) and first.training.steps == 20


@pytest.mark.parametrize(
    "name", ["cifar10-white-box", "cifar10-variants", "cifar10-depth", "cifar10-gpu", "compare-sound-white-box"]
)
def test_white_boxes_and_vit_mae_of_the_results_have_as_many_parameters(name: str) -> None:
    path = Path(__file__).parents[2] / "jobs/configs" / f"{name}.yaml"
    plan = plan_variants(parse_config(CompareConfig, ["--config", str(path)]))
    assert any(isinstance(runs[0].model, ViTMAEConfig) for runs in plan.values())
    wanted = count_parameters(plan[OURS][0].model)
    for variant, runs in plan.items():
        assert abs(count_parameters(runs[0].model) / wanted - 1) < 0.02, variant


@pytest.mark.parametrize("model", [{"dim": 64, "num_subspaces": 4}, {"dim": 256, "num_subspaces": 8, "depth": 3}])
def test_successors_have_as_many_parameters(model: dict[str, Any], tmp_path: Path) -> None:
    settings = {f"model.{name}": value for name, value in model.items()}
    plan = plan_variants(compare_config(tmp_path, successors=True, baselines=False, settings=settings))
    assert list(plan) == [OURS, *SUCCESSORS]
    models = {name: runs[0].model for name, runs in plan.items()}
    wanted = count_parameters(models[OURS])
    for name, found in models.items():
        assert abs(count_parameters(found) / wanted - 1) < 0.02, name
        assert found.depth == models[OURS].depth
        for setting, value in SUCCESSORS.get(name, {}).items():
            assert getattr(found, setting.removeprefix("model.")) == value
    assert len({found.model_dump_json() for found in models.values()}) == len(models)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"settings": {"training.stepz": 1}},
            r"no pretraining setting 'training.stepz', did you mean 'training.steps'",
        ),
        ({"variants": {"a": {"model.dimm": 1}}}, r"no pretraining setting 'model.dimm', did you mean 'model.dim'"),
        ({"variants": {"vit-mae": {}}}, "'vit-mae' is the name of a variant that compare makes itself"),
        ({"variants": {"odd": {"model.dim": 30}}}, "variant 'odd': .*dim 30 is not divisible by 4"),
        ({"settings": {"data.validation": None}}, "compare needs held-out data"),
        ({"variants": {"begun": {"init_from": "runs/other"}}}, "every model from random weights: leave init_from out"),
        ({"settings": {"model.architecture": "vit_mae"}}, "num_subspaces|give a CRATE-MAE"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        plan_variants(compare_config(tmp_path, **values))


def test_an_interval_holds_the_mean_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    held = 0
    for _ in range(4000):
        found = interval((2 + 3 * random.standard_normal(3)).tolist())
        assert found.low is not None and found.high is not None
        held += found.low <= 2 <= found.high
    assert held / 4000 == pytest.approx(0.95, abs=0.012)
    assert interval([1.0]) == (1.0, None, None)


class Untrained:
    """A trainer that trains nothing: the loss of a run is made up of its width and seed."""

    features = InProcess()

    def __init__(self) -> None:
        self.done: list[str] = []

    def pretrain(self, config: PretrainConfig) -> PretrainFigures:
        self.done.append(config.name)
        return PretrainFigures(loss=config.model.dim + config.seed**2, images_per_second=100.0, memory_bytes=2.0**30)

    def load(self, config: PretrainConfig) -> tuple[MaskedAutoencoder, ModelDescription]:
        torch.manual_seed(config.seed)
        return build_model(config.model), describe(open_run(config).record, 10)

    def finetune(self, config: FinetuneConfig) -> float:
        self.done.append(config.name)
        return 0.5


@pytest.mark.slow
def test_what_was_measured_counts_only_for_what_it_was_measured_with(tmp_path: Path) -> None:
    for split in ("train", "test"):
        config = PrepareConfig(source="digits", output=str(tmp_path / split))
        pack(digits_source(split), open_storage(config.output, S3Config()), config)
    given: dict[str, Any] = {
        "storage": str(tmp_path / "runs"), "seeds": (0, 2), "baselines": False, "variants": {"wide": {"model.dim": 36}},
        "settings": {"data.train": str(tmp_path / "train"), "data.validation": str(tmp_path / "test")},
        "probe": {"train": str(tmp_path / "train"), "test": str(tmp_path / "test"), "max_samples": 100},
    }  # fmt: skip

    def measure(**changes: Any) -> tuple[list[str], dict[str, Any]]:
        config, trainer, said = compare_config(tmp_path, **{**given, **changes}), Untrained(), list[str]()
        found = compare(config, trainer, said.append)
        files = write_report(open_storage(config.storage, S3Config()).under(config.name), config, found)
        probed = [what for what in said if "probe" in what]
        assert files["comparison.png"].startswith(b"\x89PNG")
        return trainer.done + probed, {**json.loads(files["comparison.json"]), "md": files["comparison.md"].decode()}

    done, report = measure()
    runs = [f"{name}-seed-{seed}" for name in ("crate-mae", "wide") for seed in (0, 2)]
    assert done[:4] == runs and len(done) == 4 + 2 * 4 + 1
    ours, wide = report["variants"].values()
    # Student's t for two values: half of their distance times 12.706.
    assert ours["intervals"]["loss"] == pytest.approx([34, 34 - 2 * 12.706, 34 + 2 * 12.706], rel=1e-4)
    assert wide["differences"]["loss"] == [4, 4, 4] and not ours["differences"]
    assert "| +4.0000 ± 0.0000 |" in report["md"] and "34.0000 ± 25.4124" in report["md"]

    assert measure() == ([], report)
    # How fast data is read changes nothing; another probe is made again, of the same models.
    assert measure(settings={**given["settings"], "data.decode_threads": 1})[0] == []
    done, again = measure(probe={**given["probe"], "max_samples": 40})
    assert not set(done) & set(runs) and len(done) == 2 * 4 + 1
    assert again["variants"]["wide"]["runs"][0]["probe"] != wide["runs"][0]["probe"]
    done, whitened = measure(probe={**given["probe"], "max_samples": 40}, components=8, whiten=True)
    assert len(done) == 2 * 4 + 1 and "Probe and k-NN are of 8 principal components, whitened." in whitened["md"]
    assert whitened["variants"]["wide"]["runs"][0]["knn"] != again["variants"]["wide"]["runs"][0]["knn"]
    for name, value in {"training.steps": 11, "optim.lr": 0.5, "model.sparsity_lambda": 0.9}.items():
        with pytest.raises(
            UserError, match=rf"crate-mae-seed-0.pretrained of .* was measured with {name} .*, not {value}"
        ):
            measure(settings={**given["settings"], name: value})
    (tmp_path / "tune.yaml").write_text("training: {steps: 5, batch_size: 16}\naugment: {randaugment: 0}\n")
    tuned = {"finetune": str(tmp_path / "tune.yaml")}
    assert [name for name in measure(**tuned)[0] if "probe" not in name] == [
        f"{run}-{kind}" for run in runs for kind in ("finetuned", "scratch")
    ]
    with pytest.raises(UserError, match=r"crate-mae-seed-0-finetuned of .* with finetuning.training.steps 5, not 6"):
        measure(**tuned, finetune_settings={"training.steps": 6})
    for number in range(20):
        (tmp_path / "grids" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "grids" / "ab"[number % 2] / f"{number}.npy", np.zeros((1, 8, 8), np.float32))
    config = PrepareConfig(source=str(tmp_path / "grids"), output=str(tmp_path / "packed"))
    pack(
        open_source(open_storage(str(tmp_path / "grids"), S3Config())), open_storage(config.output, S3Config()), config
    )
    (tmp_path / "tune.yaml").write_text("training: {steps: 5, batch_size: 16}\n")
    with pytest.raises(UserError, match=r"RandAugment is for images"):
        measure(
            **tuned,
            name="grids",
            settings={"data.train": config.output, "data.validation": config.output},
            probe={"train": config.output, "test": config.output},
        )


def test_figures_of_an_earlier_version_count_while_its_settings_are_the_same() -> None:
    form: dict[str, Any] = {"encoder_tokens": "visible", "decoder_attend_to": "visible", "dim": 64, "num_subspaces": 4}
    config = CrateMAEConfig.model_validate(form)
    stored = json.loads(json.dumps({"model": config.model_dump(mode="json"), "datasets": {"train": "a"}}))
    del stored["model"]["predicted_share"]  # as if it were a new setting

    def change(**values: Any) -> str | None:
        now = Conditions.of(CrateMAEConfig.model_validate({**form, **values}))
        return Conditions({}, {}).extended(model=now, datasets={"train": "a"}).change(stored)

    assert change() is None
    assert change(predicted_share=0.5) == "model.predicted_share"
    assert change(dim=768) == "model.dim"  # the default, but not as stored
    stored["datasets"]["train"] = "b"
    assert change() == "datasets.train"
    stored = {**stored, "datasets": {"train": "a"}, "model": {**stored["model"], "removed": 1}}
    assert change() == "model.removed"


RUN_ALONE = """
import os, sys, time
from pathlib import Path
from crate_ray.comparison.alone import _in_fresh_process
from crate_ray.training.signals import Stopped, stop_signals

def work(started):
    with stop_signals(by_parent=True) as request:
        Path(started).write_text(str(os.getpid()))
        while not request.signal:
            time.sleep(0.1)
        time.sleep(1)  # it saves, while more signals arrive
        raise Stopped(request.signal, 7)

if __name__ == "__main__":
    try:
        _in_fresh_process(work, sys.argv[1])
    except Stopped as stopped:
        print("stopped by", stopped.signal, "at", stopped.step)
"""


@pytest.mark.daily
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_ends_with_its_comparison(number: signal.Signals, tmp_path: Path) -> None:
    """A run of `--launcher none` is told of a signal to its comparison, and ends when the comparison is killed."""
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(RUN_ALONE)
    command = [sys.executable, script, started]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as comparison:
        while not (started.exists() and started.read_text()):
            assert comparison.poll() is None
            time.sleep(0.1)
        run = os.pidfd_open(int(started.read_text()))
        if number != signal.SIGKILL:  # as a scheduler does, or a terminal
            signal.pidfd_send_signal(run, number)
        comparison.send_signal(number)
        try:
            assert select.select([run], [], [], 30)[0], "the run goes on"
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(run, signal.SIGKILL)
            os.close(run)
        output = comparison.communicate()[0]
    assert output == ("" if number == signal.SIGKILL else f"stopped by {int(number)} at 7\n")


class Interrupt(Listener):
    """Interrupts the training after a step, at once or with a signal."""

    def __init__(self, follower: Follower, at: int, *, kindly: bool = False) -> None:
        self._follower, self._at, self._kindly = follower, at, kindly

    def metrics(self, step: int, values: dict[str, float], time_ms: int) -> None:
        self._follower.metrics(step, values, time_ms)
        if step == self._at:
            if not self._kindly:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_a_run_without_ray_resumes_and_ends_the_same(tmp_path: Path) -> None:
    data = PrepareConfig(source="digits", output=str(tmp_path / "digits"))
    pack(digits_source("test"), open_storage(data.output, S3Config()), data)

    def planned(storage: str) -> tuple[CompareConfig, PretrainConfig]:
        settings = {
            "data.train": data.output, "data.validation": data.output, "training.batch_size": 16, "training.steps": 8,
            "checkpoint.every_steps": 3,
        }  # fmt: skip
        config = compare_config(
            tmp_path,
            storage=str(tmp_path / storage),
            baselines=False,
            settings=settings,
            tracking={"log_every": 1},
            probe={"train": data.output, "test": data.output},
        )
        return config, plan_variants(config)[OURS][0]

    def weights(run: PretrainConfig) -> bytes:
        return (Path(run.storage) / run.name / "model" / "model.safetensors").read_bytes()

    config, run = planned("whole")
    whole = _pretrain(run, follower_of(config, run.name))
    expected = weights(run)
    config, run = planned("interrupted")
    for at in (2, 5):  # before the first checkpoint, and after it
        with pytest.raises(KeyboardInterrupt):
            _pretrain(run, Interrupt(follower_of(config, run.name), at))  # type: ignore[arg-type]
    assert open_run(run).first_step == 3
    with pytest.raises(Stopped) as stopped:
        _pretrain(run, Interrupt(follower_of(config, run.name), 5, kindly=True))  # type: ignore[arg-type]
    assert stopped.value.step == open_run(run).first_step == 5
    # Other settings would make it a mixture, and fewer steps leave none to train.
    for name, value in (("optim.lr", 0.5), ("training.steps", 4)):
        other = config.model_copy(update={"settings": {**config.settings, name: value}})
        with pytest.raises(
            UserError, match=rf"'crate-mae-seed-0' was begun with {name} \S+, not {value}; give the comp"
        ):
            compare(other, Untrained(), lambda _: None)
    shorter = run.model_copy(update={"training": run.training.model_copy(update={"steps": 4})})
    with pytest.raises(UserError, match="is at step 5, beyond its last step 4; raise training.steps"):
        _pretrain(shorter, follower_of(config, run.name))
    resumed = _pretrain(run, follower_of(config, run.name))
    assert resumed.loss == whole.loss and weights(run) == expected
    # Killed before the model was exported.
    shutil.rmtree(Path(run.storage) / run.name / "model")
    assert open_run(run).is_finished
    assert _pretrain(run, follower_of(config, run.name)) == resumed and weights(run) == expected


def test_the_figure_shows_the_means_and_intervals_of_the_table() -> None:
    def run(seed: int, probe: float, **more: float) -> RunFigures:
        others = dict.fromkeys(("loss", "probe_best", "knn", "knn_best", "probe_untrained", "knn_untrained"), 0.3)
        return RunFigures(seed=seed, probe=probe, images_per_second=1, memory_bytes=1, **{**others, **more})

    def shown(**more: float) -> Figure:
        variants = {
            name: Variant(parameters=1, model={}, runs=[run(0, low, **more), run(1, high, **more)])
            for name, low, high in ((OURS, 0.5, 0.52), ("other", 0.6, 0.6))
        }
        summarize(variants)
        return draw(Comparison(variants=variants, pixels=PixelFigures(probe=0.4, knn=0.35)))

    titles = ["masked loss (lower is better)", "linear probe / %", "k-NN / %"]
    assert [axis.get_title() for axis in shown().axes] == titles
    figure = shown(finetuned=0.7, scratch=0.65)
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert list(panels)[3:] == ["fine-tuned / %"]
    probe = panels["linear probe / %"]
    drawn = [line.get_xydata().tolist() for line in probe.lines]
    assert [[51, 0]] in drawn and [[60, 1]] in drawn  # the mean of each model in its row
    assert [[30, 0]] in drawn and [[30, 1]] in drawn  # untrained
    assert [[40, 0], [40, 1]] in drawn  # pixels
    bar = probe.collections[0].get_segments()
    assert bar[0][:, 0] == pytest.approx([51 - 12.706, 51 + 12.706], rel=1e-4)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [OURS, "other"]
