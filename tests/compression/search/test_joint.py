"""Widths, branches and arithmetic chosen together by their prices: what is built is what the prices speak for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression import InputData, Model, Recipe
from modelpress_compression.channels import find_groups
from modelpress_compression.measure.layer_times import LayerTime
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.recipe import Step
from modelpress_compression.search import width_times
from modelpress_compression.search.entries import Entry
from modelpress_compression.search.joint import PRUNE, JointSearch, cutting_steps
from modelpress_compression.search.joint_forms import ComputedForms
from modelpress_compression.search.joint_solver import Width
from modelpress_compression.search.judge import Judge
from modelpress_compression.search.levers import LeverSearch
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.steps import StepRecord, apply_step


def joint_of(model: Model, folder: Path) -> JointSearch:
    """Of the time of a model whose 200 random inputs judge it; nothing is trained."""
    rows = np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32)
    context = Context(InputData.from_arrays({"x": rows}, model.inputs), folder)
    path = folder / "float" / "model.onnx"
    path.parent.mkdir()
    model.save(path)
    recipe = Recipe.from_dict({"version": 1, "goal": {"objective": "fastest"}})
    judge = Judge(path, path, context, recipe, None)
    start = (StepRecord(Step("fuse", FuseConfig()), model, path),)
    numbers = iter(range(1000))

    def target() -> Path:
        return folder / f"made-{next(numbers)}" / "model.onnx"

    def schemes(chain: tuple[StepRecord, ...]) -> SchemeSearch:
        last = chain[-1]
        return SchemeSearch(
            Step("quantize", QuantizeConfig()), last.model, last.path, context, target(), judge, judge.recall
        )

    lever = LeverSearch(
        "prune",
        "fastest",
        context,
        apply=lambda record, context: apply_step(record.step, record.model, record.path, context, target()),
        judge=judge.answers,
        left_s=lambda: math.inf,
        trains=False,
        cuts=1,
    )
    whole = schemes(start)
    return JointSearch(whole, ComputedForms(whole, PRUNE), lever, start, schemes)


@pytest.mark.parametrize("in_8_bits", [0.5, 2.0])
def test_a_branch_goes_where_narrow_layers_are_not_faster(
    residual: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_8_bits: float
) -> None:
    """Every layer takes as long at any width. So the branch that says little goes, no channel does, and the rest is in
    8 bits where these are faster. What is built last keeps the answers, or what was built before it does."""

    def times(models: Sequence[Model], *_: Any) -> list[Mapping[str, LayerTime]]:
        names = [node.name or "" for node in models[0].nodes()]
        return [
            {name: LayerTime(in_8_bits if place % 2 else 1.0, "Gemm", "float") for name in names}
            for place in range(len(models))
        ]

    monkeypatch.setattr(width_times, "layer_times", times)
    built = joint_of(residual, tmp_path)
    made = list(built.cuts())
    pruned = [cut.candidate.record for cut in made if cut.candidate.technique == "prune"]
    assert pruned
    assert all(record.step.config.structure == "block" for record in pruned)
    kept = [cut for cut in made if not cut.candidate.reason]
    assert kept
    (cut,) = kept[-1:]
    names = {node.name for node in cut.candidate.record.model.nodes()}
    assert not names & {"in1", "out1", "sum1"}
    assert {"in2", "out2", "sum2"} <= names
    integers = [one for one in made if one.candidate.scheme == "static"]
    assert bool(integers) == (in_8_bits < 1)
    assert all("chosen with the widths" in one.candidate.name for one in integers)
    entries = [Entry(one.candidate, built.whole.judge, one.before) for one in made]
    assert all(entry.is_cut for entry in entries)
    trained = replace(integers[0].candidate, technique="distill", scheme="", variant="") if integers else None
    if trained is not None:  # as it is called once it was trained in its 8 bits
        name = Entry(trained, built.whole.judge, integers[0].chain).name
        assert name == "prune by prices, quantize static, distill"


@pytest.mark.parametrize("criterion", ["activation", "taylor"])
def test_channels_go_by_the_criterion_that_is_given(residual: Model, criterion: str) -> None:
    """Of every group the share of its width, in one step, and nothing of those that stay as wide."""
    groups = find_groups(residual).groups
    parts = [Width(0.5 if number else 0.0, 0.1) for number in range(len(groups))]
    (step,) = cutting_steps(groups, [], parts, replace(PRUNE, criterion=criterion))
    assert step.config.criterion == criterion
    assert [share for _, share in step.config.overrides] == [0.5] * (len(groups) - 1)
