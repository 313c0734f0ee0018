"""The model card of a registered version, in Markdown: it is the version's description in MLflow."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from crate_ray.addresses import redact
from crate_ray.tracking.decision import TITLES, Decision
from crate_ray.tracking.registry import COMMIT_TAG, CONFIG_TAG, DATA_TAG, DECISION_TAG, PARAMETERS_TAG, kind_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

_LONGEST = 5000  # characters that MLflow's databases hold
_END = "<!-- What is below this line is yours; crate-ray keeps it. -->"
_RECIPE = {
    "training.steps": "steps",
    "total_steps": "steps of the whole run",
    "training.batch_size": "global batch",
    "optim.lr": "learning rate",
    "optim.weight_decay": "weight decay",
    "recipe": "fine-tuning recipe",
    "model": "starts from",
    "init_from": "starts from",
    "seed": "seed",
}
_ARCHITECTURE = ("depth", "dim", "num_subspaces", "num_heads", "patch_size", "image_size", "channels", "mask_ratio")
_FIGURES = re.compile(r"(validation/|evaluation/|train/loss$)")
_MOST_FIGURES = 20


def update_card(client: MlflowClient, name: str, version: int) -> None:
    """Write a version's card into its description. Text that somebody else has written there stays below it."""
    found = client.get_model_version(name, str(version))
    before = found.description or ""
    own = before.partition(_END)[2] if _END in before else f"\n{before}" if before else ""
    tail = f"\n{_END}{own}"
    card = model_card(client, found)
    if len(card) + len(tail) > _LONGEST:
        card = card[: _LONGEST - len(tail) - 2].rpartition("\n")[0] + "\n…"
    client.update_model_version(name, str(version), card + tail)


def model_card(client: MlflowClient, version: ModelVersion) -> str:
    """The card of a version, from what MLflow knows of it and of its run."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(version.run_id) if version.run_id else None
    except MlflowException:  # it was deleted
        run = None
    config = _config(version)
    sections = [
        f"# {_text(version.name)}, version {version.version}\n\n{_summary(version, config)}",
        "## Data\n\n" + _data(version, run),
        "## Recipe\n\n" + _table(("setting", "value"), _recipe(version, run, config)),
        "## Figures\n\n" + _figures(client, version, run),
        *([f"## Promotion\n\n{_promotion(decision)}"] if (decision := _decision(version)) else []),
        "## Limits\n\n" + _limits(version, config),
        "## Load\n\n" + _load(version),
    ]
    return "\n\n".join(sections) + "\n"


def _decision(version: ModelVersion) -> Decision | None:
    return Decision.parse(version.tags.get(DECISION_TAG))


def _config(version: ModelVersion) -> dict[str, Any]:
    return _object(version.tags.get(CONFIG_TAG))


def _object(text: str | None) -> dict[str, Any]:
    """A JSON object; empty if the text is anything else."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _summary(version: ModelVersion, config: dict[str, Any]) -> str:
    model = _part(config, "model")
    name = {"crate_mae": "CRATE-MAE", "vit_mae": "ViT-MAE"}.get(str(model.get("architecture")), "a masked autoencoder")
    what = "An encoder" if kind_of(version) == "encoder" else "A classifier on an encoder"
    count = version.tags.get(PARAMETERS_TAG, "")
    size = f", {int(count):,} parameters" if count.isdigit() else ""
    return f"{what}: {name}{size}, after {_text(version.tags.get('step', '?'))} steps of training."


def _data(version: ModelVersion, run: Run | None) -> str:
    inputs = run.inputs.dataset_inputs if run and run.inputs else []
    rows = []
    for dataset in (each.dataset for each in inputs):
        profile, source = _object(dataset.profile), _object(dataset.source)
        share = f"{profile['share']:.0%}" if isinstance(profile.get("share"), float) else ""
        rows.append((source.get("uri", dataset.name), profile.get("num_samples", ""), share, dataset.digest))
    table = _table(("training data", "samples", "share", "digest"), rows)
    whole = version.tags.get("dataset")
    return table + (f"\n\nDigest of the training data as a whole: `{_text(whole)}`" if whole else "")


