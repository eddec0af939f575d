"""Copies and views of one thing are found, cheaply; things that merely resemble each other are kept apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelpress_compression import alike
from modelpress_compression.alike import groups_of_alike
from modelpress_compression.inputs import InputData
from modelpress_compression.specs import TensorSpec

PHOTOS, VIEWS = 10, 6


def data_of(array: Any) -> InputData:
    return InputData((TensorSpec("x", str(array.dtype), ("n", *array.shape[1:])),), {"x": array})


def crops(channels_last: bool = False) -> Any:
    """Of photos that differ in colours and in how coarse they are: crops 56 wide of 64, a little lighter or darker; the
    views of a photo lie `PHOTOS` apart."""
    rng = np.random.default_rng(0)
    found = np.zeros((VIEWS, PHOTOS, 3, 56, 56), np.float32)
    for number in range(PHOTOS):
        grain = 2 + number % 5
        coarse = rng.uniform(-1, 1, (3, -(-64 // grain), -(-64 // grain)))
        colour, contrast = rng.uniform(-1, 1, (3, 1, 1)), rng.uniform(0.2, 1, (3, 1, 1))
        photo = colour + contrast * coarse.repeat(grain, 1).repeat(grain, 2)
        for view in range(VIEWS):
            top, left = rng.integers(0, 8, 2)
            found[view, number] = photo[:, top : top + 56, left : left + 56] * rng.uniform(0.97, 1.03)
    images = found.reshape(-1, 3, 56, 56)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)) if channels_last else images


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_crops_of_a_photo_go_together(channels_last: bool) -> None:
    """No group has crops of two photos, and of ten photos eight are one group at least."""
    groups = groups_of_alike(data_of(crops(channels_last))).reshape(VIEWS, PHOTOS)
    for number in range(PHOTOS):
        assert not set(groups[:, number]) & set(np.delete(groups, number, axis=1).reshape(-1))
    assert sum(len(set(groups[:, number])) == 1 for number in range(PHOTOS)) >= 8


def test_samples_that_differ_are_alone(rng: Any) -> None:
    """Vectors and pictures of noise: each is a group of its own, numbered in their order."""
    for shape in ((60, 32), (60, 3, 16, 16), (60, 40, 8)):
        groups = groups_of_alike(data_of(rng.standard_normal(shape).astype(np.float32)))
        np.testing.assert_array_equal(groups, np.arange(60))


def test_samples_along_a_line_are_no_single_group() -> None:
    """Each is near the next; a chain of all of them tells nothing apart."""
    line = np.linspace(0, 1, 300, dtype=np.float32)[:, None] * np.ones(40, np.float32)
    assert np.bincount(groups_of_alike(data_of(line))).max() <= 100


def test_copies_go_together_however_many(rng: Any) -> None:
    """Also where most samples are copies of one."""
    samples = rng.standard_normal((50, 3, 12, 12)).astype(np.float32)
    samples[10:] = samples[3]
    groups = groups_of_alike(data_of(samples))
    np.testing.assert_array_equal(groups[10:], groups[3])
    assert len(set(groups.tolist())) == 10
    assert not groups_of_alike(data_of(np.ones((7, 3), np.float32))).any()


def test_sentences_that_differ_by_a_word(rng: Any) -> None:
    """Token ids, padded: one word of twenty is another, and its sentence is alike; others are not."""
    ids = rng.integers(100, 20_000, (40, 24))
    ids[:, 20:] = 0
    ids[20:] = ids[:20]
    ids[20:, 5] = rng.integers(100, 20_000, 20)
    groups = groups_of_alike(data_of(ids))
    np.testing.assert_array_equal(groups[20:], groups[:20])
    assert len(set(groups.tolist())) == 20


def test_many_samples_are_compared_with_few(rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not all pairs are, copies are still found, and the pairs are bounded."""
    samples = rng.standard_normal((600, 40)).astype(np.float32)
    samples[300:] = samples[:300]
    monkeypatch.setattr(alike, "MAX_PAIRS", 6000)
    groups = groups_of_alike(data_of(samples[rng.permutation(600)]))
    np.testing.assert_array_equal(np.bincount(groups), np.full(300, 2))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numbers_that_are_not_finite_or_huge(rng: Any, dtype: Any) -> None:
    """Neither is warned of, nor does either join what differs."""
    for shape in ((30, 40), (30, 3, 16, 16)):
        samples = rng.standard_normal(shape).astype(dtype)
        samples[3], samples[4, 0], samples[5, 0] = np.finfo(dtype).max, np.nan, np.inf
        assert len(set(groups_of_alike(data_of(samples)).tolist())) >= 3


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 8), (5, 3, 0), (5, 3, 8, 0), (5, 0, 8, 8)])
def test_samples_that_hold_nothing_are_alike(shape: tuple[int, ...]) -> None:
    """As a cache of past keys may, before the first token."""
    for dtype in (np.float32, np.int64, np.bool_, np.complex64):
        assert not groups_of_alike(data_of(np.zeros(shape, dtype))).any()
    assert not groups_of_alike(data_of(np.ones((4, 5), np.complex64) * 1j)).any()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.int32, np.uint64])
def test_integers_of_every_type(rng: Any, dtype: Any) -> None:
    """Narrow ones hold no 256, in which ids are counted together."""
    ids = rng.integers(0, 100, (12, 60)).astype(dtype)
    ids[6:] = ids[:6]
    groups = groups_of_alike(data_of(ids))
    np.testing.assert_array_equal(groups[6:], groups[:6])


@pytest.mark.parametrize("dtype", [object, np.str_, np.bytes_])
def test_words(dtype: Any) -> None:
    """Text of every kind of array: what is the same goes together."""
    words = np.asarray([["cat", "sat"], ["dog", "ran"], ["cat", "sat"], ["", "cow"]], dtype)
    data = InputData((TensorSpec("x", "string", ("n", 2)),), {"x": words})
    assert groups_of_alike(data).tolist() == [0, 1, 0, 2]
