"""Which samples show the same thing: copies, and views of one photo that were cropped, moved or recoloured a little.

    signature   of each sample, what does not depend on where things lie: of each channel mean and deviation, then at
                five scales the mean change from one element to the next along both axes, and the deviation. Of a vector
                its numbers, of token ids how often each comes
    distance    of two samples, d = mean (a - b)^2 / 2 over the numbers of the signature, so scaled that two samples are
                1 apart on average
    groups      samples that a chain of pairs joins, each nearer than a level

The level is the highest of a few at which no group holds more than a third of the samples. Of 96 crops of twelve photos
it is 0.15 and leaves 9 groups. Samples that merely resemble each other, as digits do, are near in every degree, and
only the nearest of them share a group: 26 of 200 do.

Every sample is read once. Compared are at most 2 million pairs: all of 1,400 samples; of more, those next to each other
in the direction in which the samples differ the most.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.inputs import Array, InputData, in_pieces

LEVELS = (0.15, 0.075, 0.0375, 0.01875, 0.009375)
# Fewer numbers are near each other by chance: grey pictures of 28 x 28 have 13.
_TELLING, _LEVELS_OF_FEW = 32, LEVELS[-2:]
COPIES = 1e-6  # of rounding, between copies of one sample
LARGEST_SHARE = 1 / 3  # of the samples, in one group
MAX_PAIRS = 2**21
_SCALES = 5
_LARGEST_SIDE = 128  # of an image that is looked at; larger ones are halved first
_MOST_CHANNELS, _MOST_NUMBERS = 32, 256
_LARGEST = 1e15
_NOTHING = 1e-6  # of a number: the rounding of a constant one
_DEVIATION_OF_MEDIAN = 1.4826  # standard deviation over median distance from the median, of a normal distribution
_FARTHEST = 5.0  # standard deviations

_WORDS = "UOS"  # kinds of arrays of text

Labels = NDArray[np.int64]
Numbers = NDArray[np.float32]


def groups_of_alike(data: InputData) -> Labels:
    """The group of each sample, by a number from 0 in the order of their first samples; [samples]."""
    signatures = _signatures(data)
    first, second, distances = _near_pairs(signatures)
    most = max(1, int(LARGEST_SHARE * len(data)))
    for level in LEVELS if signatures.shape[1] >= _TELLING else _LEVELS_OF_FEW:
        labels = joined(len(data), first[distances < level], second[distances < level])
        if np.bincount(labels, minlength=1).max() <= most:
            return labels
    return joined(len(data), first[distances < COPIES], second[distances < COPIES])


def _near_pairs(signatures: Numbers) -> tuple[Labels, Labels, Numbers]:
    """Pairs of samples that are nearer than the highest level, and how near."""
    count = len(signatures)
    order = np.arange(count)
    reach = min(count - 1, max(1, MAX_PAIRS // max(count, 1)))
    if reach < count - 1:
        _, directions = np.linalg.eigh(signatures.T @ signatures)
        order = np.argsort(signatures @ directions[:, -1], kind="stable")
    ordered = signatures[order]
    found: list[tuple[Labels, Labels, Numbers]] = []
    for step in range(1, reach + 1):
        distances = np.square(ordered[step:] - ordered[:-step]).mean(axis=1) / 2
        near = np.flatnonzero(distances < LEVELS[0])
        found.append((order[near], order[near + step], distances[near]))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    first, second, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return first, second, distances


def joined(count: int, first: Labels, second: Labels) -> Labels:
    """Which of `count` things hang together by pairs of them: numbers from 0, in the order of the first ones."""
    labels = np.arange(count)
    while (labels[first] != labels[second]).any():
        lower = np.minimum(labels[first], labels[second])
        for side in (first, second):
            np.minimum.at(labels, labels[side], lower)
        while (labels != labels[labels]).any():
            labels = labels[labels]
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _signatures(data: InputData) -> Numbers:
    """[samples, numbers], of mean 0, so scaled that d of two samples is 1 on average; zeros where nothing varies.

    Every input that varies counts as much as any other.
    """
    parts = []
    for spec in data.specs:
        array = data.arrays[spec.name]
        raw = np.concatenate([_signature(array[rows]) for rows in in_pieces(array)])[: len(data)]
        scaled = _centred(raw) if _are_ids(array) else _scaled(raw)
        if scaled.size:
            parts.append(scaled / np.sqrt(np.square(scaled).sum(axis=1).mean()))
    if not parts:
        return np.zeros((len(data), 1), np.float32)
    numbers = np.concatenate(parts, axis=1)
    return np.asarray(numbers * np.sqrt(numbers.shape[1] / len(parts)), np.float32)


def _centred(numbers: Numbers) -> Numbers:
    """Those that vary, of mean 0. Of counts: ids that hardly ever come say no more than others."""
    centred = numbers - numbers.mean(axis=0)
    varying: Numbers = centred[:, centred.std(axis=0) > _NOTHING]
    return varying


def _scaled(numbers: Numbers) -> Numbers:
    """Those that vary, of mean 0 and one scale, which a few samples unlike all others do not decide."""
    centred = numbers - np.median(numbers, axis=0)
    usual = _DEVIATION_OF_MEDIAN * np.median(np.abs(centred), axis=0)
    scale = np.where(usual > 0, usual, centred.std(axis=0))
    varies = scale > _NOTHING * np.median(np.abs(numbers), axis=0)
    return _centred((centred[:, varies] / scale[varies]).clip(-_FARTHEST, _FARTHEST))


def _signature(samples: Array) -> Numbers:
    """[n, numbers] of samples [n, ...]; [n, 0] where these hold nothing, or complex numbers."""
    if samples.size == 0 or samples.dtype.kind == "c":
        return np.zeros((len(samples), 0), np.float32)
    while samples.ndim > 4 and samples.shape[1] == 1:
        samples = samples[:, 0]
    if _are_ids(samples):
        return _counts(samples.reshape(len(samples), -1))
    if samples.ndim <= 2 or samples.shape[1:-1] == (1,):
        return _floats(_few(samples.reshape(len(samples), -1), 1, _MOST_NUMBERS))
    if samples.ndim > 3 and samples.shape[-1] <= 4 < samples.shape[1]:
        samples = np.moveaxis(samples, -1, 1)
    samples = _few(samples, 1, _MOST_CHANNELS)
    images = samples.reshape(*samples.shape[:2], -1, samples.shape[-1]) if samples.ndim > 3 else samples[:, :, None]
    return _pooled(_floats(images))


def _are_ids(samples: Array) -> bool:
    """Whether these are words, or integers in rows: more axes make an image of them."""
    return samples.dtype.kind in _WORDS or (samples.dtype.kind in "iu" and samples.ndim <= 3)


def _few(samples: Array, axis: int, most: int) -> Array:
    """At most so many along the axis, evenly spread."""
    return samples.take(np.arange(0, samples.shape[axis], -(-samples.shape[axis] // most)), axis=axis)


def _floats(samples: Array) -> Numbers:
    """Finite ones whose squares are finite too."""
    finite = np.nan_to_num(samples.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    return finite.clip(-_LARGEST, _LARGEST).astype(np.float32)


def _counts(ids: Array) -> Numbers:
    """The square root of how often each id comes, so that padding does not outweigh the rest; [n, 256], of ids that are
    the same modulo 256 together."""
    if ids.dtype.kind in _WORDS:
        ids = np.vectorize(lambda text: zlib.crc32(str(text).encode()), otypes=[np.int64])(ids)
    places = np.mod(ids.astype(np.int64), _MOST_NUMBERS) + _MOST_NUMBERS * np.arange(len(ids))[:, None]
    counts = np.bincount(places.reshape(-1), minlength=_MOST_NUMBERS * len(ids))
    return np.sqrt(counts.reshape(len(ids), _MOST_NUMBERS)).astype(np.float32)


def _pooled(images: Numbers) -> Numbers:
    """Of images [n, c, h, w]; see above."""
    while max(images.shape[2:]) > _LARGEST_SIDE:
        images = _halved(images)
    found = [images.mean(axis=(2, 3))]
    for _ in range(_SCALES):
        found.append(images.std(axis=(2, 3)))
        found += [np.abs(np.diff(images, axis=axis)).mean(axis=(2, 3)) for axis in (2, 3) if images.shape[axis] > 1]
        if max(images.shape[2:]) < 4:
            break
        images = _halved(images)
    return np.concatenate(found, axis=1)


def _halved(images: Numbers) -> Numbers:
    """Means of two neighbours along each axis that has some; one left over at an end is left out."""
    height, width = (extent // 2 for extent in images.shape[2:])
    if height:
        images = (images[:, :, : 2 * height : 2] + images[:, :, 1 : 2 * height : 2]) / np.float32(2)
    if width:
        images = (images[:, :, :, : 2 * width : 2] + images[:, :, :, 1 : 2 * width : 2]) / np.float32(2)
    return images
