"""Names of the metrics of a run.

MLflow shows one group of charts for each part before the slash. It sorts groups, and charts in a group, by name. The
names are chosen so that the training loss comes first and the measures by layer come last.
"""

from __future__ import annotations

from typing import Literal

LOSS = "train/loss"
"""Mean over the finite steps since the last log step."""
LR = "train/lr"

EPOCH = "train_data/epoch"
BATCH_DIGEST = "train_data/batch_digest"
"""Digest of the keys of the global batch, slot by slot; the same for every number of workers."""

IMAGES_PER_SECOND = "train_performance/images_per_second"
"""Of all workers together."""
STEP_SECONDS = "train_performance/step_seconds"
DATA_WAIT_SHARE = "train_performance/data_wait_share"
"""Share of the time in which rank 0 waited for data."""
LOGGING_SHARE = "train_performance/logging_share"
MFU = "train_performance/mfu"
"""Model FLOPs utilization: share of the peak FLOP/s of the GPUs."""
MEMORY_BYTES = "train_performance/memory_bytes"
"""Peak memory of rank 0's process on the host."""
GPU_MEMORY_BYTES = "train_performance/gpu_memory_bytes"
"""Peak memory that rank 0 allocated on its GPU."""
CHECKPOINT_BLOCKING_SECONDS = "train_performance/checkpoint_blocking_seconds"
"""Time in which saving a checkpoint blocked rank 0's training."""
CHECKPOINT_BACKGROUND_SECONDS = "train_performance/checkpoint_background_seconds"

GRADIENT_NORM = "train_stability/gradient_norm"
"""Norm of the global gradient before clipping, at the last finite step."""
LOSS_SPIKES = "train_stability/loss_spikes"
"""Steps whose loss jumped, since the last log step."""
SKIPPED_STEPS = "train_stability/skipped_steps"
"""Steps whose loss or gradient was not finite, since the last log step."""

VALIDATION_LOSS = "validation/loss"
TOP1 = "validation/top1"
"""Accuracy: share of held-out samples."""
TOP5 = "validation/top5"

KNN_ACCURACY = "validation/knn_accuracy"
"""Of the encoder's features on the labelled datasets of `probe`; see evaluation.online."""
PROBE_ACCURACY = "validation/probe_accuracy"
EFFECTIVE_RANK = "validation/effective_rank"

_BAD_SAMPLES = "train_data/bad_samples_"
SignalPlace = Literal["first", "last", "decoder"]
"""Layers whose signals of learning are metrics: the first and the last of the encoder, and the decoder's last."""
_SIGNALS = "train_signals/"
_LAYERS = "validation_layers/"


def bad_samples(cause: str) -> str:
    """Name of the metric that counts bad samples with a cause, over all workers, since the last log step."""
    return f"{_BAD_SAMPLES}{cause}"


def bad_samples_cause(metric: str) -> str | None:
    """The cause in a metric name that `bad_samples` made; None for other metrics."""
    return metric.removeprefix(_BAD_SAMPLES) if metric.startswith(_BAD_SAMPLES) else None


def learning_signal(signal: str, place: SignalPlace) -> str:
    """Name of a layer's signal of learning (see structure.signals) on the run's probe batch, masked as in training."""
    return f"{_SIGNALS}{signal}_{place}"


def layer_measure(measure: str, layer: int) -> str:
    """Name of a layer's measure on the run's probe batch (held-out samples, if there are any). Layers count from 1."""
    return f"{_LAYERS}{measure}_layer_{layer:02d}"
