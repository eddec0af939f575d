"""What a criterion is: something that says how important every unit of every group is.

Importance is a share: of the magnitude, or of the answer, of the layers that make and read the unit. Summed over these
layers it compares channels of different groups, and may be divided by what they cost. Within a group only the order
matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from modelpress_compression.channels import Group
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context

Scores = NDArray[np.float64]


class Criterion(Protocol):
    """Judges units. `needs_data`: whether it reads `context.data`, which must then be the user's."""

    needs_data: bool

    def __call__(self, model: Model, groups: Sequence[Group], context: Context) -> Mapping[str, Scores]:
        """Importance, at least 0, of each unit by the group's id: arrays [units]. Raises TimeLimitError."""
        ...
