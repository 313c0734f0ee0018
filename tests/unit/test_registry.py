"""The registry's gate: pairs on the same samples, a floor for the first champion, rollback, promotions at the same
time, and versions that explain themselves."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

from crate_ray.config import (
    CardConfig,
    ClassifierConfig,
    CrateMAEConfig,
    ListConfig,
    PrepareConfig,
    PromoteConfig,
    RollbackConfig,
    S3Config,
    TrackingConfig,
)
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.prepare.packing import pack
from crate_ray.data.prepare.sources import open_source
from crate_ray.errors import UserError
from crate_ray.evaluation.gate import relative_rank_low
from crate_ray.evaluation.intervals import paired_difference_low
from crate_ray.jobs import register as job
from crate_ray.models import MaskedAutoencoder, build_model
from crate_ray.models.classifier import Classifier
from crate_ray.models.exported import ModelDescription, export_model
from crate_ray.runs import metrics
from crate_ray.storage.interface import open_storage
from crate_ray.tracking.card import model_card, update_card
from crate_ray.tracking.champions import HISTORY_TAG, promote, read_champions
from crate_ray.tracking.decision import CHAMPION, Check, Data, Decision
from crate_ray.tracking.model_lock import locked
from crate_ray.tracking.registry import CONFIG_TAG, DATA_TAG, DECISION_TAG, MEASURE_TAGS, find_version, register
from crate_ray.tracking.run_tracker import RunTracker
from tests.unit.test_tracking import NOW, key_of, uri

__all__ = ["uri"]  # a fixture

MODEL = CrateMAEConfig(image_size=8, patch_size=4, channels=1, dim=16, depth=2, decoder_depth=1, num_subspaces=2)
MEAN, STD = (0.5,), (0.25,)
S3 = S3Config()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# --- The interval of a paired difference -----------------------------------------------------------------------------


def test_at_a_margin_of_zero_the_interval_is_never_surer_than_mcnemars_exact_test() -> None:
    agree = total = 0
    for better in range(50):
        for worse in range(50):
            for count in {max(1, better + worse), 200, 3000}:
                if not 0 < better + worse <= count:
                    continue
                surer = paired_difference_low(better, worse, count) > 0
                exact = binomtest(better, better + worse, alternative="greater").pvalue <= 0.05
                assert exact or not surer, (better, worse, count)
                agree, total = agree + (surer == exact), total + 1
    assert agree > 0.99 * total


def test_the_interval_covers_the_true_difference() -> None:
    random = np.random.default_rng(0)
    for count, first, second in ((100, 0.1, 0.1), (300, 0.05, 0.06), (60, 0.2, 0.1), (1000, 0.02, 0.02)):
        draws = random.multinomial(count, [first, second, 1 - first - second], size=2000)
        covered = np.mean([paired_difference_low(int(b), int(w), count) <= first - second for b, w, _ in draws])
        assert 0.945 < covered < 0.99, (count, covered)


def test_models_that_never_differ_are_equal_only_on_enough_samples() -> None:
    assert paired_difference_low(0, 0, 100) < -0.01 < paired_difference_low(0, 0, 1000) < 0
    assert paired_difference_low(0, 50, 50) == -1.0
    lows = [paired_difference_low(better, 10, 400) for better in range(0, 100, 5)]
    assert lows == sorted(lows)


def test_the_interval_of_the_rank_covers_the_true_ratio() -> None:
    """Of Gaussian features, whose ranks on many samples are known."""
    random = np.random.default_rng(0)
    scales = np.linspace(1, 0.2, 8), np.linspace(1, 0.4, 8)

    def ratio(x: np.ndarray, y: np.ndarray) -> float:
        def rank(z: np.ndarray) -> float:
            share = np.linalg.svd(z, compute_uv=False)
            share /= share.sum()
            return float(np.exp(-(share * np.log(share)).sum()))

        return rank(x) / rank(y) - 1

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        base = random.standard_normal((count, 8))
        other = base + 0.3 * random.standard_normal((count, 8))
        return (base * scales[0]).astype(np.float32), (other * scales[1]).astype(np.float32)

    true = ratio(*draw(200_000))
    lows = np.array([relative_rank_low(*draw(200)) for _ in range(200)])
    assert 0.9 < (lows <= true).mean() < 0.99
    assert lows.mean() > true - 0.05


# --- A registry with models of known quality ------------------------------------------------------------------------


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 8 × 8 whose class is whether two of the patches are both bright or both dark: pixels do not tell."""
    random = np.random.default_rng(seed)
    bright = random.integers(0, 2, (count, 2))
    images = random.normal(128, 40, (count, 8, 8))
    images[:, :4, :4] += 60 * (2 * bright[:, :1, None] - 1)
    images[:, 4:, 4:] += 60 * (2 * bright[:, 1:, None] - 1)
    return images.clip(0, 255).astype(np.uint8), (bright[:, 0] ^ bright[:, 1]).astype(np.int64)


