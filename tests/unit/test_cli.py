"""From command line and YAML to settings: what wins, what is refused, and in which words. Every shipped config parses,
and --help knows every setting."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from crate_ray.cli import dotted_names, nested, parse_config, run_job
from crate_ray.config import (
    BenchmarkDataConfig,
    BenchmarkOrderConfig,
    BenchmarkScalingConfig,
    BenchmarkTrainConfig,
    CompareConfig,
    CrateMAEConfig,
    EvaluateConfig,
    FinetuneConfig,
    PrepareConfig,
    PretrainConfig,
    Settings,
    SweepConfig,
    ViTMAEConfig,
)
from crate_ray.errors import UserError

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
BASE = "--data.train shards --training.steps 5"


def pretrain(line: str) -> PretrainConfig:
    return parse_config(PretrainConfig, shlex.split(line))


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "seed: 3\n"
        "model: {architecture: crate_mae, image_size: [32, 64], patch_size: 8, mask_ratio: 0.5}\n"
        "data: {train: from-yaml, mean: [0.1, 0.2, 0.3], flip: false}\n"
        "training: {epochs: 2, batch_size: 64}\n"
        "tracking: {picture_every: 7}\n"
        "optim: {lr: 2e-3}\n"
    )
    overrides = (
        "--data.train from-line --data.crop_scale 0.5,1 --training.epochs null --training.steps=9 "
        "--tracking.picture_every null --model.image_size 64,32 --data.flip true --optim.betas 0.8,0.9"
    )
    config = pretrain(f"--config {path} {overrides}")
    assert (config.seed, config.data.train, config.data.flip) == (3, "from-line", True)
    assert (config.training.steps, config.training.epochs, config.training.batch_size) == (9, None, 64)
    assert config.tracking.picture_every is None
    assert isinstance(config.model, CrateMAEConfig)
    assert (config.model.image_hw, config.model.mask_ratio, config.model.grid_hw) == ((64, 32), 0.5, (8, 4))
    assert (config.data.mean, config.data.crop_scale) == ((0.1, 0.2, 0.3), (0.5, 1.0))
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (2e-3, (0.8, 0.9), 1e-8)
    # The place of --config in the line does not matter, nor does a file that holds nothing.
    assert pretrain(f"{overrides} --config={path}") == config
    path.write_text("# nothing yet\n")
    assert pretrain(f"{BASE} --config {path}") == pretrain(BASE)


def test_the_architecture_chooses_the_settings_of_the_model(tmp_path: Path) -> None:
    vit = pretrain(f"{BASE} --model.architecture vit_mae --model.preset base-matched --model.depth 3").model
    assert isinstance(vit, ViTMAEConfig)
    assert (vit.dim, vit.depth, vit.num_heads, vit.decoder_depth) == (384, 3, 6, 3)
    crate = pretrain(f"{BASE} --model.preset small --model.num_subspaces 9").model
    assert isinstance(crate, CrateMAEConfig)
    assert (crate.dim, crate.num_subspaces, crate.subspace_dim) == (576, 9, 64)
    small = pretrain(f"{BASE} --model.dim 48 --model.num_subspaces 3").model
    assert isinstance(small, CrateMAEConfig) and small.subspace_dim == 16
    path = tmp_path / "vit.yaml"
    path.write_text("model: {architecture: vit_mae, num_heads: 8}")
    model = pretrain(f"{BASE} --config {path} --model.image_size 32").model
    assert isinstance(model, ViTMAEConfig)
    assert (model.num_heads, model.image_hw) == (8, (32, 32))


WRONG_LINES = {
    f"{BASE} --training.step 7": "there is no setting 'training.step', did you mean 'training.steps'?",
    f"{BASE} --batch_size 7": "there is no setting 'batch_size', did you mean 'training.batch_size'?",
    f"{BASE} --zzzz 7": "there is no setting 'zzzz'; --help lists them all",
    f"{BASE} 7": "there is no setting '7'; --help lists them all",
    f"{BASE} --training.batch_size": "argument --training.batch_size: expected one argument",
    f"{BASE} --model.architecture vit_mae --model.num_subspaces 3": (
        "setting 'model.num_subspaces' does not belong to vit_mae"
    ),
    f"{BASE} --model.num_heads 3": "setting 'model.num_heads' does not belong to crate_mae",
    f"{BASE} --model.architecture vit": (
        "setting 'model.architecture' is 'vit': input should be 'vit_mae' or 'crate_mae'"
    ),
    f"{BASE} --model.preset huge": (
        "setting 'model.preset' is 'huge': input should be 'tiny', 'small', 'base' or 'large'"
    ),
    "--training.steps 5": "setting 'data.train' is required; give --data.train or put it into the --config file",
    "--data.train x": "training: set either steps or epochs, and not both",
    f"{BASE} --training.epochs 2": "training: set either steps or epochs, and not both",
    f"{BASE} --training.batch_size many": (
        "setting 'training.batch_size' is 'many': input should be a valid integer, unable to parse string as an integer"
    ),
    f"{BASE} --training.batch_size 0": "setting 'training.batch_size' is '0': input should be greater than 0",
    f"{BASE} --seed -1 --data.flip maybe": (
        "setting 'seed' is '-1': input should be greater than or equal to 0; "
        "setting 'data.flip' is 'maybe': input should be a valid boolean, unable to interpret input"
    ),
    f"{BASE} --data.crop_scale 0.5": "setting 'data.crop_scale' has too few values; give 2",
    f"{BASE} --data.crop_scale 0.5,2": "setting 'data.crop_scale' is 2: input should be less than or equal to 1",
    f"{BASE} --data.crop_scale 1,0.5": "data: crop_scale is [1.0, 0.5]; give the smaller number first",
    f"{BASE} --data.crop_ratio 0,1": "data: crop_ratio is [0.0, 1.0]; aspect ratios are positive",
    f"{BASE} --model.image_size 33": (
        "model: image height 33 is not divisible by patch height 16; use an image size of 32 or 48"
    ),
    f"{BASE} --model.image_size 32,8": (
        "model: image width 8 is not divisible by patch width 16; use an image size of 16"
    ),
    f"{BASE} --model.dim 64": "model: dim 64 is not divisible by num_subspaces 12; set subspace_dim explicitly",
    f"{BASE} --model.mask_ratio 0.999": "model: mask_ratio 0.999 leaves none of the 196 patches visible; lower it",
    f"{BASE} --name a/b": "name: run name 'a/b' may hold letters, digits, '-', '_' and '.' only",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_command_line_ends_in_one_sentence(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_job(PretrainConfig, lambda config: None, shlex.split(line))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {WRONG_LINES[line]}\n")


WRONG_FILES: dict[bytes, str] = {
    b"training: {stepz: 3}": r"there is no setting 'training.stepz', did you mean 'training.steps'\?$",
    b"trainng: {steps: 3}": r"there is no setting 'trainng', did you mean 'training'\?$",
    b"model: {imagesize: 3}": r"there is no setting 'model.imagesize', did you mean 'model.image_size'\?$",
    b"model: {num_heads: 3}": r"setting 'model.num_heads' does not belong to crate_mae$",
    b"model: [3]": r"setting 'model' is \[3\]: input should be a valid dictionary",
    b"name: {a: 3}": r"setting 'name' is {'a': 3}: input should be a valid string$",
    b"training: [": r"run\.yaml is not valid YAML: while parsing .* line 1, column 12: ",
    b"- 3": r"run\.yaml holds a list, not settings by name$",
    b"\xff\xfe\x00": r"run\.yaml is not valid YAML: ",
    b"seed: !!python/object/apply:os.mkdir [made]": r"run\.yaml is not valid YAML: could not determine a constructor",
}


@pytest.mark.parametrize("content", WRONG_FILES)
def test_a_wrong_file_ends_in_one_sentence(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        run_job(PretrainConfig, lambda config: None, shlex.split(f"{BASE} --config run.yaml"))
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(WRONG_FILES[content], err.removesuffix("\n"))
    assert not Path("made").exists()


def test_an_unreadable_file_and_the_exit_codes_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"cannot read the configuration .*nope\.yaml: No such file or directory$"):
        pretrain(f"{BASE} --config {tmp_path / 'nope.yaml'}")

    def fail(error: BaseException | None) -> None:
        def main(config: PrepareConfig) -> None:
            assert config.output == "there"
            if error:
                raise error

        run_job(PrepareConfig, main, ["--output", "there"])

    for error, code in ((None, 0), (UserError("the disk is full"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as exit_:
            fail(error)
        assert exit_.value.code == code
    assert capsys.readouterr().err == "error: the disk is full\n"
    with pytest.raises(ZeroDivisionError):  # ours to mend: keeps its traceback
        fail(ZeroDivisionError())


def fields(config_class: type[BaseModel], prefix: str = "") -> dict[str, list[tuple[str, bool]]]:
    """Description, and whether there is a default, of each field that is no group, by dotted name; here computed from
    the classes' own defaults and docstrings, and not by the code under test."""
    groups: dict[str, list[type[BaseModel]]] = {
        name: [m for m in [*Settings.__subclasses__(), CrateMAEConfig, ViTMAEConfig] if m.__name__ in str(f.annotation)]
        for name, f in config_class.model_fields.items()
    }
    out: dict[str, list[tuple[str, bool]]] = {}
    for name, field in config_class.model_fields.items():
        if not groups[name]:
            has_default = field.default is not PydanticUndefined
            out.setdefault(prefix + name, []).append((field.description or "", has_default))
        for group in groups[name]:
            for inner, found in fields(group, f"{prefix}{name}.").items():
                out.setdefault(inner, []).extend(found)
    return out


