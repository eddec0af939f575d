"""What a criterion is: something that says how important every unit of every group is.

Importance is additive: that of a unit is the sum over the weights that go with it, so that importance divided by what a
unit costs compares channels of different layers. Only the order matters within a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.analysis.channels import Group
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context

Scores = NDArray[np.float64]


class Criterion(Protocol):
    """Judges units. `needs_data`: whether it reads `context.data`, which must then be the user's."""

    needs_data: bool

    def __call__(self, model: Model, groups: Sequence[Group], context: Context) -> Mapping[str, Scores]:
        """Importance, at least 0, of each unit by the group's id: arrays [units]. Raises TimeLimitError."""
        ...
