"""The demo: pretrain on the built-in shapes and show what the encoder learned.

    crate-ray demo

Modules that take seconds to import are imported after the settings are read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from rich.color import Color
from rich.style import Style
from rich.text import Text

from crate_ray.cli import run_job
from crate_ray.config import EvaluateConfig, PrepareConfig, PretrainConfig, ProbeConfig
from crate_ray.errors import UserError
from crate_ray.progress import console

if TYPE_CHECKING:
    from crate_ray.data.format.dataset import ShardSet
    from crate_ray.evaluation.classification import Classification

_NUM_SAMPLES = 12_000  # 9,600 for training, 2,400 held out
_DATA_SEED = 1  # the settings in demo.yaml were chosen on the samples of seed 0
_QUESTION = "Which shape is it?"
_BAR = 40  # characters for 100 %
_PICTURES = 3
_TITLES = ("held-out image", "what it saw", "prediction", "attention")
_PICTURE_SIDES = (32, 24, 16)  # characters; the first that the terminal has room for


def main(config: PretrainConfig, num_samples: int = _NUM_SAMPLES) -> None:
    """Pack `num_samples` shapes, pretrain, evaluate, and print the result.

    Raises UserError if the settings do not suit the demo. It needs one training set, a held-out set, and square colour
    images.
    """
    from crate_ray.data.format.dataset import load_dataset
    from crate_ray.evaluation.job import run_evaluation
    from crate_ray.jobs.training import train_and_publish
    from crate_ray.runs.pretraining import open_pretraining
    from crate_ray.storage.interface import open_storage
    from crate_ray.training.pretraining import PretrainTask

    train, held_out = config.data.train, config.data.validation
    if not isinstance(train, str) or held_out is None:
        raise UserError("the demo needs one folder in data.train and one in data.validation; it packs shapes into both")
    out = console()
    _pack(config, train, "train", num_samples)
    _pack(config, held_out, "test", num_samples)
    train_and_publish(config, PretrainTask, open_pretraining, show_next=False)
    folder = f"{config.storage}/{config.name}"
    evaluation = EvaluateConfig(
        model=folder,
        probe=ProbeConfig(train=train, test=held_out),
        data=held_out,
        masks=held_out,
        max_images=256,
        features_dir=f"{config.storage}/features",
        tracking=config.tracking,
        s3=config.s3,
    )
    done = run_evaluation(evaluation, lambda text: out.print(text))
    assert done.report.classification is not None
    side = next((side for side in _PICTURE_SIDES if len(_TITLES) * (side + 1) <= out.width), None)
    if out.is_terminal and side:
        out.print()
        shards = load_dataset(open_storage(held_out, config.s3))
        out.print(terminal_pictures(Path(folder) / "model", shards, side), soft_wrap=True, end="")
    out.print()
    for line in summary(done.report.classification):
        out.print(line, soft_wrap=True)
    programs = Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    print(f"\nreport  {done.page}\n        all numbers and pictures; open it in a browser")
    print(f"MLflow  {programs}/mlflow ui --backend-store-uri {config.tracking.uri}")
    print(f"next    {programs}/crate-ray pretrain --data /path/to/images")


def _pack(config: PretrainConfig, uri: str, split: Literal["train", "test"], num_samples: int) -> None:
    from crate_ray.data.format.manifest import MANIFEST_NAME
    from crate_ray.data.prepare.builtin import plain_shapes_source
    from crate_ray.data.prepare.packing import pack
    from crate_ray.storage.interface import open_storage

    storage = open_storage(uri, config.s3)
    if storage.exists(MANIFEST_NAME):
        return
    height, width = config.model.image_hw
    if height != width or config.model.channels != 3:
        raise UserError(
            f"shapes are square colour images, but the model takes {config.model.channels} × {height} × {width}"
        )
    source = plain_shapes_source(split, num_samples, height, _DATA_SEED)
    manifest = pack(source, storage, PrepareConfig(output=uri, seed=_DATA_SEED))
    print(f"{storage.uri}: {manifest.num_samples:,} images, {height}×{width}, {manifest.num_classes} classes")


def summary(result: Classification) -> list[Text]:
    """The accuracies of the linear probe as bars: trained encoder, untrained encoder, raw pixels."""
    lines = [
        Text(_QUESTION, style="bold"),
        Text(f"linear probe, {result.test_samples:,} held-out images, {result.num_classes} classes, 95 % intervals"),
        Text(),
    ]
    width = max(len(scores.title) for scores in result.encoders.values()) + 2
    for name, scores in result.encoders.items():
        accuracy = scores.standard.linear.interval
        numbers = f"{accuracy.value:6.1%}  [{accuracy.low:.1%}, {accuracy.high:.1%}]"
        bar = "█" * round(_BAR * accuracy.value)
        lines.append(Text(f"{scores.title:<{width}}{numbers}  {bar}", style="green" if name == "trained" else ""))
    return lines


def terminal_pictures(model_folder: Path, held_out: ShardSet, side: int) -> Text:
    """Held-out images as coloured characters: original, visible patches, prediction, attention.

    Each picture is `side` characters wide and half as many lines high.
    """
    import torch
    from matplotlib import colormaps

    from crate_ray.evaluation.features import iterate_dataset
    from crate_ray.models.exported import Normalizer, load_exported
    from crate_ray.structure.attention import patch_maps
    from crate_ray.training.pictures import reconstruct
    from crate_ray.training.step import probe_noise

    model, description = load_exported(model_folder)
    normalizer = Normalizer.of(description.mean, description.std, "cpu")
    batch = next(iterate_dataset(held_out, description.model, _PICTURES))
    images = normalizer(batch.images)
    noise = probe_noise(batch.samples, description.model.num_patches)
    columns = [normalizer.undo(part) for part in (images, *reconstruct(model, images, noise))]
    attention_Bhw = patch_maps(model, images).attention[:, -1].mean(1)
    scaled_Bhw = attention_Bhw / attention_Bhw.amax((1, 2), keepdim=True).clamp_min(1e-12)
    columns.append(torch.from_numpy(colormaps["cividis"](scaled_Bhw.numpy())[..., :3]).permute(0, 3, 1, 2).float())
    shown = [torch.nn.functional.interpolate(part, (side, side), mode="area").clamp(0, 1) for part in columns]
    gap = torch.zeros(_PICTURES, 3, side, 1)
    rows_BCHW = torch.cat([part for one in shown for part in (one, gap)], 3)
    pixels_RW3 = (255 * rows_BCHW).byte().permute(0, 2, 3, 1).flatten(0, 1)
    titles = "".join(title.ljust(side + 1) for title in _TITLES)
    return Text(titles + "\n").append_text(_half_blocks(pixels_RW3.tolist()))


def _half_blocks(pixels: Sequence[Sequence[Sequence[int]]]) -> Text:
    """Show two rows of pixels in each line of text: the upper row colours '▀', the lower row its background."""
    text = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for top, bottom in zip(upper, lower, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*top), bgcolor=Color.from_rgb(*bottom)))
        text.append("\n")
    return text


def run() -> NoReturn:
    """Parse the command line and run the demo, by default with the settings of demo.yaml."""
    given = sys.argv[1:]
    chosen = any(argument.split("=")[0] == "--config" for argument in given)
    run_job(PretrainConfig, main, given if chosen else ["--config", "demo.yaml", *given])
