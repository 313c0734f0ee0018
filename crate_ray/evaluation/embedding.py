"""Embeddings of a whole dataset: in this process if the work is small, else on Ray; one file per range of samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import safetensors.torch
import torch

from crate_ray.__main__ import version
from crate_ray.config import EmbedConfig
from crate_ray.data.format.classes import class_names
from crate_ray.data.format.dataset import ShardSet, load_dataset
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.read.bad_samples import BadSampleCounter, SampleError
from crate_ray.errors import UserError
from crate_ray.evaluation.embedding_output import (
    LEASE_FILE,
    MAX_PARTS,
    EmbeddingRecord,
    Part,
    PartReport,
    claim,
    find_complete,
    publish,
)
from crate_ray.evaluation.embedding_parts import PartWriter, Progress, dataset_counter
from crate_ray.evaluation.evaluated_model import check_input
from crate_ray.evaluation.features import compute_device
from crate_ray.models import MaskedAutoencoder
from crate_ray.models.classifier import Classifier, encoder_of
from crate_ray.models.exported import ModelDescription
from crate_ray.models.flops import encoding_flops
from crate_ray.progress import CountDisplay
from crate_ray.storage.interface import Storage, open_storage
from crate_ray.storage.lease import Lease
from crate_ray.storage.node_folders import check_kept

_CPU_FLOPS, _GPU_FLOPS = 2e10, 3e13
"""Rough rates of a CPU core and of a GPU in fp32, to estimate how long the work takes."""
_SMALL_SECONDS = 600.0
_PART_SECONDS, _PART_SAMPLES, _PART_BYTES = 600.0, 50_000, 2**27
_PARTS_PER_WORKER = 4
_ROW_BYTES = 100  # of a row without its embedding


def embed_dataset(
    config: EmbedConfig, model: MaskedAutoencoder | Classifier, description: ModelDescription, reference: str
) -> EmbeddingRecord:
    """Embed every sample of a dataset once and write files. If they are complete, do nothing.

    An output that an earlier call left incomplete is completed. Rows: `key` of the sample, `name` (of the file that was
    packed, if the dataset has names), `shard`, `sample` (its number in the dataset), `label` (if every sample has a
    class), `embedding`. Bad samples are skipped and listed in the record.

    Args:
        config: what to do.
        model: the model, whose encoder is used.
        description: how its input is prepared.
        reference: names the model in the record.

    Raises:
        UserError: the data does not fit the model, the output holds other data or is in use, or too many samples are
            bad.
    """
    shards, output = load_dataset(open_storage(config.data, config.s3)), open_storage(config.output, config.s3)
    check_kept(output.uri, "output")
    if output.uri == shards.storage.uri:
        raise UserError(f"--output is {output.uri}, the folder of the dataset itself; choose another folder")
    check_input(description, shards.manifest, shards.storage.uri)
    weights = weights_of(model)
    wanted = EmbeddingRecord(
        model=hashlib.sha256(weights).hexdigest(),
        dataset=shards.manifest.digest(),
        feature=config.feature,
        num_samples=shards.manifest.num_samples,
        dim=description.model.dim,
        version=version(),
        format=config.format,
        dtype=config.dtype,
        patches=description.model.num_patches if config.feature == "patch" else None,
        preparation=preparation_digest(description),
        reference=reference,
        data=shards.storage.uri,
        classes=class_names(shards.manifest),
    )
    if done := find_complete(output, wanted):
        return done
    with Lease(output, LEASE_FILE, f"the output {output.uri}") as lease:
        if done := find_complete(output, wanted):
            return done
        return _Embedding(config, shards, output, wanted, encoder_of(model), description, weights).run(lease)


def weights_of(model: MaskedAutoencoder | Classifier) -> bytes:
    """A model's weights as a safetensors file."""
    return safetensors.torch.save({name: value.contiguous() for name, value in model.state_dict().items()})


def preparation_digest(description: ModelDescription) -> str:
    """Digest of the settings that features depend on beside the weights."""
    fields = {"model", "mean", "std", "kind"}
    # Without defaults, so that the digest stays when a later version has more settings.
    return hashlib.sha256(description.model_dump_json(include=fields, exclude_defaults=True).encode()).hexdigest()


