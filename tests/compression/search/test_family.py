"""Which candidates of a goal come with a model, and that the model is what its row says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from modelpress_compression import Model, Recipe, compress
from modelpress_compression.search.family import FAMILY_SHARE, family


def row(size_bytes: int, *, chosen: bool = False, pareto: bool = True) -> dict[str, Any]:
    """A candidate that was timed."""
    return {"name": "x", "size_bytes": size_bytes, "chosen": chosen, "pareto": pareto}


def offered(rows: list[dict[str, Any]], model: Model, original_bytes: int = 100) -> list[str]:
    """Ids of what can be downloaded."""
    return [member.id for member in family(rows, [model] * len(rows), original_bytes) if member["downloadable"]]


def test_the_front_and_the_chosen_one_are_offered(digits: Model) -> None:
    """Ids go by place; what another beats is only a row."""
    rows = [row(30), row(20, pareto=False), row(40, chosen=True, pareto=False), row(10)]
    assert offered(rows, digits) == ["c1", "c3", "c4"]


def test_all_models_together_are_bounded(digits: Model) -> None:
    """The chosen one first, then the smallest, as long as there is room."""
    rows = [row(100), row(90), row(80), row(95, chosen=True)]
    assert sum(one["size_bytes"] for one in rows) > FAMILY_SHARE * 100
    assert offered(rows, digits) == ["c3", "c4"]


def test_no_model_no_offer() -> None:
    """Candidates of a recipe's steps have figures alone."""
    (member,) = family([row(10, chosen=True)], [None], 100)
    assert (member.model, member["downloadable"]) == (None, False)


@pytest.mark.usefixtures("timed_by_size")
def test_models_of_a_goal_are_written_and_run(digits: Model, tmp_path: Path) -> None:
    """Every member has the size of its row; the chosen one is the result."""
    result = compress(digits, Recipe.from_dict({"version": 1, "goal": {}, "benchmark": {"rounds": 5}}))
    written = {artifact.candidate: artifact.files[0] for artifact in result.write(tmp_path) if artifact.candidate}
    members = [member for member in result.candidates if member["downloadable"]]
    assert len(members) > 1
    assert [member.id for member in members] == list(written)
    for member in members:
        assert written[member.id].stat().st_size == member["size_bytes"]
        ort.InferenceSession(written[member.id], providers=["CPUExecutionProvider"])
    (chosen,) = [member for member in members if member["chosen"]]
    assert onnx.load(written[chosen.id]) == onnx.load(tmp_path / "model.onnx")
    assert [dict(member) for member in result.candidates] == result.report["candidates"]
