"""The order in which MLflow shows the metrics of a run: groups by the part before the last slash, alphabetically."""

from __future__ import annotations

from crate_ray.runs import metrics


def test_the_loss_comes_first_and_the_layers_are_one_group_at_the_end() -> None:
    names = [value for name, value in vars(metrics).items() if name.isupper() and not name.startswith("_")]
    names += [metrics.bad_samples("no_image"), metrics.layer_measure("gini", 1), metrics.layer_measure("gini", 12)]
    shown = sorted(names, key=lambda name: name.rsplit("/", 1))
    assert shown[0] == metrics.LOSS and shown.index(metrics.LR) == 1
    groups = [name.rsplit("/", 1)[0] for name in shown]
    assert groups[-2:] == ["validation_layers"] * 2 and groups.count("validation_layers") == 2
    assert metrics.bad_samples_cause(metrics.bad_samples("no_image")) == "no_image"
    assert metrics.bad_samples_cause(metrics.LOSS) is None