@pytest.mark.parametrize("config_class", [PretrainConfig, PrepareConfig, FinetuneConfig])
def test_help_describes_every_setting(
    config_class: type[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        parse_config(config_class, ["--help"])
    assert exit_.value.code == 0
    entries: dict[str, str] = {}
    for line in capsys.readouterr().out.partition("options:")[2].splitlines():
        if option := re.match(r"  --([\w.]+)(.*)", line):
            name = option[1]
            entries[name] = option[2]
        elif line.startswith("    "):
            entries[name] += f" {line.strip()}"
    expected = fields(config_class)
    assert set(entries) == {*expected, "config"}
    assert set(expected) <= set(dotted_names(config_class))
    for name, choices in expected.items():
        text = " ".join(entries[name].split())
        assert any(d and " ".join(d.split()) in text for d, _ in choices), name
        assert ("(default: " in text) == any(default for _, default in choices), name


SHIPPED: dict[str, type[Settings]] = {
    "benchmark-data": BenchmarkDataConfig,
    "benchmark-order": BenchmarkOrderConfig,
    "benchmark-scaling": BenchmarkScalingConfig,
    "benchmark-train": BenchmarkTrainConfig,
    "cifar10": PretrainConfig,
    "cifar10-compare": CompareConfig,
    "cifar10-finetune": FinetuneConfig,
    "compare": CompareConfig,
    "compare-sound": CompareConfig,
    "demo": PretrainConfig,
    "evaluate": EvaluateConfig,
    "finetune": FinetuneConfig,
    "imagenet-base": PretrainConfig,
    "prepare": PrepareConfig,
    "spoken-digits": PretrainConfig,
    "sweep-codebook": SweepConfig,
}


def test_every_shipped_config_parses() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SHIPPED)
    for name, config_class in SHIPPED.items():
        config = parse_config(config_class, ["--config", str(CONFIGS / f"{name}.yaml")])
        if isinstance(config, CompareConfig):  # paths in them are the repository's
            assert (CONFIGS.parents[1] / config.base).is_file()
            assert config.finetune is None or (CONFIGS.parents[1] / config.finetune).is_file()


def test_a_mapping_that_is_no_json_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"the value of --variants is not JSON \(.*line 1.*\); give it such as"):
        parse_config(CompareConfig, ["--base", "x", "--variants", "{wide: {model.dim: 32}}"])


def test_nested() -> None:
    assert nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
