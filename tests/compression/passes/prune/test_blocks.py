"""Branches beside skip connections go, those first that say the least, and the layers behind them make up for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from onnx import helper

WIDTH = 16


def layer(rng: np.random.Generator, scale: float = 1.0, inputs: int = WIDTH) -> Any:
    return scale * rng.standard_normal((WIDTH, inputs)) / np.sqrt(inputs)


def rows(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def pruned(model: Any, samples: int = 200, provided: bool = True, **options: Any) -> Any:
    data = replace(InputData.from_arrays({"x": rows(samples)}, model.inputs), provided=provided)
    with TemporaryDirectory() as folder:
        return Prune(PruneConfig(structure="block", **options))(model, Context(data, Path(folder)))


def names_of(model: Any) -> set[str]:
    return {node.name for node in model.nodes()}


def removed(result: Any) -> list[str]:
    return [row["block"] for row in result.details]


def error_of(model: Any, other: Any, outputs_of: Callable[..., Any]) -> float:
    """On samples that no fit has seen, as a share of the power."""
    fresh = rows(300, seed=9)
    expected, got = outputs_of(model, fresh), outputs_of(other, fresh)
    return float(((expected - got) ** 2).sum() / (expected**2).sum())


def test_the_block_that_says_least_goes(residual: Any, outputs_of: Callable[..., Any]) -> None:
    """A third of three blocks is one: nodes and numbers of its branch go, its sum too, and everything else stays."""
    result = pruned(residual, sparsity=0.33)
    assert removed(result) == ["sum1"]
    assert names_of(residual) - names_of(result.model) == {"in1", "inner1", "out1", "sum1"}
    assert names_of(result.model) < names_of(residual)
    assert result.changes["blocks_removed"] == 1
    biases = 5 * WIDTH + 4  # which repair gives to the layers behind
    assert result.changes["parameters_removed_share"] == pytest.approx((2 * WIDTH**2 - biases) / (8.25 * WIDTH**2))
    assert {skip.node for skip in result.skipped} >= {"sum2", "sum3"}
    assert error_of(residual, result.model, outputs_of) < 0.01


def test_the_layers_behind_are_fitted(residual: Any, outputs_of: Callable[..., Any]) -> None:
    """Without a block that says much, repair takes away at least half of the error on samples that it has not seen."""
    options: dict[str, Any] = {"sparsity": 0.0, "overrides": (("sum2", 0.9),)}
    plain, fitted = (pruned(residual, repair=repair, **options) for repair in ("none", "least_squares"))
    assert removed(plain) == removed(fitted) == ["sum2"]
    assert fitted.changes["layers_repaired"] >= 3
    errors = [error_of(residual, one.model, outputs_of) for one in (plain, fitted)]
    assert errors[1] < errors[0] / 2


def test_repair_by_name_needs_data(residual: Any) -> None:
    """Synthetic inputs are none: it is refused, in words; `auto` does without, and says so."""
    with pytest.raises(InvalidDataError, match="prune with repair 'least_squares' needs representative inputs"):
        pruned(residual, provided=False, repair="least_squares")
    assert any("were not fitted anew" in text for text in pruned(residual, provided=False, sparsity=0.33).warnings)


def test_a_projection_stays(residual: Any) -> None:
    """Of two operands with layers the one with fewer numbers."""
    result = pruned(residual, sparsity=0.0, overrides=(("sum3", 0.5),))
    assert "projection" in names_of(result.model)
    assert not names_of(result.model) & {"in3", "out3", "sum3"}


def test_what_is_excluded_or_overridden_stays(residual: Any) -> None:
    """A weight inside a branch keeps all of it; an override of less than a half keeps a branch too."""
    result = pruned(residual, sparsity=0.9, exclude=("b1",), overrides=(("sum2", 0.1),))
    assert removed(result) == ["sum3"]
    assert ("sum1", "Excluded by the recipe.") in [(skip.node, skip.reason) for skip in result.skipped]


def test_an_override_that_matches_no_branch_is_named(residual: Any) -> None:
    """A slip of the pen, or a layer inside a branch, changes nothing and is told."""
    result = pruned(residual, sparsity=0.0, overrides=(("sum2", 0.9), ("in1", 0.9), ("smu*", 0.9)))
    assert removed(result) == ["sum2"]
    assert [warning for warning in result.warnings if "override" in warning] == [
        "The override 'in1' matches no branch that can go.",
        "The override 'smu*' matches no branch that can go.",
    ]


@pytest.mark.parametrize("normalize", ["none", "parameters", "macs", "latency"])
def test_whatever_a_block_costs_in(residual: Any, normalize: str) -> None:
    """All three cost about the same here, so that the one that says least goes first in any measure."""
    assert removed(pruned(residual, sparsity=0.33, normalize=normalize)) == ["sum1"]


def test_a_second_run_finds_the_blocks_that_are_left(residual: Any) -> None:
    """And where none is left, nothing changes, and a warning says why."""
    once = pruned(residual, sparsity=0.9)
    assert len(removed(once)) == 3
    again = pruned(once.model, sparsity=0.9)
    assert not again.changed
    assert "no branch beside a skip connection" in again.warnings[-1]


def test_a_sum_that_broadcasts_stays(channel_model: Callable[..., Any]) -> None:
    """Without the branch its values would have another shape."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="fc", transB=1),
        helper.make_node("ReduceMean", ["h"], ["m"], name="mean", axes=[1]),
        helper.make_node("Add", ["x", "m"], ["s"], name="sum"),
        helper.make_node("Gemm", ["s", "v"], ["y"], name="head", transB=1),
    ]
    model = channel_model(nodes, {"w": layer(rng), "v": layer(rng)}, ["n", WIDTH], ["n", WIDTH])
    result = pruned(model, sparsity=0.9)
    assert not result.changed
    assert [skip.node for skip in result.skipped] == ["sum"]
