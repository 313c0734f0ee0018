"""Streams of randomness for fine-tuning, in addition to those in data.order.hashing. They are parts of hash keys."""

STREAM_RANDAUGMENT, STREAM_MIX, STREAM_DROP_PATH = range(101, 104)
