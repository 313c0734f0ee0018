"""Open one or several datasets, and read their samples by number."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from crate_ray.config import DataConfig, S3Config
from crate_ray.data.format.dataset import load_dataset
from crate_ray.data.format.index import INDEX_STRIDE
from crate_ray.data.format.samples import Sample
from crate_ray.data.order.mixture import Mixture, whole_weights
from crate_ray.data.read.shard_reader import ShardReader, Store, Unreadable
from crate_ray.errors import UserError
from crate_ray.storage.cache import PartCache
from crate_ray.storage.interface import open_storage


def open_mixture(train: str | Mapping[str, float], s3: S3Config) -> Mixture:
    """Open the dataset or the weighted datasets of `data.train`.

    Raises UserError if a dataset is missing, or if images are mixed with grids.
    """
    addresses = {train: 1.0} if isinstance(train, str) else train
    datasets = tuple(load_dataset(open_storage(uri, s3)) for uri in addresses)
    first = datasets[0].manifest
    for dataset in datasets[1:]:
        other = dataset.manifest
        if other.kind != first.kind or (other.kind == "grid" and other.channels != first.channels):
            raise UserError(
                f"{datasets[0].storage.uri} holds {first.kind}s of {first.channels} channels and {dataset.storage.uri} "
                f"{other.kind}s of {other.channels}; mix datasets of the same kind only"
            )
    return Mixture(datasets, whole_weights(tuple(addresses.values())))


class MixtureReader:
    """Reads samples of a mixture by number."""

    # A part is a range of samples that is read in one request.

    def __init__(self, mixture: Mixture, data: DataConfig) -> None:
        cache = PartCache(Path(data.cache_dir), data.cache_bytes) if data.cache_dir else None
        self.mixture = mixture
        self._readers = [ShardReader(dataset, cache) for dataset in mixture.datasets]
        self._part_bytes = data.part_bytes

    def read(self, samples: range, store: Store = memoryview) -> list[Sample | Unreadable]:
        """Read consecutive samples of one dataset; see `ShardReader.read`."""
        dataset, first = self.mixture.locate(samples.start)
        return self._readers[dataset].read(first, len(samples), store)

    def num_bytes(self, samples: range) -> int:
        """Approximate number of bytes that `read` fetches for these samples."""
        dataset, first = self.mixture.locate(samples.start)
        return self._readers[dataset].num_bytes(first, len(samples))

    def source_name(self, sample: int) -> str | None:
        """Name of a sample in the source that it was packed from; see `ShardReader.source_name`."""
        dataset, number = self.mixture.locate(sample)
        return self._readers[dataset].source_name(number)

    def parts(self, samples: range) -> list[range]:
        """Split consecutive samples of one dataset into parts of about `part_bytes`."""
        if not samples:  # of an empty shard
            return []
        manifest = self.mixture.datasets[self.mixture.locate(samples.start)[0]].manifest
        # Parts are multiples of the samples that an index entry covers.
        mean = manifest.total_bytes / manifest.num_samples
        size = max(1, int(self._part_bytes / mean / INDEX_STRIDE)) * INDEX_STRIDE
        return [samples[i : i + size] for i in range(0, len(samples), size)]

    def all_parts(self) -> list[range]:
        """Parts of the whole mixture, shard by shard."""
        return [
            part
            for begin, dataset in zip(self.mixture.first_sample, self.mixture.datasets, strict=False)
            for first, last in pairwise(dataset.first_sample.tolist())
            for part in self.parts(range(begin + first, begin + last))
        ]
