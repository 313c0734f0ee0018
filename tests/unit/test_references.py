"""Model references: what each form means, and that every form loads the model it names, wherever a model is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

import crate_ray
from crate_ray.config import (
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    PrepareConfig,
    PretrainConfig,
    RegisterConfig,
    S3Config,
    Settings,
    TrackingConfig,
)
from crate_ray.data.prepare.builtin import digits_source
from crate_ray.data.prepare.packing import pack
from crate_ray.errors import UserError
from crate_ray.evaluation.job import evaluate_model
from crate_ray.models import CrateMAE, export_published
from crate_ray.models.exported import ModelDescription, export_model, load_exported
from crate_ray.runs.commits import BEST, committed
from crate_ray.runs.export import export_run
from crate_ray.runs.mlflow_lookup import find_run
from crate_ray.runs.quality import Quality, write_quality
from crate_ray.runs.record import write_record
from crate_ray.runs.references import FORMS, Reference, fetch, load_encoder, parse
from crate_ray.storage.local import LocalStorage
from crate_ray.tracking.registry import list_versions, register
from crate_ray.tracking.run_tracker import RunTracker
from tests.checkpoints import save
from tests.unit.test_checkpoint import RECORD, Trainer

S3 = S3Config()
ID = "0123456789abcdef0123456789abcdef"
STEP = "attempt-002/step-00000500-ab12cd"


@pytest.mark.parametrize(
    ("text", "kind", "path", "checkpoint"),
    [
        ("runs/mine", "folder", "runs/mine", None),
        ("runs/mine/", "folder", "runs/mine/", None),
        ("s3://bucket/runs/mine", "folder", "s3://bucket/runs/mine", None),
        ("runs/mine@500", "folder", "runs/mine", 500),
        ("s3://bucket/runs/mine@best", "folder", "s3://bucket/runs/mine", BEST),
        ("runs/a@home/mine@7", "folder", "runs/a@home/mine", 7),
        ("runs/a@home", "folder", "runs/a@home", None),
        (f"runs/mine/{STEP}", "folder", "runs/mine", STEP),
        (f"s3://bucket/runs/mine/{STEP}/", "folder", "s3://bucket/runs/mine", STEP),
        (f"/mine/{STEP}", "folder", "/mine", STEP),
        (f"/{STEP}", "folder", "/", STEP),
        (STEP, "folder", ".", STEP),
        ("runs/mine/model", "folder", "runs/mine/model", None),
        ("models:/crate-mae@champion", "registered", "models:/crate-mae@champion", None),
        ("models:/crate-mae@best", "registered", "models:/crate-mae@best", None),
        ("models:/crate-mae/3", "registered", "models:/crate-mae/3", None),
        (f"runs:/{ID}", "mlflow_run", ID, None),
        (f"runs:/{ID}@best", "mlflow_run", ID, BEST),
        (f"runs:/{ID}@40", "mlflow_run", ID, 40),
        (ID, "mlflow_run", ID, None),
        (f"{ID}@best", "mlflow_run", ID, BEST),
        (f"./{ID}", "folder", f"./{ID}", None),
        *((f"weights/mae{suffix}", "published", f"weights/mae{suffix}", None)
          for suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors")),
        ("s3://bucket/mae.pth", "published", "s3://bucket/mae.pth", None),
        ("published:weights/mae", "published", "weights/mae", None),
        ("published:s3://bucket/mae.pth", "published", "s3://bucket/mae.pth", None),
        ("runs/version.pt/", "folder", "runs/version.pt/", None),
        ("runs/v1.5", "folder", "runs/v1.5", None),
    ],
)  # fmt: skip
def test_what_each_form_means(text: str, kind: str, path: str, checkpoint: object) -> None:
    reference = parse(text)
    assert (reference.text, reference.kind, reference.path, reference.checkpoint) == (text, kind, path, checkpoint)
    assert isinstance(reference, Reference)


def test_no_reference_is_no_model() -> None:
    for text in ("", "  "):
        with pytest.raises(UserError, match="the model reference is empty; give a run's folder"):
            parse(text)


class Store:
    """A run with checkpoints of steps 2, 4 and 6, of which 4 is the best, in every place where a model can be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracking = TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}", experiment="references")
        self.run = LocalStorage(folder / "runs" / "mine")
        write_record(self.run, RECORD)
        self.models = {}
        for step, loss in ((2, 0.5), (4, 0.25), (6, 0.75)):
            trainer = Trainer()
            trainer.train(step)
            save(self.run, trainer.tensors(), RECORD, step, folder / "scratch", "-ab12", validation_loss=loss)
            self.models[step] = trainer.model.state_dict()
        torch.manual_seed(3)
        published = CrateMAE.from_preset("tiny", image_size=32)
        self.models[0] = published.state_dict()
        torch.save({"model": export_published(published)}, folder / "mae.pth")
        export_run(self.run, folder / "model", 2)
        params = {"storage": str(folder / "runs"), "name": "mine"}
        tracker = RunTracker(self.tracking, RECORD.run_key, "mine", params, {})
        assert tracker.finish("FINISHED")
        self.run_id = tracker.run_id
        register(f"{self.run.uri}@best", "mine", self.tracking, S3)

    def step(self, text: str) -> int:
        """Step of the model behind a reference, by its weights."""
        model, description = load_encoder(text, self.tracking, S3)
        found = model.state_dict()
        for step, weights in self.models.items():
            if found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights):
                assert description.step == step and not model.training
                return step
        raise AssertionError(f"{text} is none of the models")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("store")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return Store(folder)


