"""What a YAML file and a command line mean: YAML 1.2, nothing twice, finite numbers, folders whose names hold '='."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from crate_ray.cli import parse_config
from crate_ray.config import BenchmarkDataConfig, CompareConfig, PretrainConfig, ProbeConfig, Settings, SweepConfig
from crate_ray.config.examples import example_configs
from crate_ray.config.options import parse_options
from crate_ray.config.values import dotted_names, kebab, load_yaml, models_in
from crate_ray.config.yaml_text import dump_yaml, parse_yaml
from crate_ray.errors import UserError
from crate_ray.jobs.configs import JOBS

ROOT = Path(__file__).parents[2]
NEEDED = ["--data.train", "x", "--training.steps", "2"]


def pretrain(folder: Path, text: str | bytes, *options: str) -> PretrainConfig:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_config(PretrainConfig, ["--config", str(path), *options])


TEXTS = [
    "off", "on", "yes", "no", "y", "N", "Off", "YES", "1:30", "12:30:45", "2024-01-01", "2001-12-14t21:59:43Z", "1_000",
    "0b11", "0o8", "1e", "e5", ".", "+", "..", "1.2.3", "0x", "-0x1", "inf", "nan", "None", "none", "=", "~x",
]  # fmt: skip
VALUES = {
    "true": True, "False": False, "null": None, "~": None, "": None, "1e-4": 1e-4, "1E3": 1e3, "5e+2": 500.0,
    "-1.e2": -100, ".5": 0.5, "007": 7, "-12": -12, "+3": 3, "0o17": 15, "0x1F": 31, "-.inf": -math.inf,
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_plain_texts_stay_texts(text: str) -> None:
    assert parse_yaml(f"a: {text}\n") == {"a": text} and parse_yaml(f"[{text}]") == [text]


@pytest.mark.parametrize("text", VALUES)
def test_numbers_truth_and_null_follow_yaml_1_2(text: str) -> None:
    found = parse_yaml(f"a: {text}\n")["a"]
    assert found == VALUES[text] and type(found) in (type(VALUES[text]), float)


scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False)
texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Z"]), max_size=12)
texts |= st.sampled_from([*TEXTS, *VALUES])


@given(
    st.recursive(scalars | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
)
def test_what_is_written_is_what_is_read_with_yaml_1_1_too(value: Any) -> None:
    assert parse_yaml(dump_yaml(value)) == value == yaml.safe_load(dump_yaml(value))


def test_off_is_the_documented_word_and_still_a_truth_value(tmp_path: Path) -> None:
    config = pretrain(tmp_path, "data: {train: x, flip: off}\ntraining: {steps: 2, compile: off}\nname: no\n")
    assert (config.training.compile, config.data.flip, config.name) == ("off", False, "no")
    config = pretrain(
        tmp_path, "data: {train: 2024-01-01, shuffle: yes}\ntraining: {steps: 1_000}\noptim: {lr: 1e-4}\n"
    )
    assert (config.data.train, config.data.shuffle) == ("2024-01-01", True)
    assert (config.training.steps, config.optim.lr) == (1000, 1e-4)
    with pytest.raises(UserError, match=r"^setting 'training.steps' is '1:30': input should be a valid integer"):
        pretrain(tmp_path, "data: {train: x}\ntraining: {steps: 1:30}\n")
    with pytest.raises(UserError, match=r"^setting 'name' is 2024: input should be a valid string; put it in quotes$"):
        pretrain(tmp_path, "name: 2024\n", *NEEDED)


TWICE = {
    "seed: 1\ndata: {train: x}\nseed: 2\n": "line 3: 'seed' is given twice, first in line 1; give it once$",
    "optim: {lr: 1}\ntraining: {}\noptim: {eps: 1}\n": "line 3: 'optim' is given twice, first in line 1",
    "data:\n  train: x\n  flip: true\n  train: y\n": "line 4: 'train' is given twice, first in line 2",
    "model: {dim: 8, \"dim\": 16}\n": "line 1: 'dim' is given twice",
    "scaling:\n  label_selector:\n    a: b\n    a: c\n": "line 4: 'a' is given twice",
    "data: {train: {1: 1, 0x1: 2}}\n": "line 1: 1 is given twice",
    "a: &a {x: 1}\nb: {<<: *a, c: 1, c: 2}\n": "line 2: 'c' is given twice",
    "training.steps: 2\ntraining: {steps: 3}\n": "run.yaml: setting 'training.steps' is given twice; give it once$",
    "training: {steps: 3}\ntraining.steps: 2\n": "run.yaml: setting 'training.steps' is given twice",
    "data.train: x\ndata.train: y\n": "line 2: 'data.train' is given twice",
}  # fmt: skip


@pytest.mark.parametrize("text", TWICE)
def test_a_key_twice_is_an_error_at_every_depth(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=TWICE[text]):
        pretrain(tmp_path, text, *NEEDED)


def test_a_merged_mapping_may_be_overridden(tmp_path: Path) -> None:
    text = "a: &a {<<: &z {x: 1, y: 1}, x: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, *z]}\n"
    (tmp_path / "a.yaml").write_text(text)
    assert load_yaml(tmp_path / "a.yaml") == {"a": {"x": 2, "y": 1}, "b": {"x": 2, "y": 3}, "c": {"x": 2, "y": 1}}


def test_dotted_names_are_taken_in_yaml(tmp_path: Path) -> None:
    text = (
        "data.train: x\ntraining.steps: 2\ntraining: {batch_size: 8}\nmodel.architecture: vit_mae\nmodel.num_heads: 6\n"
    )
    nested = "data: {train: x}\ntraining: {steps: 2, batch_size: 8}\nmodel: {architecture: vit_mae, num_heads: 6}\n"
    assert pretrain(tmp_path, text) == pretrain(tmp_path, nested)
    base = tmp_path / "base.yaml"
    base.write_text(text)
    path = tmp_path / "sweep.yaml"
    path.write_text("base: base.yaml\nprobe.train: a\nprobe.test: b\nsearch: {optim.lr: {uniform: [1, 2]}}\n")
    sweep = parse_config(SweepConfig, ["--config", str(path), "--settings", "{training.steps: 5}"])
    assert sweep.probe == ProbeConfig(train="a", test="b") and [*sweep.search] == ["optim.lr"]
    assert sweep.settings == {"training.steps": 5}
    for wrong, words in (
        ("trainng.steps: 2\n", "there is no setting 'trainng.steps', did you mean 'training.steps'\\?$"),
        ("training: {steps.x: 2}\n", "there is no setting 'training.steps.x'"),
        ("steps: 2\n", "there is no setting 'steps', did you mean 'training.steps'\\?$"),
        ("training.: 2\n", "there is no setting 'training.'"),
        ("'.': 2\n", "there is no setting '.'"),
        ("model.num_heads: 2\n", "setting 'model.num_heads' does not belong to crate_mae"),
        ("3: 2\n", "there is no setting '3'"),
        ("no: 2\n", "there is no setting 'no'"),
        ("training.steps.more: 2\n", "there is no setting 'training.steps.more'"),
    ):
        with pytest.raises(UserError, match=words):
            pretrain(tmp_path, wrong, "--data.train", "x")


def test_an_empty_section_is_no_setting(tmp_path: Path) -> None:
    text = "optim:\n  # lr: 1e-3\ntraining: {steps: 2}\ndata: {train: x}\n"
    assert pretrain(tmp_path, text) == parse_config(PretrainConfig, NEEDED)


def test_files_may_come_from_any_editor(tmp_path: Path) -> None:
    text = "name: größe\ndata: {train: é}\ntraining: {steps: 2}\n"
    expected = pretrain(tmp_path, text)
    for data in (b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode(), text.encode("utf-16")):
        assert pretrain(tmp_path, data) == expected
    for wrong, words in (
        (b"training:\n\tsteps: 2\n", r"run\.yaml is not valid YAML: line 2, column 1: .*'\\t'.*; indent with spaces$"),
        ("name: größe\n".encode("latin-1"), "it is not UTF-8 text .*; save it as UTF-8$"),
        (b"a: \x07", "it holds the control character 0x07"),
        (b"a: 1\n---\nb: 2\n", "line 2, column 1: expected a single document in the stream but found another document"),
        (b"training: {steps: 2\n", "line 2, column 1: expected ',' or '}'"),
    ):
        with pytest.raises(UserError, match=words) as error:
            pretrain(tmp_path, wrong)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii"}])
def test_files_are_utf_8_in_every_locale(tmp_path: Path, locale: dict[str, str]) -> None:
    (tmp_path / "run.yaml").write_text("name: größe\ndata: {train: é}\ntraining: {steps: 2}\n", encoding="utf-8")
    code = "from crate_ray.cli import parse_config; from crate_ray.config import PretrainConfig\n"
    code += "c = parse_config(PretrainConfig, ['--config', 'run.yaml']); print(ascii((c.name, c.data.train)))\n"
    code += "from crate_ray.config.examples import example_configs, summary\n"
    code += "print(len([*map(summary, example_configs())]))"
    environment = {n: v for n, v in os.environ.items() if n not in ("LANG", "PYTHONUTF8")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment | locale, capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout == f"('gr\\xf6\\xdfe', '\\xe9')\n{len(example_configs())}\n"


def numbers(config_class: type[BaseModel], prefix: str = "") -> dict[str, int]:
    """Numbers in each setting that takes one, by name; 1 for a single one."""
    found: dict[str, int] = {}
    for python_name, field in config_class.model_fields.items():
        text, name = str(field.annotation), prefix + (field.alias or python_name)
        for group in models_in(field.annotation):
            found |= numbers(group, f"{name}.")
        if re.search(r"\bfloat\b", text) and "dict" not in text:
            found[name] = 2 if "tuple" in text else 1
    return found


@pytest.mark.parametrize("config_class", [c for classes in JOBS.values() for c in classes])
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_every_number_is_finite(tmp_path: Path, config_class: type[Settings], value: str) -> None:
    for name, count in numbers(config_class).items():
        (tmp_path / "a.yaml").write_text(f"{name}: {value if count == 1 else [*[value] * count]}\n".replace("'", ""))
        others = ["--model.architecture=vit_mae", "--encoder.architecture=vit_mae"] if "mlp_ratio" in name else []
        others = [option for option in others if name.partition(".")[0] in option]
        for arguments in (["--config", str(tmp_path / "a.yaml")], [f"--{name}", ",".join([value.strip(".")] * count)]):
            with pytest.raises(UserError, match=f"'{name}' is .*(finite|greater|less|valid number)"):
                parse_config(config_class, [*others, *arguments])


def test_a_standard_deviation_is_positive(tmp_path: Path) -> None:
    for std in ("0,1,1", "1,-1,1", "1,0.0,1"):
        with pytest.raises(UserError, match=r"setting 'data.std' is '.*': input should be greater than 0"):
            parse_config(PretrainConfig, [*NEEDED, "--data.std", std])
    for share in ("nan", "inf", "0", "-1"):
        with pytest.raises(UserError, match="setting 'data.train' is"):
            parse_config(PretrainConfig, ["--training.steps", "1", "--data.train", f"a={share},b=1"])


@pytest.mark.parametrize("config_class", [c for classes in JOBS.values() for c in classes])
def test_an_option_twice_says_so(config_class: type[Settings]) -> None:
    for name in {*dotted_names(config_class), *config_class.short_forms, "config"}:
        for second in (f"--{name}", f"--{kebab(name)}"):
            with pytest.raises(UserError) as error:
                parse_options(config_class, [f"--{name}={{}}" if second else "", second, "{}"])
            assert f"--{kebab(name)} is given twice; give " in str(error.value)


def test_a_group_and_a_setting_in_it_are_merged_but_not_twice() -> None:
    config = parse_config(PretrainConfig, [*NEEDED, "--optim", '{"lr": 1e-3}', "--optim.eps", "1e-6"])
    assert (config.optim.lr, config.optim.eps) == (1e-3, 1e-6)
    with pytest.raises(UserError, match=r"^command line: setting 'training.steps' is given twice; give it once$"):
        parse_config(PretrainConfig, [*NEEDED, "--training", "{steps: 2}"])
    with pytest.raises(UserError, match=r"--seeds is given twice; give all values at once, as --seeds FIRST,SECOND$"):
        parse_config(CompareConfig, ["--seeds", "1", "--seeds", "2"])


ONE_FOLDER = [
    "/data/dt=2024-01-01", "s3://b/dt=20240101", "s3://b/year=2024/month=05", "a=3", "x=1/part", "/d/Smith, John",
    "a,b", "s3://b/run=1e-3", "s3://b/k==1",
]  # fmt: skip
MIXTURES = {
    "a=3,b=1": {"a": 3, "b": 1},
    "s3://data/photos=3, s3://data/drawings=.5": {"s3://data/photos": 3, "s3://data/drawings": 0.5},
    "s3://b/dt=20240101=3,s3://b/dt=20240102=1": {"s3://b/dt=20240101": 3, "s3://b/dt=20240102": 1},
    "s3://b/year=2024/month=05=3,c=1e-1": {"s3://b/year=2024/month=05": 3, "c": 0.1},
    "{s3://b/year=2024/month=05: 2, 's3://b/a,b': 1}": {"s3://b/year=2024/month=05": 2, "s3://b/a,b": 1},
    '{"a=1":2}': {"a=1": 2},
}
NEITHER = [
    "s3://b/dt=20240101,s3://b/dt=20240102",
    "s3://b/y=1/m=05,s3://b/y=2/m=06",
    "a=3,b",
    "a=3,b=x",
    "=1,b=2",
    "a=1,",
]


@pytest.mark.parametrize("option", ["--data.train={}", "--data.train {}"])
def test_a_path_with_an_equals_sign_is_one_folder(option: str) -> None:
    def train(text: str) -> Any:
        arguments = [part.format(text) for part in option.split(" ")]
        return parse_config(PretrainConfig, ["--training.steps", "1", *arguments]).data.train

    for path in ONE_FOLDER:
        assert train(path) == path
    for text, shares in MIXTURES.items():
        assert train(text) == shares
    for text in NEITHER:
        with pytest.raises(
            UserError, match=r"--data\.train '.*' may be one folder or several with shares; give it such as"
        ):
            train(text)


def test_other_settings_take_paths_with_an_equals_sign_as_they_are() -> None:
    for path in [*ONE_FOLDER, *NEITHER]:
        arguments = [*NEEDED, "--storage", path, f"--init-from={path}", "--data.cache-dir", path]
        config = parse_config(PretrainConfig, arguments)
        assert (config.storage, config.init_from, config.data.cache_dir) == (path, path, path)
    named = parse_config(BenchmarkDataConfig, ["--data", "s3://b/dt=20240101,day=/data/dt=2024-01-01,/x=1"])
    assert named.datasets == {
        "s3://b/dt=20240101": "s3://b/dt=20240101", "day": "/data/dt=2024-01-01", "/x=1": "/x=1",
    }  # fmt: skip


def test_mappings_on_the_command_line() -> None:
    selector = ["--scaling.label-selector", "ray.io/zone=a=b, disk=ssd"]
    assert parse_config(PretrainConfig, [*NEEDED, *selector]).scaling.label_selector == {
        "ray.io/zone": "a=b",
        "disk": "ssd",
    }
    for text, words in (
        ("a", "'a' is not NAME=VALUE"),
        ("a=1,a=2", "'a' is given twice"),
        ("zone=in(a,b)", "'b\\)' is"),
    ):
        with pytest.raises(UserError, match=f"--scaling.label-selector: {words}"):
            parse_config(PretrainConfig, [*NEEDED, "--scaling.label-selector", text])


def test_options_that_a_shell_or_an_editor_has_changed() -> None:
    with pytest.raises(UserError, match=r"^--storage is empty; give a value, or leave the option out$"):
        parse_config(PretrainConfig, [*NEEDED, "--storage", ""])
    with pytest.raises(UserError, match=r"^there is no setting –training.steps, did you mean --training.steps\?$"):
        parse_config(PretrainConfig, ["--data.train", "x", "–training.steps", "2"])
    assert parse_config(PretrainConfig, [*NEEDED, "--scaling.max-failures", "-1"]).scaling.max_failures == -1
    assert parse_config(PretrainConfig, [*NEEDED, "--data.mean", "-1e-3,2,-.5"]).data.mean == (-1e-3, 2, -0.5)


def test_many_problems_are_counted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="; and 490 more problems$") as error:
        pretrain(tmp_path, "".join(f"name{i}: 1\n" for i in range(500)), *NEEDED)
    assert len(str(error.value)) < 1500