def _recipe(version: ModelVersion, run: Run | None, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "run", version.tags.get("run", "")
    model = _part(config, "model")
    yield "model", ", ".join(f"{key} {model[key]}" for key in _ARCHITECTURE if model.get(key) is not None)
    if classifier := _part(config, "classifier"):
        yield "classes", classifier.get("num_classes")
    params = run.data.params if run else {}
    for key, title in _RECIPE.items():
        if params.get(key, "None") != "None":
            yield title, params[key]
    yield "commit of the code", version.tags.get(COMMIT_TAG, "unknown")


def _figures(client: MlflowClient, version: ModelVersion, run: Run | None) -> str:
    """Figures of the run that were measured at the version's step."""
    step, rows = version.tags.get("step"), []
    found = [name for name in (run.data.metrics if run else ()) if _FIGURES.match(name)]
    for name in sorted(found, key=lambda name: (not name.startswith("validation"), name))[:_MOST_FIGURES]:
        assert run is not None
        points = [p for p in client.get_metric_history(run.info.run_id, name) if str(p.step) == step]
        if points:
            rows.append((name, f"{max(points, key=lambda point: point.timestamp).value:.4g}"))
    if not rows:
        return "None was measured at this step. `crate-ray evaluate` measures accuracy, reconstruction and structure."
    return _table((f"metric at step {step}", "value"), rows)


def _promotion(decision: Decision) -> str:
    if decision.promoted:
        verdict = "promoted" if decision.forced is None else f"promoted by force ({_text(decision.forced)})"
    else:
        verdict = "not promoted"
    rows = [
        (
            TITLES[check.measure],
            f"{check.value:.4g}",
            f"{check.rival_value:.4g} ({check.rival})",
            f"{check.low:+.4f}, needed above {check.above + 0:g}",
            "yes" if check.passed else "no",
        )
        for check in decision.checks
    ]
    headings = ("measure", "this version", "rival", "difference, lower end at 95 %", "passed")
    data = [("test", decision.test)] if decision.train is None else [("train", decision.train), ("test", decision.test)]
    on = _table(
        ("data of the comparison", "address", "samples", "digest"),
        [(title, part.uri, part.samples, part.digest[:16]) for title, part in data],
    )
    notes = "".join(f"\n- {_text(note)}" for note in decision.notes)
    return f"{_text(decision.at)}: {verdict}.\n\n{_table(headings, rows)}\n\n{on}" + (f"\n{notes}" if notes else "")


def _limits(version: ModelVersion, config: dict[str, Any]) -> str:
    model, kind = _part(config, "model"), config.get("kind", "image")
    size = model.get("image_size")
    hw = _text(" × ".join(map(str, size)) if isinstance(size, list) else f"{size} × {size}")
    lines = [
        f"It takes {_text(kind)}s of {hw} pixels; channels: {_text(model.get('channels', '?'))}." if size else "",
        "It was not tested on other data than named here, nor for groups of people.",
        f"Figures of different data cannot be compared; those of the list are of {_text(version.tags[DATA_TAG])}."
        if DATA_TAG in version.tags
        else "It was not compared with another version.",
        "Its features are for classification and search; it was not trained to name classes."
        if kind_of(version) == "encoder"
        else "Its probabilities were not calibrated.",
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def _load(version: ModelVersion) -> str:
    reference = json.dumps(f"models:/{version.name}/{version.version}", ensure_ascii=False)
    return (
        f"```python\nimport crate_ray, mlflow\n\nmodel = crate_ray.load_model({reference})  # a torch module\n"
        f"served = mlflow.pyfunc.load_model({reference})  # images to numbers\n```"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[_text(cell) for cell in row] for row in rows]
    if not lines:
        return "Not recorded."
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(headings), ["---"] * len(headings), *lines])


def _text(value: object) -> str:
    """A value from outside as text in Markdown: one line, without its signs and HTML."""
    line = redact(" ".join(str(value).split()))[:300]
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", "".join(c for c in line if c.isprintable()))
