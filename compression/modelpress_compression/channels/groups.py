"""What the analysis of channels says: groups of indices that must be cut together, and what cannot be cut.

A group has `units`: channels, attention heads, hidden units, or interleaved channels of a grouped convolution. Unit u
owns, in each member, the indices `member.indices[u]` of one axis of one constant tensor; cutting it removes them all.
Shapes, attributes (`group`, `num_heads`, `hidden_size`) and constants that hold extents are mended by `cut`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Role = Literal["producer", "consumer", "passenger"]
Kind = Literal["channel", "head", "hidden", "group"]


@dataclass(frozen=True)
class Member:
    """One axis of one constant tensor that shrinks with the group.

    `tensor`: name of the initializer or of a Constant node's output; `axis`: counted from 0.
    `indices`, of shape [units, k]: unit u owns these k indices of the axis, in rising order; k may differ by member.
    `role`: "producer" makes the channels (rows of a Conv's weight), "consumer" reads them (its columns), "passenger"
    follows (bias, norm scale, slope of a PRelu). `node`: the label of the node that uses the tensor so.
    """

    tensor: str
    axis: int
    indices: Indices
    role: Role
    node: str


@dataclass(frozen=True)
class Group:
    """Units that can be cut, each independently of the others of the group.

    `id`: the label of the first node that makes the channels, with a suffix where one node makes several groups.
    `kind`: "channel", "head" (whole attention heads), "hidden" (units of a recurrent layer) or "group" (channels that
    stand at the same place of every convolution group).
    `parameters_per_unit`: how many numbers go with one unit while all other groups stay whole.
    `align`: how many indices of the first producer one unit stands for; rounding counts these.
    """

    id: str
    units: int
    kind: Kind
    members: tuple[Member, ...]
    parameters_per_unit: float
    align: int = 1


@dataclass(frozen=True)
class Frozen:
    """Channels that stay: where they are made, how many, and why."""

    node: str
    channels: int
    reason: str


@dataclass(frozen=True)
class Analysis:
    """All groups of a model, in the order of their first producers, and what is frozen."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]

    def group(self, identifier: str) -> Group:
        """The group of this id; raises KeyError."""
        for group in self.groups:
            if group.id == identifier:
                return group
        raise KeyError(f"no group {identifier!r}")
