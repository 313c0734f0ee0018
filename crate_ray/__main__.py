"""The command `crate-ray`, also `python -m crate_ray`. It imports a job only when that job runs."""

from __future__ import annotations

import difflib
import importlib
import sys
from importlib import metadata
from typing import NoReturn

from crate_ray.output import guard_output

COMMANDS = {
    "demo": "pretrain on built-in pictures for a few minutes and show the result",
    "prepare": "pack images or .npy grids into shards, or index shards that exist",
    "pretrain": "pretrain CRATE-MAE or ViT-MAE; `--data FOLDER` is enough",
    "finetune": "train a pretrained encoder to classify labelled images",
    "evaluate": "measure a model and write a report: probe, k-NN, reconstruction, layers",
    "compare": "train several models alike and compare them in one table",
    "sweep": "search over pretraining settings",
    "register": "add a model to the MLflow registry, promote a version, list versions",
    "serve": "serve a model over HTTP, on Ray Serve; a new champion takes over by itself",
    "embed": "compute an embedding of every sample of a dataset",
    "search": "find the images of an embedded dataset that are most similar to an image",
    "export": "write a model as ONNX, torch.export, safetensors or for Hugging Face",
    "benchmark": "measure data loading, training, overhead and scaling",
    "configs": "list, show and copy example configurations",
}
"""Every command, as the module in crate_ray.jobs that runs it, with one line of help."""


def main() -> NoReturn:
    """Run the command that the first argument names. Exits with 2 if there is none of that name."""
    guard_output()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        sys.exit(0)
    name = arguments[0]
    if name == "--version":
        print(f"crate-ray {version()}")
        sys.exit(0)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f", did you mean {close[0]!r}?" if close else "; crate-ray --help lists the commands"
        print(f"error: there is no command {name!r}{hint}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"crate-ray {name}"]
    from crate_ray.cli import reported

    with reported():
        importlib.import_module(f"crate_ray.jobs.{name}").run()
    sys.exit(0)


def version() -> str:
    """The installed version, or 'unknown' in a source tree that is not installed."""
    try:
        return metadata.version("crate-ray")
    except metadata.PackageNotFoundError:
        return "unknown"


def _usage() -> str:
    lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: crate-ray COMMAND [--config FILE] [--SETTING VALUE ...]",
            "",
            *lines,
            "",
            "crate-ray COMMAND --help shows the everyday settings of a command, --help-all shows all.",
            "Start with your own images: crate-ray pretrain --data /path/to/images",
        ]
    )


if __name__ == "__main__":
    main()
