"""Sparsity as a share of MACs or parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
from modelpress_compression import InputData, Model
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel import budget
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune


def config(**options: object) -> PruneConfig:
    return PruneConfig(structure="channel", repair="none", round_to=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("unit", ["macs", "parameters"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_so_much_of_the_model_goes(
    digits: Model, samples: InputData, tmp_path: Path, scope: str, unit: str, share: float
) -> None:
    """What is counted in the result is what was asked for, to 4 points: channels go in pairs."""
    result = Prune(config(sparsity=share, sparsity_of=unit, scope=scope))(digits, Context(samples, tmp_path))
    shapes = sample_shapes(samples)
    if unit == "macs":
        before, after = (count_macs(model, shapes).total or 0 for model in (digits, result.model))
    else:
        before, after = (sum(tensor.size for tensor in model.tensors()) for model in (digits, result.model))
    assert 1 - after / before == pytest.approx(share, abs=0.04)
    assert result.changes[f"{unit}_removed_share"] == pytest.approx(1 - after / before)


def test_a_share_that_is_missed_is_told(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """By more than five points: a warning says what went in its place."""
    found = budget.budget_of(digits, config(sparsity=0.5, sparsity_of="macs"), Context(samples, tmp_path))
    assert found is not None
    assert found.warnings(0.48) == ()
    (warning,) = found.warnings(0.3)
    assert "Of the macs 30% went, not 50%" in warning


def test_channels_need_no_budget(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """They are counted as they are; and a sparsity of 0 is a share of nothing."""
    context = Context(samples, tmp_path)
    assert budget.budget_of(digits, config(sparsity=0.5), context) is None
    assert budget.budget_of(digits, config(sparsity=0.0, sparsity_of="macs"), context) is None


def test_unknown_macs_are_parameters(
    digits: Model, samples: InputData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with an operator whose MACs nobody knows loses parameters, and a warning says so."""
    monkeypatch.setattr(budget, "count_macs", lambda model, shapes: count_macs(model, {}).__class__(None, {}))
    result = Prune(config(sparsity=0.4, sparsity_of="macs"))(digits, Context(samples, tmp_path))
    assert result.changes["parameters_removed_share"] == pytest.approx(0.4, abs=0.05)
    assert any("MACs of the model are not known" in warning for warning in result.warnings)
