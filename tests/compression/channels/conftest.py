"""Graphs as text, and what a cut must leave: the output of the model whose cut units nobody reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.channels import Analysis, cut, find_groups
from modelpress_compression.model import Model
from modelpress_compression.runtime import run, session_of
from oracles.masking import masked


@pytest.fixture
def check_cut() -> Callable[..., tuple[Analysis, Model]]:
    """Cuts every group to its odd units, compares with the masked model at rtol 1e-3, atol 1e-4."""

    def check(model: Model, feeds: Mapping[str, np.ndarray]) -> tuple[Analysis, Model]:
        analysis = find_groups(model)
        kept = {group.id: np.arange(1, group.units, 2, dtype=np.int64) for group in analysis.groups}
        small = cut(model, kept)
        reference = masked(model, analysis, kept, dict(feeds))
        for ours, theirs in zip(outputs(small, feeds), outputs(reference, feeds), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
        return analysis, small

    return check


def outputs(model: Model, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    with session_of(model, optimize=False) as session:
        return list(run(session, dict(feeds)).values())


@pytest.fixture
def shapes_of() -> Callable[[Model], dict[str, tuple[int, ...]]]:
    """Shapes of all initializers by name."""

    def shapes(model: Model) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(value.const_value.shape.numpy())
            for graph in model.graphs()
            for name, value in graph.initializers.items()
            if isinstance(value, onnx_ir.Value) and value.const_value is not None
        }

    return shapes