FORM_STEPS: dict[str, tuple[Callable[[Store], str], int]] = {
    "run": (lambda s: s.run.uri, 6),
    "step": (lambda s: f"{s.run.uri}@2", 2),
    "best": (lambda s: f"{s.run.uri}@best", 4),
    "checkpoint": (lambda s: f"{s.run.uri}/attempt-001/step-00000004-ab12", 4),
    "exported": (lambda s: str(s.folder / "model"), 2),
    "version": (lambda s: "models:/mine/1", 4),
    "mlflow": (lambda s: f"runs:/{s.run_id}", 6),
    "mlflow_best": (lambda s: f"{s.run_id}@best", 4),
    "published": (lambda s: str(s.folder / "mae.pth"), 0),
}


@pytest.mark.parametrize("form", FORM_STEPS)
def test_each_form_loads_the_model_that_it_names(form: str, store: Store, tmp_path: Path) -> None:
    reference, step = FORM_STEPS[form]
    text = reference(store)
    assert store.step(text) == step
    description = fetch(text, tmp_path / "fetched", store.tracking, S3)
    assert load_exported(tmp_path / "fetched")[1] == description and description.step == step
    loaded = crate_ray.load_model(text, tracking=store.tracking)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in store.models[step].items())


def test_the_best_checkpoint_is_the_valid_one_of_the_lowest_loss(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.run.root, tmp_path / "run")
    run = LocalStorage(tmp_path / "run")
    weights = next((tmp_path / "run/attempt-001/step-00000004-ab12").glob("model-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert store.step(f"{run.uri}@best") == 2  # with a warning
    for commit in committed(run):
        path = tmp_path / "run" / "commits" / f"{commit.directory.rpartition('/')[2]}.json"
        path.write_text(commit.model_copy(update={"validation_loss": None}).model_dump_json())
    with pytest.raises(
        UserError, match=r"no valid checkpoint with a validation loss or accuracy, .* \(it has 2, 4, 6\)"
    ):
        store.step(f"{run.uri}@best")
    for step, accuracy in ((2, 0.2), (6, 0.1), (8, 0.9)):  # there is no checkpoint of step 8 any more
        write_quality(run, step, Quality(values={"knn": accuracy}))
    with pytest.raises(UserError, match="no valid checkpoint"):
        store.step(f"{run.uri}@best")
    write_quality(run, 10, Quality(values={"knn": 0.0}, best_by="knn"))
    assert store.step(f"{run.uri}@best") == 2
    run.write("quality/step-00000012.json", b"{")  # ignored, with a warning
    assert store.step(f"{run.uri}@best") == 2
    assert store.step(run.uri) == 6


def test_a_folder_with_the_name_of_a_file_is_a_folder(store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.run.root, tmp_path / "run.pt")
    assert store.step(str(tmp_path / "run.pt")) == 6 and store.step(f"{tmp_path}/run.pt@2") == 2


def test_what_does_not_exist_is_one_sentence(store: Store, tmp_path: Path) -> None:
    def error(text: str, tracking: TrackingConfig = store.tracking) -> str:
        with pytest.raises(UserError) as caught:
            load_encoder(text, tracking, S3)
        return str(caught.value)

    assert error(str(tmp_path)) == f"{tmp_path} holds neither a run nor an exported model; give {FORMS}"
    assert "neither a run nor an exported model" in error(f"{tmp_path}/{STEP}")
    assert "holds no valid checkpoint of step 5; it has those of the steps 2, 4, 6" in error(f"{store.run.uri}@5")
    assert f"holds no valid checkpoint {STEP}" in error(f"{store.run.uri}/{STEP}")
    assert "holds an exported model, which has no checkpoints" in error(f"{store.folder / 'model'}@best")
    assert f"cannot find the run {ID!r}" in error(ID)
    assert "cannot load models:/mine@champion" in error("models:/mine@champion")
    # Looking up makes no database.
    absent = TrackingConfig(uri=f"sqlite:///{tmp_path / 'absent.db'}")
    for text in ("models:/mine/1", ID):
        assert f"there is no MLflow database {tmp_path / 'absent.db'}" in error(text, absent)
    assert not (tmp_path / "absent.db").exists()


def untracked() -> tuple[dict[str, torch.Tensor], ModelDescription]:
    """A model whose run MLflow does not know."""
    model = CrateMAE.from_preset("tiny", image_size=32)
    description = ModelDescription(model=model.config, mean=(0.5,) * 3, std=(0.2,) * 3, kind="image", run_key="9" * 32)
    return model.state_dict(), description


def test_a_version_says_which_checkpoint_it_is(store: Store) -> None:
    (version,) = list_versions("mine", store.tracking)
    assert (version.tags["step"], version.tags["run"]) == ("4", store.run.uri)
    export_model(store.folder / "unknown", *untracked())
    with pytest.raises(UserError, match=r"has no record of the run that trained \S+unknown"):
        register(str(store.folder / "unknown"), "other", store.tracking, S3)


@pytest.mark.slow
def test_an_evaluation_says_which_step_it_measures(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = LocalStorage(tmp_path / "data")
    pack(digits_source("test"), data, PrepareConfig(source="digits", output=data.uri))
    config = EvaluateConfig(model=f"{store.run.uri}@best", data=data.uri, max_images=4, tracking=store.tracking)
    evaluate_model(config)
    assert f"trained model: {store.run.uri}@best, step 4\n" in capsys.readouterr().out
    assert store.run.exists("evaluation/step-00000004/report.html")
    client = MlflowClient(store.tracking.uri)
    assert find_run(client, RECORD.run_key) == store.run_id
    (dataset,) = client.list_artifacts(store.run_id, "evaluation")
    (step,) = client.list_artifacts(store.run_id, dataset.path)
    assert step.path.endswith("/step-00000004")
    assert {Path(f.path).name for f in client.list_artifacts(store.run_id, step.path)} == {
        "report.html", "report.json",
    }  # fmt: skip
    # One on other data, whose folder has the same name, stays beside it.
    other = LocalStorage(tmp_path / "other" / "data")
    pack(digits_source("train"), other, PrepareConfig(source="digits", output=other.uri))
    before = client.get_run(store.run_id).data.metrics
    evaluate_model(config.model_copy(update={"data": other.uri}))
    after = client.get_run(store.run_id).data.metrics
    assert before.items() <= after.items() and len(after) == 2 * len(before)
    assert {name.split("/")[0] for name in after} == {"evaluation"}
    assert len(client.list_artifacts(store.run_id, "evaluation")) == 2


def test_listing_the_registry_imports_neither_torch_nor_ray(store: Store) -> None:
    program = (
        "import sys\nfrom crate_ray.jobs.register import show\n"
        "from crate_ray.config import ListConfig, TrackingConfig\n"
        f"show(ListConfig(name='mine', tracking=TrackingConfig(uri={store.tracking.uri!r})))\n"
        "assert not {'torch', 'ray', 'simplejpeg', 'boto3'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_setting_that_names_a_model_says_the_forms_in_the_same_words() -> None:
    settings: list[tuple[type[Settings], str]] = [
        (PretrainConfig, "init_from"), (FinetuneConfig, "model"), (EvaluateConfig, "model"), (EmbedConfig, "model"),
        (RegisterConfig, "run"), (ExportConfig, "model"),
    ]  # fmt: skip
    for config, name in settings:
        assert FORMS in " ".join((config.model_fields[name].description or "").split()), config