def dataset(folder: Path, count: int, seed: int, names: tuple[str, str] = ("different", "same")) -> str:
    images, labels = pictures(count, seed)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        target = folder / "images" / names[label]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{number:04d}.png")
    config = PrepareConfig(source=str(folder / "images"), output=str(folder / "data"))
    pack(open_source(open_storage(config.source, S3)), open_storage(config.output, S3), config)
    return config.output


def encode(model: MaskedAutoencoder, images: Tensor) -> Tensor:
    z, _ = model.embed(images)
    for layer in model.encoder:
        z = layer(z)
    return model.encoder_norm(z)[:, 1:].mean(1)


def taught(steps: int) -> MaskedAutoencoder:
    """An encoder that was taught the classes for some steps: the more, the better a probe of it is."""
    torch.manual_seed(0)
    model = build_model(MODEL)
    head = nn.Linear(MODEL.dim, 2)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], 3e-3)
    images, labels = pictures(2000, 7)
    x = (torch.from_numpy(images)[:, None].float() / 255 - MEAN[0]) / STD[0]
    for step in range(steps):
        rows = torch.arange(step * 128, (step + 1) * 128) % len(x)
        loss = F.cross_entropy(head(encode(model, x[rows])), torch.from_numpy(labels)[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def classifier(steps: int) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(MODEL, ClassifierConfig(num_classes=2, classes=("different", "same")))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, labels = pictures(2000, 7)
    x = (torch.from_numpy(images)[:, None].float() / 255 - MEAN[0]) / STD[0]
    for step in range(steps):
        rows = torch.arange(step * 128, (step + 1) * 128) % len(x)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]).scores, torch.from_numpy(labels)[rows]).backward()
        optimizer.step()
    return model.eval()


@dataclass
class Registry:
    """A registered model with versions of increasing quality, and the data to compare them on."""

    folder: Path
    tracking: TrackingConfig
    train: str
    test: str

    def add(self, name: str, model: nn.Module, label: str, dataset: str | None = None) -> int:
        head = model.config if isinstance(model, Classifier) else None
        key = key_of(f"{name}-{label}")
        description = ModelDescription(
            model=MODEL, classifier=head, mean=MEAN, std=STD, kind="image", step=9, run_key=key, dataset=dataset
        )
        export_model(self.folder / name / label, model.state_dict(), description)
        run = RunTracker(self.tracking, key, label, {"optim.lr": "0.003", "training.batch_size": "128"}, {})
        evaluated = {f"evaluation/any/{number:02d}": float(number) for number in range(30)}
        run.metrics(9, {metrics.VALIDATION_LOSS: 0.25, **evaluated}, NOW)
        run.metrics(12, {metrics.VALIDATION_LOSS: 0.75, "validation/later": 1.0}, NOW + 1)
        assert run.finish("FINISHED", timeout=60)
        return int(register(str(self.folder / name / label), name, self.tracking, S3).version)

    def promote(self, name: str, version: int, **values: Any) -> None:
        probe = {"train": self.train, "test": self.test} | values.pop("probe", {})
        job.promote(
            PromoteConfig.model_validate(
                {"name": name, "version": version, "probe": probe, "tracking": self.tracking} | values
            )
        )

    def champion(self, name: str) -> int | None:
        return read_champions(name, self.tracking).current

    def decision(self, name: str, version: int) -> Decision:
        found = Decision.parse(find_version(name, version, self.tracking).tags[DECISION_TAG])
        assert found is not None
        return found


