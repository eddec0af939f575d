"""Data files: read without holding them in memory, refused with a reason where they do not fit."""

from pathlib import Path

import numpy as np
import pytest
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import EvaluationData, InputData
from modelpress_compression.picked import Picked
from modelpress_compression.specs import TensorSpec, parse_specs

IMAGE = (TensorSpec("x", "float32", ("batch", 1, 4, 4)),)
PAIR = (TensorSpec("a", "float32", ("n", 3)), TensorSpec("b", "int64", ("n",)))


def images(count: int = 5) -> np.ndarray:
    return np.arange(count * 16, dtype=np.float32).reshape(count, 1, 4, 4)


def test_feeds_are_slices_of_the_batch_axis() -> None:
    """Samples come in order, in batches of the size asked for, the last one smaller."""
    feeds = list(InputData.from_arrays({"x": images()}, IMAGE).feeds(2))
    assert [len(feed["x"]) for feed in feeds] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), images())


def test_limit_counts_samples() -> None:
    """At most `limit` samples are taken."""
    data = InputData.from_arrays({"x": images()}, IMAGE)
    assert [len(feed["x"]) for feed in data.feeds(2, limit=3)] == [2, 1]


def test_one_axis_more_makes_every_sample_a_feed() -> None:
    """A state that travels beside the input, and scalars, come as whole feeds."""
    specs = (TensorSpec("x", "float32", ("n", 3)), TensorSpec("sr", "int64", ()))
    data = InputData.from_arrays({"x": np.ones((4, 2, 3), np.float32), "sr": np.full(4, 16000)}, specs)
    assert data.whole_feeds
    assert [(feed["x"].shape, feed["sr"].shape) for feed in data.feeds(8)] == [((2, 3), ())] * 4


def test_fixed_batch_is_kept() -> None:
    """A model that takes four samples at a time gets four, and a rest is left out."""
    specs = (TensorSpec("x", "float32", (4, 1, 4, 4)),)
    data = InputData.from_arrays({"x": images(10)}, specs)
    assert [feed["x"].shape for feed in data.feeds(1)] == [(4, 1, 4, 4)] * 2


