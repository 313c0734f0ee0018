"""Along which directions do an encoder's features vary, and do classes explain it?

Prints for the first principal components of the features (mean of patch tokens after the last norm): share of the
variance, correlation with the mean of the input (brightness, loudness), and the share of the component's variance that
is between classes.

python -m tests.performance.feature_spectrum --model RUN --data LABELLED [--components 6]
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.decomposition import PCA

from crate_ray.config import S3Config, TrackingConfig
from crate_ray.data.format.dataset import load_dataset
from crate_ray.evaluation.features import iterate_dataset
from crate_ray.runs.references import load_encoder
from crate_ray.serving import FeatureExtractor
from crate_ray.storage.interface import open_storage


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--components", type=int, default=6)
    args = parser.parse_args()
    s3 = S3Config()
    extractor = FeatureExtractor(*load_encoder(args.model, TrackingConfig(), s3))
    features, levels, labels = [], [], []
    for batch in iterate_dataset(load_dataset(open_storage(args.data, s3)), extractor.model.config):
        features.append(extractor(batch.images).numpy())
        levels.append(batch.images.float().flatten(1).mean(1).numpy())
        labels.append(batch.labels)
    level, label = np.concatenate(levels), np.concatenate(labels)
    pca = PCA(args.components)
    scores = pca.fit_transform(np.concatenate(features))
    means = np.stack([scores[label == number].mean(0) for number in np.unique(label)])
    between = (means[np.unique(label, return_inverse=True)[1]] ** 2).sum(0) / (scores**2).sum(0)
    for number, share in enumerate(pca.explained_variance_ratio_):
        correlation = abs(np.corrcoef(scores[:, number], level)[0, 1])
        print(
            f"component {number + 1}: {share:.0%} of the variance, correlation {correlation:.2f} with the mean of the "
            f"input, classes explain {between[number]:.0%}"
        )


if __name__ == "__main__":
    main()
