"""Embeds a dataset with the job and with a plain loop (webdataset, Pillow, batches of 256), in turns, on CPU threads.

python -m tests.performance.bench_embed --model MODEL --data FOLDER [--threads 1] [--rounds 2]

Beside images/s it prints images per CPU second, which other processes on the machine change less.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from crate_ray.config import EmbedConfig, S3Config, TrackingConfig
from crate_ray.evaluation.embedding import embed_dataset
from crate_ray.models.classifier import encoder_of
from crate_ray.runs.references import load
from crate_ray.serving import FeatureExtractor

BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="folder of JPEG shards of the model's size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, description = load(arguments.model, TrackingConfig(), S3Config())

    def plain() -> int:
        extract = FeatureExtractor(encoder_of(model), description)
        found, images = [], []

        def flush() -> None:
            if images:
                found.append(extract(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()).numpy())
                images.clear()

        urls = sorted(str(path) for path in Path(arguments.data).glob("*.tar"))
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            images.append(np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")))
            if len(images) == BATCH:
                flush()
        flush()
        return sum(map(len, found))

    def job() -> int:
        with tempfile.TemporaryDirectory() as folder:
            config = EmbedConfig(data=arguments.data, output=f"{folder}/out", batch_size=BATCH)
            return embed_dataset(config, model, description, arguments.model).num_rows

    programs: dict[str, Callable[[], int]] = {"plain": plain, "job": job}
    for _ in range(arguments.rounds):
        for name, program in programs.items():
            began, cpu = time.perf_counter(), time.process_time()
            images = program()
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            print(f"{name:5}  {images / seconds:,.0f} images/s, {images / cpu:,.0f} per CPU second", flush=True)


if __name__ == "__main__":
    main()
