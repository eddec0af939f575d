"""What widths err: as the model does that is cut so, more where more goes; and which part of a weight a group owns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from modelpress_compression import InputData, Model
from modelpress_compression.channels import find_groups
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.prune import prune_channels
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.search import widths
from modelpress_compression.search.widths import owned_axes, width_errors

CONFIG = PruneConfig(structure="channel", scope="layer", sparsity=0.0, criterion="activation", round_to=4)


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_errors_are_those_of_the_cut_model(digits: Model, samples: InputData, tmp_path: Path, criterion: str) -> None:
    """A recipe that cuts one group by a share that was measured errs as was said, and errors rise with the share."""
    context = Context(samples, tmp_path)
    errors = width_errors(digits, replace(CONFIG, criterion=criterion), context)
    assert any(errors.values())
    for name, own in errors.items():
        rising = [error for _, error in sorted(own.items())]
        assert rising == sorted(rising)
        if 0.5 in own:
            config = PruneConfig(
                structure="channel",
                scope="layer",
                sparsity=0.0,
                criterion=criterion,
                round_to=4,
                overrides=((name, 0.5),),
            )
            cut = prune_channels(digits, config, context).model
            assert own[0.5] == pytest.approx(output_distances(digits, cut, context).error, rel=0.3)


def test_what_takes_too_long_is_not_measured(
    digits: Model, samples: InputData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known after the first group, and told in the log."""
    monkeypatch.setattr(widths, "LIMIT_S", 0.0)
    told: list[str] = []
    assert width_errors(digits, CONFIG, Context(samples, tmp_path, log=told.append)) == {}
    assert "too long" in told[0]


def test_a_group_owns_axes_of_its_makers_and_readers(digits: Model) -> None:
    """Of every group one axis of some weight, wholly; and no axis more than wholly."""
    groups = find_groups(digits).groups
    tensors = {member.tensor for group in groups for member in group.members}
    axes = {name: owned_axes(digits, groups, name) for name in tensors}
    for number in range(len(groups)):
        assert any(axis.get(number) == 1.0 for own in axes.values() for axis in own)
    assert all(sum(axis.values()) <= 1.0 for own in axes.values() for axis in own)