def test_a_single_array_fits_a_single_input_whatever_its_name() -> None:
    """Exporters rename inputs; with one of each there is nothing to confuse."""
    assert len(InputData.from_arrays({"input": images()}, IMAGE)) == 5


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((5, 3, 4, 4), np.float32)}, "does not fit"),
        ({"x": np.zeros((5,), np.float32)}, "does not fit"),
        ({"x": np.zeros((0, 1, 4, 4), np.float32)}, "no samples"),
        ({"x": np.full((5, 1, 4, 4), np.nan, np.float32)}, "NaN"),
        ({"x": np.zeros((5, 1, 4, 4), np.complex64)}, "cannot take"),
        ({}, "no array"),
        ({"y": images(), "z": images()}, "no array for 'x'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], said: str) -> None:
    """Shape, type, name, count and values are checked, and the message says which array."""
    with pytest.raises(InvalidDataError, match=said):
        InputData.from_arrays(arrays, IMAGE)


def test_different_counts_are_refused() -> None:
    """All arrays hold the same number of samples."""
    with pytest.raises(InvalidDataError, match="different numbers"):
        InputData.from_arrays({"a": np.zeros((4, 3), np.float32), "b": np.zeros(5, np.int64)}, PAIR)


def test_types_are_cast_within_their_kind() -> None:
    """float64 serves a float32 input, int32 an int64 one."""
    data = InputData.from_arrays({"a": np.zeros((4, 3)), "b": np.zeros(4, np.int32)}, PAIR)
    feed = next(data.feeds(4))
    assert (feed["a"].dtype, feed["b"].dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_are_memory_mapped(save, tmp_path: Path) -> None:
    """Arrays of an .npz lie in files, not in memory, whether it is compressed or not."""
    save(tmp_path / "data.npz", x=images())
    data = InputData.read(tmp_path / "data.npz", IMAGE, tmp_path)
    assert isinstance(data.arrays["x"], np.memmap)
    np.testing.assert_array_equal(next(data.feeds(5))["x"], images())


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04truncated", b"PK\x05\x06" + b"\0" * 18])
def test_unreadable_files_are_refused(content: bytes, tmp_path: Path) -> None:
    """Empty, foreign and truncated files end in InvalidDataError."""
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError):
        InputData.read(path, IMAGE, tmp_path)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    """Object arrays are pickles; they are never loaded."""
    np.savez(tmp_path / "data.npz", x=np.array([{}], dtype=object))
    with pytest.raises(InvalidDataError):
        InputData.read(tmp_path / "data.npz", IMAGE, tmp_path)


def test_labels_stay_with_their_samples(tmp_path: Path) -> None:
    """Labels beside the inputs are read by both kinds of data, and follow the samples through every choice of them."""
    np.savez(tmp_path / "eval.npz", x=images(), labels=np.arange(5))
    data = InputData.read(tmp_path / "eval.npz", IMAGE, tmp_path)
    assert len(data) == 5
    for chosen, expected in ((data.head(3), [0, 1, 2]), (data.spread(2), [0, 2])):
        np.testing.assert_array_equal(chosen.labels, expected)
        np.testing.assert_array_equal(chosen.arrays["x"], images()[expected])
    np.testing.assert_array_equal(data.take([4, 1])["x"], images()[[4, 1]])
    evaluation = EvaluationData.read(tmp_path / "eval.npz", IMAGE, tmp_path)
    np.testing.assert_array_equal(evaluation.labels, np.arange(5))


@pytest.mark.parametrize("count", [31, 32, 33, 63, 64, 100, 3200])
def test_as_many_samples_are_spread_as_are_asked_for(count: int) -> None:
    """Exactly the limit, or all; in order, from the whole file, with steps that differ by one at most."""
    data = InputData.from_arrays({"x": images(count), "labels": np.arange(count)}, IMAGE)
    places = np.asarray(data.spread(32).labels)
    assert len(places) == min(count, 32)
    steps = np.diff([*places, count])
    assert places[0] == 0
    assert steps.min() >= 1
    assert np.ptp(steps) <= 1


def test_at_least_one_batch_is_spread() -> None:
    """A model that takes four samples at a time gets four, from the whole file, where fewer are asked for."""
    specs = (TensorSpec("x", "float32", (4, 1, 4, 4)),)
    data = InputData.from_arrays({"x": images(10), "labels": np.arange(10)}, specs)
    np.testing.assert_array_equal(data.spread(3).labels, [0, 2, 5, 7])


def test_chosen_samples_are_not_read_before_they_are_asked_for(tmp_path: Path) -> None:
    """Of those that lie at unequal steps, and of some of these, feeds, digest and labels are as those of a copy."""
    np.savez(tmp_path / "data.npz", x=images(100), labels=np.arange(100))
    data = InputData.read(tmp_path / "data.npz", IMAGE, tmp_path)
    chosen = data.spread(40).only([1, 2, 5, 7, 9]).spread(3)
    places = np.asarray(chosen.labels)
    assert isinstance(chosen.arrays["x"], Picked)
    assert chosen.arrays["x"].source is data.arrays["x"]
    copy = InputData.from_arrays({"x": images(100)[places], "labels": places}, IMAGE)
    for one, other in zip(chosen.feeds(2), copy.feeds(2), strict=True):
        np.testing.assert_array_equal(one["x"], other["x"])
    np.testing.assert_array_equal(chosen.arrays["x"], copy.arrays["x"])
    np.testing.assert_array_equal(chosen.arrays["x"][1:, 0, 2], copy.arrays["x"][1:, 0, 2])
    np.testing.assert_array_equal(chosen.take([2, 0])["x"], copy.take([2, 0])["x"])
    assert (chosen.digest, chosen.varied, chosen.oddities) == (copy.digest, copy.varied, copy.oddities)
    assert (chosen.arrays["x"].shape, chosen.arrays["x"].nbytes) == (copy.arrays["x"].shape, copy.arrays["x"].nbytes)
    assert data.only([3]).varied


@pytest.mark.parametrize("labels", [None, np.arange(4), np.array("a"), np.array(3)])
def test_labels_that_do_not_fit_are_refused(labels: np.ndarray | None) -> None:
    """Missing labels, too few, and texts are refused."""
    arrays = {"x": images()} | ({} if labels is None else {"labels": labels})
    with pytest.raises(InvalidDataError, match="labels"):
        EvaluationData.from_arrays(arrays, IMAGE)
    if labels is not None:
        with pytest.raises(InvalidDataError, match="labels"):
            InputData.from_arrays(arrays, IMAGE)


def test_samples_that_are_all_the_same_tell_nothing() -> None:
    """Constant data, or one sample over and over, vouches for nothing; a difference anywhere, or one sample of several
    numbers, does."""
    specs = parse_specs(["x:float32[batch,3]"])

    def data(values: list[list[float]]) -> InputData:
        return InputData.from_arrays({"x": np.asarray(values, np.float32)}, specs)

    assert not data([[0, 0, 0]] * 4).varied
    assert not data([[1, 2, 3]] * 4).varied
    assert not data([[2, 2, 2]]).varied
    assert data([[1, 2, 3], [1, 2, 4]]).vouches
    assert data([[1, 2, 3]]).vouches
    assert not InputData(specs, data([[1, 2, 3]]).arrays, provided=False).vouches


def test_integers_for_floats_are_pointed_out() -> None:
    """Pixels of 0 to 255 where floats are taken; masks of 0 and 1, and floats, are nothing odd."""
    pixels = np.arange(80, dtype=np.uint8).reshape(5, 1, 4, 4)
    (text,) = InputData.from_arrays({"x": pixels}, IMAGE).oddities
    assert "uint8 from 0 to 79" in text
    mask = np.eye(4, dtype=np.uint8).reshape(4, 1, 2, 2, 1).repeat(4, axis=-1).reshape(4, 1, 4, 4)
    assert InputData.from_arrays({"x": mask}, IMAGE).oddities == ()
    assert InputData.from_arrays({"x": images()}, IMAGE).oddities == ()


def test_one_sample_and_equal_samples_are_pointed_out() -> None:
    """Neither says anything of other samples."""
    assert "one sample alone" in InputData.from_arrays({"x": images(1)}, IMAGE).oddities[0]
    same = np.repeat(images(1), 5, axis=0)
    assert "all samples are the same" in InputData.from_arrays({"x": same}, IMAGE).oddities[0]


@pytest.mark.parametrize(("samples", "told"), [(7, True), (6, False)])
def test_samples_that_fill_no_batch_are_pointed_out(samples: int, told: bool) -> None:
    """A model that insists on three at a time leaves the seventh."""
    pixels = np.random.default_rng(0).random((samples, 2), np.float32)
    oddities = InputData.from_arrays({"x": pixels}, (TensorSpec("x", "float32", (3, 2)),)).oddities
    assert [text.endswith("run without the last 1 of 7.") for text in oddities] == [True] * told


@pytest.mark.parametrize(("extent", "size", "count"), [("n", 1, 7), (3, 3, 2)])
def test_feeds_are_counted(extent: str | int, size: int, count: int) -> None:
    """One for each sample, or for each whole batch that the model insists on."""
    data = InputData.from_arrays({"x": np.zeros((7, 2), np.float32)}, (TensorSpec("x", "float32", (extent, 2)),))
    assert (data.feed_size, data.feed_count) == (size, count)
    assert [len(feed["x"]) for feed in data.feeds(1)] == [size] * count
