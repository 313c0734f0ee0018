"""One function turns read samples into contents and labels, and says which of them cannot be used."""

from __future__ import annotations

import pytest

from crate_ray.data.format.samples import Sample
from crate_ray.data.read.bad_samples import BadSampleCounter, SampleError
from crate_ray.data.read.content import NO_LABEL, LabelUse, sample_contents
from crate_ray.data.read.shard_reader import Unreadable
from crate_ray.errors import UserError


def sample(key: str, **members: bytes) -> Sample:
    return Sample(key, {suffix: memoryview(content) for suffix, content in members.items()})


GOOD = [sample("a", jpg=b"A", cls=b"3"), sample("b", jpg=b"B", cls=b"0")]
LOST = Unreadable("shard-000000.tar#7", "the shard is damaged")


def test_contents_and_labels_of_good_samples() -> None:
    found = sample_contents(GOOD, ["jpg"], "required")
    assert [bytes(content) for content in found.encoded] == [b"A", b"B"]
    assert found.labels == [3, 0] and found.errors == [None, None]
    assert sample_contents(GOOD, ["jpg"], "ignored").labels == [NO_LABEL, NO_LABEL]
    assert sample_contents([], ["jpg"], "required") == ([], [], [])
    lines = [sample("a", jpg=b"A", cls=b"3\n"), sample("b", jpg=b"B", cls=b" 12 \r\n")]
    assert sample_contents(lines, ["jpg"], "required").labels == [3, 12]


def test_the_first_suffix_in_the_dataset_order_counts() -> None:
    both = [sample("a", png=b"P", jpg=b"J"), sample("b", png=b"P")]
    assert [bytes(c) for c in sample_contents(both, ["jpg", "png"], "ignored").encoded] == [b"J", b"P"]
    assert [bytes(c) for c in sample_contents(both, ["png", "jpg"], "ignored").encoded] == [b"P", b"P"]


@pytest.mark.parametrize("suffixes", [["jpg"], ["png", "jpg"]])
def test_bad_samples_have_a_key_and_a_cause_and_leave_the_others_alone(suffixes: list[str]) -> None:
    found = sample_contents([GOOD[0], LOST, sample("c", txt=b"?", cls=b"1"), GOOD[1]], suffixes, "required")
    assert [bytes(content) for content in found.encoded] == [b"A", b"", b"", b"B"]
    assert [found.labels[i] for i in (0, 3)] == [3, 0]
    lost, without = found.errors[1], found.errors[2]
    assert lost == SampleError("shard-000000.tar#7", "damaged_shard", "the shard is damaged")
    assert without is not None and without[:2] == ("c", "no_image") and "jpg" in without.message
    assert found.errors[0] is None and found.errors[3] is None


@pytest.mark.parametrize("label", [None, b"", b"dog", b"-5", b"1.5", b"3.0", b"-1", b"+3", b"1_0", b"1 0"])
@pytest.mark.parametrize("use", ["required", "optional", "ignored"])
def test_a_missing_label_is_an_error_only_if_labels_are_required(label: bytes | None, use: LabelUse) -> None:
    odd = sample("odd", jpg=b"X") if label is None else sample("odd", jpg=b"X", cls=label)
    found = sample_contents([GOOD[0], odd], ["jpg"], use)
    assert found.labels == ([NO_LABEL, NO_LABEL] if use == "ignored" else [3, NO_LABEL])
    error = found.errors[1]
    assert (error is not None and error[:2] == ("odd", "no_label")) == (use == "required")
    assert bytes(found.encoded[1]) == b"X"


def test_the_cause_of_an_unreadable_sample_is_not_its_missing_label() -> None:
    (error,) = sample_contents([LOST], ["jpg"], "required").errors
    assert error is not None and error.cause == "damaged_shard"


def test_a_few_bad_samples_never_stop_a_small_job_and_too_many_are_explained() -> None:
    counter = BadSampleCounter(0.01, "s3://data", setting="max_bad_fraction")
    counter.count_drawn(40)
    for i in range(10):
        counter.add(SampleError(f"k{i}", "damaged", "the JPEG is damaged"))
    with pytest.raises(UserError, match=r"11 of 40 samples of s3://data .* max_bad_fraction 0\.01 allows .*11 damaged"):
        counter.add(SampleError("k10", "damaged", "the JPEG is damaged"))
    assert counter.causes == {f"k{i}": "damaged" for i in range(11)} and counter.counts == {"damaged": 11}
    large = BadSampleCounter(0.01, "s3://data")
    large.count_drawn(5000)
    for i in range(50):
        large.add(SampleError(str(i), "empty", ""))
    with pytest.raises(UserError, match=r"data\.max_bad_fraction"):
        large.add(SampleError("last", "empty", ""))
