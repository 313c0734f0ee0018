"""Streams of randomness of fine-tuning, beside those of the data order (see data.order): parts of keys."""

STREAM_RANDAUGMENT, STREAM_MIX, STREAM_DROP_PATH = range(101, 104)