class _Embedding:
    """An attempt to complete an output."""

    def __init__(
        self,
        config: EmbedConfig,
        shards: ShardSet,
        output: Storage,
        wanted: EmbeddingRecord,
        encoder: MaskedAutoencoder,
        description: ModelDescription,
        weights: bytes,
    ) -> None:
        self._config, self._shards, self._output, self._wanted = config, shards, output, wanted
        self._encoder, self._description, self._weights = encoder, description, weights
        self._flops = encoding_flops(description.model)

    def run(self, lease: Lease) -> EmbeddingRecord:
        """Write the parts that are missing, and mark the output complete."""
        config, total = self._config, self._wanted.num_samples
        device = compute_device(config.gpu)
        seconds = total * self._flops / self._rate(device)
        here = config.workers is None and seconds <= _SMALL_SECONDS and not (config.gpu and device.type == "cpu")
        workers, gpu = (1, device.type == "cuda") if here else self._on_cluster()
        size = config.part_samples or self._part_samples(workers, gpu, here)
        record, reports = claim(self._output, self._wanted.model_copy(update={"part_samples": (size,)}))
        if config.part_samples not in (None, record.part_samples[0]):
            raise UserError(
                f"{self._output.uri} was begun with files of {record.part_samples[0]:,} samples; leave out "
                "--part-samples, or choose another --output"
            )
        bad = dataset_counter(record, self._shards, config.max_bad_fraction)
        parts = [self._count(bad, report) for report in reports]
        finished = {part.start for part in parts}
        missing = [samples for samples in record.ranges() if samples.start not in finished]
        with CountDisplay("embedding", total) as display:
            work = f"{sum(map(len, missing)):,} samples × {self._flops / 1e9:.3g} GFLOP"
            where = f"in this process ({device.type})" if here else f"on Ray with {workers} encoders"
            seconds *= sum(map(len, missing)) / max(total, 1)
            display.say(f"embedding {work} {where}" + (f", about {seconds:.0f} s" if here and seconds > 1 else ""))
            before = sum(part.stop - part.start for part in parts)
            if parts:
                display.say(f"{len(parts)} of {len(record.ranges())} files were finished by an earlier run")
            display.update(before, 0, bad.counts.total())
            run = self._here(record, missing, device) if here else self._on_ray(record, missing, workers, gpu, display)
            running: dict[int, Progress] = {}
            for samples, progress in run:
                running[samples.start] = progress
                if progress.report is not None:
                    lease.check()
                    parts.append(self._count(bad, progress.report))
                done = sum(progress.samples for progress in running.values())
                display.update(before + done, done, sum(progress.bad for progress in running.values()))
        record = record.model_copy(update={"skipped": dict(bad.counts), "skipped_keys": bad.causes})
        lease.check()
        return publish(self._output, record, parts)

    @staticmethod
    def _count(bad: BadSampleCounter, report: PartReport) -> Part:
        last = None if report.last_error is None else SampleError(*report.last_error)
        bad.add_counted(report.part.skipped, report.skipped_keys, last)
        return report.part

    def _here(
        self, record: EmbeddingRecord, parts: Sequence[range], device: torch.device
    ) -> Iterator[tuple[range, Progress]]:
        writer = PartWriter(
            self._shards,
            self._output,
            record,
            self._encoder,
            self._description,
            device,
            batch_size=self._config.batch_size,
            max_bad_fraction=self._config.max_bad_fraction,
        )
        for samples in parts:
            for progress in writer.write(samples):
                yield samples, progress

    def _on_ray(
        self, record: EmbeddingRecord, parts: Sequence[range], workers: int, gpu: bool, display: CountDisplay
    ) -> Iterator[tuple[range, Progress]]:
        from crate_ray.evaluation.embedding_on_ray import write_parts

        return write_parts(
            self._config,
            self._shards,
            self._output,
            record,
            self._description,
            self._weights,
            parts,
            workers,
            gpu,
            display,
        )

    def _on_cluster(self) -> tuple[int, bool]:
        """Start Ray. Returns the number of encoders, and whether each has a GPU."""
        import ray

        from crate_ray.ray_cluster import start_ray

        start_ray()
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        gpu = gpus >= 1 if self._config.gpu is None else self._config.gpu
        if gpu and not gpus and self._config.workers is None:
            raise UserError(
                "--gpu is true, but neither this process nor the cluster has a GPU; leave out --gpu, or give --workers "
                "if an autoscaler will add nodes"
            )
        return self._config.workers or max(1, int(resources.get("GPU" if gpu else "CPU", 1))), gpu

    def _part_samples(self, workers: int, gpu: bool, here: bool) -> int:
        """Samples per part."""
        total, record = self._wanted.num_samples, self._wanted
        row = _ROW_BYTES + (record.patches or 1) * record.dim * (2 if record.dtype == "float16" else 4)
        rate = _GPU_FLOPS if gpu else _CPU_FLOPS
        size = min(_PART_SAMPLES, _PART_BYTES // row, int(_PART_SECONDS * rate / self._flops))
        if not here:  # each encoder has work until the end
            size = min(size, -(-total // (_PARTS_PER_WORKER * workers)))
        size = max(size, self._config.batch_size if record.patches is None else 1, -(-total // MAX_PARTS))
        return -(-size // INDEX_STRIDE) * INDEX_STRIDE

    def _rate(self, device: torch.device) -> float:
        """FLOP/s of this process."""
        return _GPU_FLOPS if device.type == "cuda" else _CPU_FLOPS * min(torch.get_num_threads(), os.cpu_count() or 1)
