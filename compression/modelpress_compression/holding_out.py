"""Samples that are held out of fits, to say what these are worth on samples that they have not seen.

Samples that show the same thing (alike.py) lie on the same side: a crop of a photo says nothing new of what was fitted
to another crop of it. Where that leaves no choice, because all samples are alike, each is taken for itself.

    groups      in the order of their first samples
    held out    a group, as soon as the groups so far, this one included, allow for it: one sample in `every`; the
                smallest where none is

Where no two samples are alike, that is every fifth one. Large groups are held out like others: to fit to them all and
judge by what is alone would judge by the unusual. Of a text recognizer, whose short lines count as alike, static
quantization so lost 4 dB.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.alike import groups_of_alike, joined
from modelpress_compression.inputs import InputData

HELD_OUT = 5  # one in so many; of fewer than ten groups one in four, three or two

Indices = NDArray[np.int64]


def held_out(data: InputData, every: int = HELD_OUT) -> frozenset[int]:
    """Numbers of the feeds of `data.feeds(1)` that nothing is to be fitted to; none where there are fewer than two."""
    groups = _groups_of_feeds(data)
    if len(groups) < 2:
        return frozenset()
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        groups, sizes = np.arange(len(groups)), np.ones(len(groups), np.int64)
    every = max(2, min(every, len(sizes) // 2))
    seen, held, chosen = 0, 0, []
    for group in range(len(sizes)):
        seen += sizes[group]
        if every * (held + sizes[group]) <= seen:
            held += sizes[group]
            chosen.append(group)
    return frozenset(np.flatnonzero(np.isin(groups, chosen or [int(sizes.argmin())])).tolist())


def parted(data: InputData, every: int = HELD_OUT) -> tuple[InputData, InputData]:
    """The samples to fit to, and those that are held out; nothing is copied."""
    held = held_out(data, every)
    feeds = range(data.feed_count)
    return data.only([feed for feed in feeds if feed not in held]), data.only(sorted(held))


def random_share(data: InputData, share: float, seed: int) -> tuple[Indices, Indices]:
    """Indices of samples: those to train with, in a random order, and about this share of all, held out, in theirs."""
    order = np.random.default_rng(seed).permutation(len(data)).astype(np.int64)
    groups, unit = groups_of_alike(data), data.feed_size
    sizes = np.bincount(groups)
    left = max(1, round(len(data) * share / unit)) * unit
    if len(sizes) < 2 or sizes.min() > len(data) - unit:
        return order[left:], np.sort(order[:left])
    chosen = []
    for group in dict.fromkeys(groups[order].tolist()):
        if sizes[group] <= left:
            chosen.append(group)
            left -= sizes[group]
    held = np.isin(groups, chosen or [int(sizes.argmin())])
    return order[~held[order]], np.flatnonzero(held)


def _groups_of_feeds(data: InputData) -> Indices:
    """The group of each feed; feeds of several samples go together where any of these are alike."""
    size, count = data.feed_size, data.feed_count
    groups = groups_of_alike(data)[: count * size]
    _, first = np.unique(groups, return_index=True)
    return joined(count, np.arange(len(groups)) // size, first[groups] // size)
