"""The example configurations: crate-ray configs lists them, crate-ray configs NAME shows one."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from crate_ray import config
from crate_ray.cli import suggest
from crate_ray.config.examples import example_configs, find_example, summary
from crate_ray.config.listing import markdown
from crate_ray.errors import UserError

JOBS: dict[str, tuple[type[config.Settings], ...]] = {
    "pretrain": (config.PretrainConfig,),
    "prepare": (config.PrepareConfig,),
    "finetune": (config.FinetuneConfig,),
    "evaluate": (config.EvaluateConfig,),
    "compare": (config.CompareConfig,),
    "sweep": (config.SweepConfig,),
    "register": (config.RegisterConfig,),
    "register promote": (config.PromoteConfig,),
    "register rollback": (config.RollbackConfig,),
    "register list": (config.ListConfig,),
    "register card": (config.CardConfig,),
    "serve": (config.ServeConfig,),
    "embed": (config.EmbedConfig,),
    "search": (config.SearchConfig,),
    "export": (config.ExportConfig,),
    "benchmark data": (config.BenchmarkDataConfig,),
    "benchmark order": (config.BenchmarkOrderConfig,),
    "benchmark train": (config.BenchmarkTrainConfig,),
    "benchmark overhead": (config.BenchmarkOverheadConfig,),
    "benchmark roofline": (config.BenchmarkRooflineConfig,),
    "benchmark scaling": (config.BenchmarkScalingConfig,),
    "benchmark serve": (config.BenchmarkServeConfig,),
}
"""Settings of every command, in the order of docs/configuration.md."""


def run() -> None:
    """List the examples, print or copy one, or print docs/configuration.md."""
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, description="Example configurations.")
    parser.add_argument("name", nargs="?", help="example to print, such as cifar10; without it, all are listed")
    parser.add_argument("--output", type=Path, metavar="PATH", help="copy the example to this file or folder")
    parser.add_argument("--markdown", action="store_true", help="print the settings of every command as Markdown")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(JOBS), end="")
        return
    if arguments.name is None:
        examples = example_configs()
        width = max(len(example.stem) for example in examples)
        for example in examples:
            print(f"{example.stem:{width}}  {summary(example)}")
        print("\nrun one: crate-ray COMMAND --config NAME.yaml; print one: crate-ray configs NAME")
        return
    path = find_example(arguments.name)
    if path is None:
        names = [example.stem for example in example_configs()]
        hint = suggest(arguments.name, names) or "; crate-ray configs lists them"
        print(f"error: there is no example {arguments.name!r}{hint}", file=sys.stderr)
        sys.exit(2)
    if arguments.output is None:
        print(path.read_text(encoding="utf-8"), end="")
        return
    target = arguments.output / path.name if arguments.output.is_dir() else arguments.output
    if target.exists():
        print(f"error: {target} exists; remove it or name another --output", file=sys.stderr)
        sys.exit(2)
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; name another --output") from None
    print(target)