@pytest.fixture(scope="module")
def registry(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder, before = tmp_path_factory.mktemp("registry"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        made = Registry(
            folder,
            TrackingConfig(uri=uri, experiment="registry"),
            dataset(folder / "train", 400, 1),
            dataset(folder / "test", 600, 2),
        )
        made.add("mae", taught(0), "untrained")
        made.add("mae", taught(25), "some")
        made.add("mae", taught(150), "good")
        yield made
    torch.set_num_threads(before)


@pytest.mark.slow
def test_the_first_champion_beats_an_untrained_encoder_and_pixels_and_the_next_one_the_champion(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"mae version 1 is not promoted: its probe accuracy 0\.\d+ against") as refused:
        registry.promote("mae", 1)
    assert "of the untrained encoder is not shown to be above it" in str(refused.value)
    assert "measured on 600 samples of" in str(refused.value) and "--force true --reason" in str(refused.value)
    assert registry.champion("mae") is None
    refusal = registry.decision("mae", 1)
    assert not refusal.promoted and refusal.values["probe"] < 0.8

    registry.promote("mae", 2)
    assert registry.champion("mae") == 2 and "mae version 2 is @champion: " in capsys.readouterr().out
    decision = registry.decision("mae", 2)
    assert [check.rival for check in decision.checks] == ["the untrained encoder", "raw pixels"]
    assert decision.checks[1].rival_value < 0.65 < decision.checks[1].value
    registry.promote("mae", 2)  # nothing to decide
    assert "mae version 2 is @champion already" in capsys.readouterr().out

    # Worse, and equal, is not better. A margin accepts what is equal.
    same = registry.add("mae", taught(25), "equal")
    for worse, checks in ((1, 2), (same, 2)):
        with pytest.raises(
            UserError, match=rf"mae version {worse} is not promoted: .* of version 2 is not shown to be"
        ):
            registry.promote("mae", worse)
        assert len(registry.decision("mae", worse).checks) == checks and registry.champion("mae") == 2
    with pytest.raises(UserError, match=r"not shown to be at most 0\.001 below it"):
        registry.promote("mae", same, margin=0.001)  # 600 samples cannot show that
    registry.promote("mae", same, margin=0.01)
    assert registry.champion("mae") == same

    with pytest.raises(UserError, match=rf"promoted: its effective rank \d+\.\d against \d+\.\d of version {same} is"):
        registry.promote("mae", 3, criteria=["probe", "knn", "rank"])
    assert [check.measure for check in registry.decision("mae", 3).checks] == ["probe", "knn", "rank"]
    registry.promote("mae", 3)
    decision = registry.decision("mae", 3)
    assert decision.champion == same and decision.values.keys() == decision.champion_values.keys()
    assert decision.values["probe"] > 0.95 and registry.champion("mae") == 3
    for check in decision.checks:
        assert check.only_version is not None and check.only_rival is not None
        difference = (check.only_version - check.only_rival) / decision.test.samples
        assert check.value - check.rival_value == pytest.approx(difference)
        assert check.low == paired_difference_low(check.only_version, check.only_rival, 600)
    assert decision.train is not None
    for data, address, count in ((decision.train, registry.train, 400), (decision.test, registry.test, 600)):
        manifest = load_dataset(open_storage(address, S3)).manifest
        assert (data.uri, data.digest, data.samples) == (address, manifest.digest(), count)

    # By force, with a reason that is recorded. A deleted champion does not open the gate.
    registry.promote("mae", 1, force=True, reason="a drill")
    assert "mae version 1 is @champion by force (a drill)" in capsys.readouterr().out
    assert registry.decision("mae", 1).forced == "a drill"
    job.rollback(RollbackConfig(name="mae", tracking=registry.tracking))
    assert registry.champion("mae") == 3 and "version 3 is @champion again, instead of" in capsys.readouterr().out
    MlflowClient(registry.tracking.uri).delete_model_version("mae", "3")
    assert registry.champion("mae") is None
    with pytest.raises(UserError, match=rf"version 1 is not promoted: .* of version {same} is not shown"):
        registry.promote("mae", 1)
    with pytest.raises(UserError, match="mae has no version 3; it has 1, 2, 4"):
        registry.promote("mae", 3)

    job.show(ListConfig(name="mae", tracking=registry.tracking))
    shown = capsys.readouterr().out
    assert "measured on" in shown and "probe accuracy" in shown
    told = find_version("mae", 2, registry.tracking).tags
    assert told[DATA_TAG].endswith(f" {decision.test.digest[:8]} (600)") and float(told[MEASURE_TAGS["knn"]]) > 0.5


def test_test_data_that_is_training_data_is_refused(registry: Registry, tmp_path: Path) -> None:
    version = registry.add("copies", taught(25), "any")
    with pytest.raises(UserError, match="is the dataset .*; give held-out data"):
        registry.promote("copies", version, probe={"test": registry.train})
    # The same images, packed in another way.
    config = PrepareConfig(
        source=str(Path(registry.train).parent / "images"), output=str(tmp_path / "again"), shuffle=False
    )
    pack(open_source(open_storage(config.source, S3)), open_storage(config.output, S3), config)
    assert (
        load_dataset(open_storage(config.output, S3)).manifest.digest()
        != load_dataset(open_storage(registry.train, S3)).manifest.digest()
    )
    with pytest.raises(UserError, match=r"400 of 400 samples of .* are also in .*, so accuracies would be too high"):
        registry.promote("copies", version, probe={"test": config.output})
    assert DECISION_TAG not in find_version("copies", version, registry.tracking).tags
    with pytest.raises(UserError, match=f"version {version} is an encoder; give labelled data for its probe"):
        registry.promote("copies", version, probe={"train": None})


def test_an_encoder_that_saw_the_test_images_is_promoted_with_a_note(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = load_dataset(open_storage(registry.test, S3)).manifest.digest()
    version = registry.add("seen", taught(150), "any", dataset=digest)
    registry.promote("seen", version)
    assert "note: version 1 was pretrained on" in capsys.readouterr().out
    assert "without its labels" in registry.decision("seen", version).notes[0]


@pytest.mark.slow
def test_classifiers_are_compared_by_top1(registry: Registry, tmp_path: Path) -> None:
    for steps in (0, 25, 150):
        registry.add("classes", classifier(steps), f"steps-{steps}")
    probe = {"test": registry.test, "train": None}
    with pytest.raises(UserError, match=r"its top-1 accuracy 0\.\d+ against 0\.\d+ of the most frequent class"):
        registry.promote("classes", 1, probe=probe)
    registry.promote("classes", 2, probe=probe)
    registry.promote("classes", 3, probe=probe)
    decision = registry.decision("classes", 3)
    assert [(check.measure, check.rival) for check in decision.checks] == [("top1", "version 2")]
    assert decision.values["top1"] > 0.95 and decision.train is None
    others = dataset(tmp_path / "others", 40, 3, ("different", "unlike"))
    with pytest.raises(UserError, match="has 1 of 2 classes that the classifier of version 1 lacks: unlike"):
        registry.promote("classes", 1, probe={"train": None, "test": others})
    digest = load_dataset(open_storage(registry.test, S3)).manifest.digest()
    trained = registry.add("classes", classifier(1), "on-test", dataset=digest)
    with pytest.raises(UserError, match=f"version {trained} was trained on .*; give held-out data"):
        registry.promote("classes", trained, probe=probe)


def test_a_version_explains_itself(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    version = registry.add("card", taught(150), "explained", dataset="ab" * 32)
    client = MlflowClient(registry.tracking.uri)
    client.update_model_version("card", str(version), client.get_model_version("card", "1").description + "\nMine.")
    registry.promote("card", version)
    written = client.get_model_version("card", str(version))
    assert written.description.endswith("\nMine.") and len(written.description) <= 5000
    capsys.readouterr()
    job.card(CardConfig(name="card", tracking=registry.tracking))
    card = capsys.readouterr().out
    assert written.description.startswith(card.rstrip())
    for part in ("# card, version 1", "ab" * 32, "| learning rate | 0.003 |", "| validation/loss | 0.25 |",
                 "evaluation/any/17", "promoted.",
                 "raw pixels", load_dataset(open_storage(registry.test, S3)).manifest.digest()[:16], "## Limits",
                 'crate_ray.load_model("models:/card/1")'):  # fmt: skip
        assert part in card, part
    assert "validation/later" not in card and "any/18" not in card  # of another step; too many
    # MLflow links the metrics of this step, and the promotion's with their data, to the logged model.
    logged = client.get_logged_model(written.source.removeprefix("models:/"))
    linked = {(m.key, m.step): m for m in logged.metrics or []}
    assert linked[metrics.VALIDATION_LOSS, 9].value == 0.25 and (metrics.VALIDATION_LOSS, 12) not in linked
    (probe,) = [m for (key, _), m in linked.items() if key.endswith("/probe_accuracy")]
    assert probe.dataset_name == registry.test and probe.value > 0.9
    mlflow.set_tracking_uri(registry.tracking.uri or "")
    served = mlflow.pyfunc.load_model("models:/card/1")
    assert served.predict(served.input_example).shape == (1, MODEL.dim)


def test_text_from_outside_stays_text_in_a_card(registry: Registry) -> None:
    client = MlflowClient(registry.tracking.uri)
    client.create_registered_model("hostile")
    tags = {"run": "a|b\n## Heading <script>", "step": "1", CONFIG_TAG: "[1", DECISION_TAG: "{"}
    client.create_model_version("hostile", "file:///nowhere", tags=tags)
    for config in ('{"model": 1, "classifier": [], "kind": {}}', '{"model": {"image_size": "<b>", "channels": []}}'):
        client.set_model_version_tag("hostile", "1", CONFIG_TAG, config)
        assert "<b>" not in model_card(client, client.get_model_version("hostile", "1"))
    update_card(client, "hostile", 1)
    card = client.get_model_version("hostile", "1").description
    assert "| run | a\\|b ## Heading \\<script\\> |" in card
    client.set_model_version_tag("hostile", "1", "run", "x" * 4000)
    client.update_model_version("hostile", "1", "Mine." * 200)
    update_card(client, "hostile", 1)
    assert client.get_model_version("hostile", "1").description.endswith("Mine." * 200)


# --- The alias -------------------------------------------------------------------------------------------------------


def passing(version: int, champion: int | None) -> Decision:
    data = Data(uri="/data/held-out", digest="0" * 64, samples=100)
    check = Check(measure="top1", rival="any", value=0.9, rival_value=0.5, low=0.3, above=0.0)
    return Decision(
        version=version, champion=champion, at="2026-01-01 00:00 UTC", train=None, test=data, margin=0.0,
        checks=(check,), values={"top1": 0.9},
    )  # fmt: skip


def versions(uri: str, name: str, count: int) -> MlflowClient:
    client = MlflowClient(uri)
    client.create_registered_model(name)
    for _ in range(count):
        client.create_model_version(name, "file:///nowhere")
    return client


def test_rollback_goes_back_one_champion_at_a_time_and_skips_deleted_ones(
    uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking, client = TrackingConfig(uri=uri), versions(uri, "stack", 5)
    config = RollbackConfig(name="stack", tracking=tracking)
    client.set_registered_model_alias("stack", CHAMPION, "1")  # by an earlier release: without a history
    for version in (2, 3, 4, 5):
        seen = read_champions("stack", tracking)
        promote("stack", passing(version, seen.current), seen, tracking)
    assert [past.version for past in read_champions("stack", tracking).history] == [1, 2, 3, 4, 5]
    job.rollback(config)
    assert read_champions("stack", tracking).current == 4
    for version in (3, 2):
        client.delete_model_version("stack", str(version))
    job.rollback(config)
    said = capsys.readouterr().out
    assert "version 3 was deleted; it is skipped\nversion 2 was deleted; it is skipped\n" in said
    assert "stack version 1 is @champion again, instead of version 4" in said
    with pytest.raises(UserError, match="stack has no champion before to go back to; promote a version instead"):
        job.rollback(config)
    assert read_champions("stack", tracking).current == 1
    # A forward move after a rollback, and a history that somebody has spoilt.
    seen = read_champions("stack", tracking)
    promote("stack", passing(5, 1), seen, tracking)
    client.set_registered_model_tag("stack", HISTORY_TAG, "{")
    assert read_champions("stack", tracking).history == ()
    with pytest.raises(UserError, match="no registered model 'absent'"):
        job.rollback(RollbackConfig(name="absent", tracking=tracking))


def test_the_history_is_bounded(uri: str) -> None:
    tracking, client = TrackingConfig(uri=uri), versions(uri, "long", 2)
    before = [{"version": 123456, "at": "2026-01-01 00:00 UTC", "forced": False}] * 29
    client.set_registered_model_tag("long", HISTORY_TAG, json.dumps(before))
    for version in (1, 2, 1):
        seen = read_champions("long", tracking)
        promote("long", passing(version, seen.current), seen, tracking)
    text = client.get_registered_model("long").tags[HISTORY_TAG]
    assert [past["version"] for past in json.loads(text)][-4:] == [123456, 1, 2, 1]
    assert len(json.loads(text)) == 30 and len(text) < 5000


def compete(uri: str, name: str, version: int, rounds: int, barrier: Any, results: Any) -> None:
    """In a process: measure against the champion, then promote at the same time as another process."""
    tracking = TrackingConfig(uri=uri)
    for _ in range(rounds):
        seen = read_champions(name, tracking)
        barrier.wait()
        try:
            promote(name, passing(version, seen.current), seen, tracking)
            results.put((version, ""))
        except UserError as error:
            results.put((version, str(error)))
        barrier.wait()


@pytest.mark.slow
def test_of_two_promotions_at_the_same_time_one_wins(uri: str) -> None:
    """Five times, twenty in `make daily`, in two processes, on one MLflow."""
    rounds = 20 if os.environ.get("HYPOTHESIS_PROFILE") == "daily" else 5
    tracking, client = TrackingConfig(uri=uri), versions(uri, "race", 2)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3, timeout=600), context.Queue()
    both = [
        context.Process(target=compete, args=(uri, "race", version, rounds, barrier, results)) for version in (1, 2)
    ]
    for process in both:
        process.start()
    try:
        for number in range(rounds):
            barrier.wait()
            barrier.wait()
            said = dict(results.get(timeout=600) for _ in both)
            champions = read_champions("race", tracking)
            (winner,) = [version for version, error in said.items() if not error]
            loser = 3 - winner
            assert re.fullmatch(
                rf"race version {loser} is not promoted: version {winner} is @champion now, which was not so when it "
                "was measured; run the command again",
                said[loser],
            )
            assert champions.current == winner and champions.history[-1].version == winner
            assert len(champions.history) == number + 1
    finally:
        for process in both:
            process.join(60)
    assert [model.name for model in client.search_registered_models("name LIKE 'race%'")] == ["race"]


def test_a_lock_is_exclusive_and_that_of_a_killed_process_is_taken_over(
    uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(uri)
    check: Callable[[], None]
    with locked(client, "held") as check:
        check()
        with locked(client, "held", stale_seconds=0.5) as other:  # as if the first had been killed
            other()
            with pytest.raises(UserError, match="another process has taken over the promotion of held"):
                check()
        assert "took over the lock of process" in caplog.text
    with locked(client, "n" * 256) as check:
        check()
