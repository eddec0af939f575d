"""Random importance: the control that shows what a criterion is worth."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from modelpress_compression.channels import Group
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.criterion import Scores


class Random:
    """Draws importance in (0, 1]."""

    needs_data = False

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, model: Model, groups: Sequence[Group], context: Context) -> Mapping[str, Scores]:
        """The seed belongs to the group's id, so that other layers do not change what is drawn for this one."""
        return {
            group.id: 1.0 - np.random.default_rng([self._seed, zlib.crc32(group.id.encode())]).random(group.units)
            for group in groups
        }
