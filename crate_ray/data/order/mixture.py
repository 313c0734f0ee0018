"""One or several weighted datasets, whose samples are numbered one after the other."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

from crate_ray.config import Kind
from crate_ray.data.format.dataset import ShardSet


@dataclass(frozen=True)
class Mixture:
    """Datasets whose samples are mixed in a batch, and their shares."""

    datasets: tuple[ShardSet, ...]
    weights: tuple[int, ...]
    """Relative shares."""

    @classmethod
    def of(cls, dataset: ShardSet) -> Mixture:
        """A single dataset."""
        return cls((dataset,), (1,))

    @cached_property
    def first_sample(self) -> tuple[int, ...]:
        """Number of the first sample of each dataset, followed by the total number of samples."""
        return tuple(accumulate((d.manifest.num_samples for d in self.datasets), initial=0))

    def locate(self, sample: int) -> tuple[int, int]:
        """Dataset of a sample, and its number within the dataset."""
        dataset = bisect_right(self.first_sample, sample) - 1
        return dataset, sample - self.first_sample[dataset]

    @property
    def uri(self) -> str:
        """Addresses of the datasets, for messages."""
        return " and ".join(dataset.storage.uri for dataset in self.datasets)

    @property
    def kind(self) -> Kind:
        """Whether the samples are images or grids."""
        return self.datasets[0].manifest.kind

    @property
    def channels(self) -> int:
        """Channels of the samples: 3 if any dataset of images has colour."""
        return max(dataset.manifest.channels for dataset in self.datasets)

    @property
    def num_samples(self) -> int:
        """Number of samples in all datasets."""
        return self.first_sample[-1]

    @property
    def total_bytes(self) -> int:
        """Total size of all shards."""
        return sum(dataset.manifest.total_bytes for dataset in self.datasets)

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None without labels, and for several datasets, whose class numbers are unrelated."""
        return self.datasets[0].manifest.num_classes if len(self.datasets) == 1 else None

    @property
    def largest_hw(self) -> tuple[int, int] | None:
        """Largest height and width of any sample; None if a manifest does not say."""
        sizes = [(d.manifest.height, d.manifest.width) for d in self.datasets]
        known = [(height, width) for height, width in sizes if height is not None and width is not None]
        return (max(h for h, _ in known), max(w for _, w in known)) if len(known) == len(sizes) else None

    @cached_property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel over the datasets, weighted by their shares."""
        if len(self.datasets) == 1:
            return self.datasets[0].manifest.mean, self.datasets[0].manifest.std
        channels, total = self.channels, sum(self.weights)
        first, second = [0.0] * channels, [0.0] * channels
        found: list[set[tuple[float, float]]] = [set() for _ in range(channels)]
        for dataset, weight in zip(self.datasets, self.weights, strict=True):
            manifest, share = dataset.manifest, weight / total
            for c in range(channels):
                mean, std = manifest.mean[c % manifest.channels], manifest.std[c % manifest.channels]
                first[c] += share * mean
                second[c] += share * (std**2 + mean**2)
                found[c].add((mean, std))
        means, stds = [], []
        for m, s, pairs in zip(first, second, found, strict=True):
            ((mean, std), *others) = pairs
            # Rounding errors would make a channel that is the same everywhere look as if it varied.
            constant = not others and not std
            means.append(mean if constant else m)
            stds.append(0.0 if constant else math.sqrt(max(s - m**2, 0.0)))
        return tuple(means), tuple(stds)

    @cached_property
    def digest(self) -> str:
        """Digest of the dataset's manifest, or of all manifests and weights."""
        digests = [dataset.manifest.digest() for dataset in self.datasets]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(json.dumps([digests, self.weights]).encode()).hexdigest()


def whole_weights(weights: tuple[float, ...]) -> tuple[int, ...]:
    """The smallest integers in the same proportion as the weights, whose decimal notation is taken as exact."""
    exact = [Fraction(str(weight)) for weight in weights]
    whole = [int(weight * math.lcm(*(w.denominator for w in exact))) for weight in exact]
    return tuple(weight // math.gcd(*whole) for weight in whole)
