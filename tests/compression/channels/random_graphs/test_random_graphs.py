"""Random graphs: a cut model equals the masked one, with which it shares no code, and a wrong cut does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from modelpress_compression.channels import cut, find_groups
from oracles.masking import masked

RTOL, ATOL = 1e-3, 1e-4
Graphs = Callable[..., st.SearchStrategy[Any]]
_SETTINGS = settings(
    max_examples=60,
    derandomize=True,
    database=None,
    print_blob=False,
)


@pytest.mark.parametrize("graph_kind", ["images", "tokens"])
def test_graphs(random_graphs: Graphs, graph_kind: str) -> None:
    """Graphs of up to eight steps: cut equals masked, rtol 1e-3, atol 1e-4."""

    @_SETTINGS
    @given(case=random_graphs(graph_kind, 8), data=st.data())
    def check(case: Any, data: st.DataObject) -> None:
        case.check(data)

    check()


def test_each_step(random_graphs: Graphs, kind: str, step: Callable[..., Any]) -> None:
    """Each kind of step directly between two layers, in several of its variants: cut equals masked."""

    @settings(_SETTINGS, max_examples=6)
    @given(case=random_graphs(kind, 1, (step,)), data=st.data())
    def check(case: Any, data: st.DataObject) -> None:
        case.check(data)

    check()


def _relu(b: Any, x: Any, _: list[Any]) -> list[Any]:
    return [replace(x, name=b("Relu", x.name))]


def test_a_wrong_pairing_is_noticed(random_graphs: Graphs) -> None:
    """If the analysis paired a consumer's columns with other units, cut and masked model would differ."""
    noticed = []

    @settings(_SETTINGS, max_examples=10)
    @given(case=random_graphs("images", 1, (_relu,)))
    def check(case: Any) -> None:
        analysis = find_groups(case.model)
        group = next((group for group in analysis.groups if group.units > 1), None)
        assume(group is not None)
        members = tuple(
            replace(member, indices=member.indices[::-1]) if member.role == "consumer" else member
            for member in group.members
        )
        kept = {group.id: np.array([0], np.int64)}
        wrong = replace(analysis, groups=(replace(group, members=members),))
        got = case.run(cut(case.model, kept))
        expected = case.run(masked(case.model, wrong, kept, {"x": case.x}))
        noticed.append(any(not np.allclose(got[name], expected[name], rtol=RTOL, atol=ATOL) for name in expected))

    check()
    assert noticed
    assert all(noticed)
