"""From command line and YAML to settings: which value wins, what is refused, and with which message. Every example
parses, and the help and docs/configuration.md list every setting."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from crate_ray.__main__ import COMMANDS, main
from crate_ray.cli import parse_config, run_job
from crate_ray.config import (
    BenchmarkDataConfig,
    BenchmarkOrderConfig,
    BenchmarkRooflineConfig,
    BenchmarkScalingConfig,
    BenchmarkTrainConfig,
    CompareConfig,
    CrateMAEConfig,
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    PrepareConfig,
    PretrainConfig,
    PromotionProbe,
    SearchConfig,
    ServeConfig,
    Settings,
    SweepConfig,
    ViTMAEConfig,
)
from crate_ray.config.listing import markdown
from crate_ray.config.values import dotted_names, kebab, merge, nested
from crate_ray.errors import UserError
from crate_ray.jobs.configs import JOBS

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "jobs" / "configs"
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
    f"{BASE} --training.step 7": "there is no setting --training.step, did you mean --training.steps?",
    f"{BASE} --batch_size 7": "there is no setting --batch-size, did you mean --training.batch-size?",
    f"{BASE} --data.cachedir x": "there is no setting --data.cachedir, did you mean --data.cache-dir?",
    f"{BASE} --data.cache-dri=x": "there is no setting --data.cache-dri, did you mean --data.cache-dir?",
    f"{BASE} --zzzz 7": "there is no setting --zzzz; --help-all lists every setting",
    f"{BASE} 7": "there is no setting 7; --help-all lists every setting",
    f"{BASE} --training.batch_size": "argument --training.batch-size: expected one argument",
    f"{BASE} --optim fast": "--optim is a group of settings; set one of them, such as --optim.base-lr",
    f"{BASE} --data": "argument --data: expected one argument",
    f"{BASE} --data --seed 3": "argument --data: expected one argument",
    f"{BASE} --config nope.yaml": (
        "there is no file nope.yaml, and no example of that name; crate-ray configs lists the examples"
    ),
    f"{BASE} --config cifar01.yaml": (
        "there is no file cifar01.yaml, and no example of that name, did you mean cifar10.yaml?"
    ),
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
    f"{BASE} --data.crop_scale 0.5,2": "setting 'data.crop_scale' is '2': input should be less than or equal to 1",
    f"{BASE} --data.crop_scale 1,0.5": "data: crop_scale is [1.0, 0.5]; give the smaller number first",
    f"{BASE} --data.crop_ratio 0,1": "data: crop_ratio is [0.0, 1.0]; aspect ratios must be positive",
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
    b"training: [": r"run\.yaml is not valid YAML: line 1, column 12: expected the node content",
    b"- 3": r"run\.yaml holds a list, not settings by name$",
    b"\xff\xfe\x00": r"run\.yaml is not valid YAML: ",
    b"seed: !!python/object/apply:os.mkdir [made]": r"run\.yaml is not valid YAML: line 1, column 7: could not ",
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


def fields(config_class: type[BaseModel], prefix: str = "") -> dict[str, list[tuple[str, bool]]]:
    """Description, and whether there is a default, of each field that is no group, by dotted name; here computed from
    the classes' own defaults and docstrings, and not by the code under test."""
    groups: dict[str, list[type[BaseModel]]] = {
        name: []
        if str(f.annotation).startswith("dict")
        else [
            m
            for m in [*Settings.__subclasses__(), CrateMAEConfig, ViTMAEConfig, PromotionProbe]
            if re.search(rf"\b{m.__name__}\b", str(f.annotation))
        ]
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


def help_entries(text: str) -> dict[str, str]:
    """Text of each option of a help page, by name."""
    entries: dict[str, str] = {}
    for line in text.splitlines():
        if option := re.match(r"  --([\w.-]+)(.*)", line):
            name = option[1]
            entries[name] = option[2]
        elif line.startswith("    "):
            entries[name] += f" {line.strip()}"
    return entries


def help_of(config_class: type[Settings], option: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_config(config_class, [option])
    assert exit_.value.code == 0
    return capsys.readouterr().out


ALL_CLASSES = [config_class for classes in JOBS.values() for config_class in classes]


@pytest.mark.parametrize("config_class", ALL_CLASSES)
def test_help_all_describes_every_setting(
    config_class: type[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    entries = help_entries(help_of(config_class, "--help-all", capsys))
    expected = {name.replace("json_file", "json"): found for name, found in fields(config_class).items()}
    assert set(entries) == {*map(kebab, expected), *config_class.short_forms, "config"}
    for name, choices in expected.items():
        text = " ".join(entries[kebab(name)].split())
        assert any(d and " ".join(d.split()) in text for d, _ in choices), name
        assert text.endswith("(required)") != any(default for _, default in choices), name


@pytest.mark.parametrize("config_class", ALL_CLASSES)
def test_help_fits_two_screens(
    config_class: type[Settings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page = help_of(config_class, "--help", capsys)
    assert page.count("\n") <= 80
    shown = set(help_entries(page))
    assert shown <= {*map(kebab, dotted_names(config_class)), *config_class.short_forms, "config", "json"}
    if config_class is PretrainConfig:
        assert 25 <= len(shown) <= 35
        assert {"data", "data.train", "training.batch-size", "optim.lr", "scaling.workers"} <= shown
        assert not {"optim.eps", "scaling.hang-seconds", "model.mlp-ratio", "data.lanes"} & shown
        assert "(default: 0.75)" in page and "required" in page


def test_the_configuration_page_is_up_to_date() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == markdown(JOBS), (
        "run: crate-ray configs --markdown > docs/configuration.md"
    )


def test_names_are_kebab_or_snake_on_the_command_line() -> None:
    kebab_line = "--data.train x --data.cache-dir a-b --training.batch-size=3 --init-from x-y --training.steps 2"
    assert pretrain(kebab_line) == pretrain(
        kebab_line.replace("-dir", "_dir").replace("h-s", "h_s").replace("t-f", "t_f")
    )
    assert pretrain(kebab_line).data.cache_dir == "a-b" and pretrain(kebab_line).init_from == "x-y"


def test_the_last_of_two_alternatives_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: x}\ntraining: {epochs: 3}\noptim: {lr: 1e-3}\n")
    config = pretrain(f"--config {path} --training.steps 7 --optim.base-lr 2e-4")
    assert (config.training.steps, config.training.epochs) == (7, None)
    assert (config.optim.lr, config.optim.base_lr) == (None, 2e-4)
    assert pretrain(f"--config {path} --training.batch-size 7").training.epochs == 3
    path.write_text("data: {train: x}\ntraining: {steps: 3}\noptim: {base_lr: 1e-3}\n")
    config = pretrain(f"--config {path} --training.epochs 7 --optim.lr 2e-4")
    assert (config.training.steps, config.training.epochs, config.optim.lr) == (None, 7, 2e-4)
    with pytest.raises(UserError, match="set either steps or epochs, and not both"):
        pretrain(f"--config {path} --training.epochs 7 --training.steps 7")
    with pytest.raises(UserError, match="set either steps or epochs, and not both"):
        pretrain(f"--config {path} --training.steps null")
    tuned = parse_config(FinetuneConfig, shlex.split("--data.train x --training.steps 9 --optim.base-lr 1e-3"))
    assert (tuned.training.steps, tuned.training.epochs, tuned.optim.lr) == (9, None, None)


def test_a_short_form_stands_for_several_settings(tmp_path: Path) -> None:
    given: list[tuple[dict[str, Any], str]] = []

    def complete(values: dict[str, Any], path: str) -> dict[str, Any]:
        given.append((values, path))
        return merge({"data": {"train": "packed"}, "training": {"epochs": 5}}, values)

    path = tmp_path / "run.yaml"
    path.write_text("data: photos\nseed: 3\n")
    for line in (f"--config {path} --data.flip false", "--data photos --seed 3 --data.flip=false"):
        config = parse_config(PretrainConfig, shlex.split(line), complete)
        assert (config.data.train, config.data.flip, config.seed, config.training.epochs) == ("packed", False, 3, 5)
    assert [(path, values["data"]) for values, path in given] == [("photos", {"flip": "false"})] * 2
    steps = parse_config(PretrainConfig, shlex.split("--data=photos --training.steps 4"), complete)
    assert (steps.training.steps, steps.training.epochs) == (4, None)
    whole = parse_config(PretrainConfig, ["--data", '{"train": "there"}', "--training.steps", "4"], complete)
    assert whole.data.train == "there" and len(given) == 3


def test_files_that_a_yaml_file_names_are_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "sweep.yaml").write_text("base: base.yaml\nsearch: {optim.lr: {choice: [1]}}\n")
    (folder / "base.yaml").touch()
    monkeypatch.chdir(elsewhere)
    assert parse_config(SweepConfig, ["--config", "../configs/sweep.yaml"]).base == "../configs/base.yaml"
    assert capsys.readouterr().err == ""
    # On the command line a path is what it says, and so is one that is only in the working directory.
    assert parse_config(SweepConfig, ["--config", "../configs/sweep.yaml", "--base", "mine.yaml"]).base == "mine.yaml"
    (folder / "base.yaml").rename(elsewhere / "base.yaml")
    assert parse_config(SweepConfig, ["--config", "../configs/sweep.yaml"]).base == "base.yaml"
    assert "base base.yaml is not beside this file; using the one in the working directory" in capsys.readouterr().err


def test_an_example_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_config(PretrainConfig, ["--config", "cifar10.yaml"]).name == "cifar10"
    assert "config: cifar10.yaml is the example that comes with crate-ray" in capsys.readouterr().err
    assert Path(parse_config(SweepConfig, ["--config=sweep-codebook.yaml"]).base).samefile(CONFIGS / "digits.yaml")
    Path("cifar10.yaml").write_text("name: mine\ndata: {train: x}\ntraining: {steps: 1}\n")
    capsys.readouterr()
    assert parse_config(PretrainConfig, ["--config", "cifar10.yaml"]).name == "mine"
    assert capsys.readouterr().err == ""


def test_a_removed_setting_says_what_happens_without_it(tmp_path: Path) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text("model: x\ndata: y\nknn_neighbours: 5\n")
    with pytest.raises(
        UserError, match=r"setting 'knn_neighbours' was removed: k-NN uses 20 neighbours.*; leave it out"
    ):
        parse_config(EvaluateConfig, ["--config", str(path)])
    with pytest.raises(UserError, match=r"setting --knn-neighbours was removed: k-NN uses 20 neighbours"):
        parse_config(EvaluateConfig, ["--model", "x", "--data", "y", "--knn-neighbours", "5"])


@pytest.fixture
def crate_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crate-ray", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, *capsys.readouterr()

    return run


CrateRay = Callable[..., tuple[int, str, str]]


def test_the_command_lists_its_commands(crate_ray: CrateRay) -> None:
    code, shown, _ = crate_ray("--help")
    assert code == 0
    assert re.findall(r"^  (\w+)  +\S", shown, re.MULTILINE) == list(COMMANDS)
    assert {name.split()[0] for name in JOBS} | {"configs", "demo"} == set(
        COMMANDS
    )  # the demo has the settings of pretrain
    assert crate_ray() == (0, shown, "")
    code, shown, _ = crate_ray("--version")
    assert code == 0 and re.fullmatch(r"crate-ray [\w.]+\n", shown)
    assert crate_ray("pretrian") == (2, "", "error: there is no command 'pretrian', did you mean 'pretrain'?\n")
    assert crate_ray("x")[::2] == (2, "error: there is no command 'x'; crate-ray --help lists the commands\n")


def test_the_list_of_commands_is_quick() -> None:
    code = "import sys; sys.argv[1:] = []\ntry: from crate_ray.__main__ import main; main()\n"
    code += "except SystemExit: print({'torch', 'ray', 'pydantic', 'mlflow'} & set(sys.modules))"
    before = os.times()
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    after = os.times()
    assert shown.startswith("usage: crate-ray COMMAND") and shown.endswith("set()\n")
    # Time of the processor, so that other processes on the machine do not count.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


@pytest.mark.parametrize("name", JOBS)
def test_every_command_has_a_help_page_and_knows_its_name(name: str, crate_ray: CrateRay) -> None:
    code, shown, err = crate_ray(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert shown.startswith(f"usage: crate-ray {name} ")


def test_register_is_the_default_of_its_commands(crate_ray: CrateRay) -> None:
    assert crate_ray("register", "--nmae", "x")[::2] == (2, "error: there is no setting --nmae, did you mean --name?\n")
    assert crate_ray("register", "--name", "x")[2] == (
        "error: setting 'run' is required; give --run or put it into the --config file\n"
    )
    assert crate_ray("register", "lits")[2] == "error: there is no command 'lits', did you mean 'list'?\n"


def test_examples_are_listed_shown_and_copied(
    crate_ray: CrateRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, listed, _ = crate_ray("configs")
    for name in SHIPPED:
        assert re.search(rf"^{name} +[A-Z].{{20,95}}$", listed, re.MULTILINE), name
    content = (CONFIGS / "demo.yaml").read_text()
    assert crate_ray("configs", "demo") == (0, content, "")
    assert crate_ray("configs", "demo.yaml", "--output", ".") == (0, "demo.yaml\n", "")
    assert Path("demo.yaml").read_text() == content
    assert crate_ray("configs", "demo", "--output", "demo.yaml")[::2] == (
        2, "error: demo.yaml exists; remove it or name another --output\n",
    )  # fmt: skip
    assert crate_ray("configs", "dmeo")[::2] == (2, "error: there is no example 'dmeo', did you mean 'demo'?\n")


SHIPPED: dict[str, type[Settings]] = {
    "benchmark-data": BenchmarkDataConfig,
    "benchmark-order": BenchmarkOrderConfig,
    "benchmark-roofline": BenchmarkRooflineConfig,
    "benchmark-scaling": BenchmarkScalingConfig,
    "benchmark-train": BenchmarkTrainConfig,
    "cifar10": PretrainConfig,
    "cifar10-compare": CompareConfig,
    "cifar10-depth": CompareConfig,
    "cifar10-finetune": FinetuneConfig,
    "cifar10-gpu": CompareConfig,
    "cifar10-published": PretrainConfig,
    "cifar10-variants": CompareConfig,
    "cifar10-white-box": CompareConfig,
    "compare": CompareConfig,
    "compare-sound": CompareConfig,
    "compare-sound-white-box": CompareConfig,
    "demo": PretrainConfig,
    "embed": EmbedConfig,
    "digits": PretrainConfig,
    "evaluate": EvaluateConfig,
    "finetune": FinetuneConfig,
    "imagenet-base": PretrainConfig,
    "prepare": PrepareConfig,
    "search": SearchConfig,
    "serve": ServeConfig,
    "spoken-digits": PretrainConfig,
    "sweep-codebook": SweepConfig,
    "sweep-sparsity": SweepConfig,
    "sweep-variants": SweepConfig,
}


def test_every_shipped_config_parses() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SHIPPED)
    for name, config_class in SHIPPED.items():
        config = parse_config(config_class, ["--config", str(CONFIGS / f"{name}.yaml")])
        if isinstance(config, CompareConfig | SweepConfig):
            assert Path(config.base).is_file()
        if isinstance(config, CompareConfig):
            assert config.finetune is None or Path(config.finetune).is_file()


def test_a_mapping_is_yaml_or_one_sentence() -> None:
    probe = ["--probe.train", "x", "--probe.test", "x", "--base", "x"]
    for text in ('{"wide": {"model.dim":32}}', "{wide: {model.dim: 32}}"):
        assert parse_config(CompareConfig, [*probe, "--variants", text]).variants == {"wide": {"model.dim": 32}}
    for text, cause in (("{wide: {", "line 1"), ('{"a": {}, "a": {}}', "'a' is given twice")):
        with pytest.raises(
            UserError, match=rf"the value of --variants is not valid YAML \(.*{cause}.*\); give it such as"
        ):
            parse_config(CompareConfig, [*probe, "--variants", text])


def test_nested() -> None:
    assert nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
