"""The masked model: what a cut of channels must be equal to, made without the code that cuts.

    masked(model, analysis, kept, feeds)    the full model, of whose units only those in `kept` have any effect

Nothing is removed. A unit that is cut is silenced where it is read: the columns of every consumer's weight that belong
to it are zero. What then still depends on it are statistics over the channels (LayerNormalization and its like, written
as one operator or in parts): these are rewritten so that they leave its elements out. Which elements those are is not
taken from the analysis but measured, by runs that differ in the silenced units alone; see `probe`.

The weights keep their places, so an analysis that pairs the wrong indices gives a cut that differs from this model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from modelpress_compression.channels.groups import Analysis, Group, Indices, Member
from modelpress_compression.inputs import Feeds
from modelpress_compression.model import Model

from oracles.masking.constants import Constants
from oracles.masking.probe import find_statistics
from oracles.masking.statistics import exclude

__all__ = ["masked"]


def masked(model: Model, analysis: Analysis, kept: Mapping[str, Indices], feeds: Feeds) -> Model:
    """A copy of `model` on whose outputs the units of `analysis` that are not kept have no influence.

    `kept`: group id -> units that stay; groups that are not named stay whole. The masks of statistics are written for
    the extents of `feeds`: the result is to be run on inputs of these shapes. Raises KeyError for an unknown group or
    tensor, ModelNotRunnableError where the model does not run on `feeds`.
    """
    cut = {identifier: _cut_units(analysis.group(identifier), units) for identifier, units in kept.items()}
    members = [
        (member, member.indices[units].reshape(-1))
        for identifier, units in cut.items()
        for member in analysis.group(identifier).members
        if len(units)
    ]
    silent = model.clone()
    _silence(silent, members)
    for statistic in find_statistics(silent, members, feeds):
        exclude(statistic.node, statistic.dead)
    return silent


def _cut_units(group: Group, kept: Indices) -> Indices:
    return np.setdiff1d(np.arange(group.units, dtype=np.int64), kept)


def _silence(model: Model, members: list[tuple[Member, Indices]]) -> None:
    """Zeroes what reads the silenced units."""
    constants = Constants(model)
    for member, indices in members:
        if member.role != "consumer":
            continue

        def zero(array: np.ndarray, member: Member = member, indices: Indices = indices) -> None:
            array[(slice(None),) * member.axis + (indices,)] = 0

        constants.change(member.tensor, member.node, zero)
    constants.write()
