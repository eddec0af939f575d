"""What layers take at several widths, in float32 and in 8 bits, and which arithmetic the joint choice builds by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from modelpress_compression import InputData, Model
from modelpress_compression.channels import find_groups
from modelpress_compression.measure.layer_times import LayerTime
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.search import width_times as module
from modelpress_compression.search.joint import PRUNE
from modelpress_compression.search.joint_forms import ComputedForms
from modelpress_compression.search.joint_solver import Width, solve
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.width_times import width_times
from modelpress_compression.search.widths import MEASURED


def timed(monkeypatch: pytest.MonkeyPatch, in_8_bits: float) -> None:
    """A layer takes a millisecond for 1,000 numbers of its weight in float32, and `in_8_bits` of that in 8 bits."""

    def times(models: Sequence[Model], *_: Any) -> list[Mapping[str, LayerTime]]:
        found = []
        for place, model in enumerate(models):
            sizes = {node.name or "": _numbers(models[place - place % 2], node.name or "") for node in model.nodes()}
            factor = in_8_bits if place % 2 else 1.0
            found.append({name: LayerTime(factor * size / 1e3, "Conv", "float") for name, size in sizes.items()})
        return found

    monkeypatch.setattr(module, "layer_times", times)


def _numbers(model: Model, name: str) -> int:
    node = next((node for node in model.nodes() if node.name == name), None)
    weight = node.inputs[1] if node is not None and len(node.inputs) > 1 else None
    return weight.const_value.size if weight is not None and weight.const_value is not None else 0


def test_curves_rise_with_what_is_left(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """Measured, not made up: every layer of the network has both, from the narrowest to the whole weight."""
    groups = find_groups(digits).groups
    curves = width_times(digits, groups, PRUNE, QuantizeConfig(scheme="static"), Context(samples, tmp_path), 1)
    weighted = [node for node in digits.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert {curve.output for curve in curves} == {node.outputs[0].name for node in weighted}
    assert any(curve.in_8_bits for curve in curves)
    for curve in curves:
        for points in filter(None, (curve.in_float, curve.in_8_bits)):
            assert points[-1][0] == 1.0
            assert list(points) == sorted(points)
            assert [ms for _, ms in points] == sorted(ms for _, ms in points)
            assert len(points) <= 1 + len(MEASURED)


def test_layers_go_to_8_bits_where_these_are_faster(search: SchemeSearch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time: all that have such a form, in a model that is built; twice the time: none, and no model."""
    groups = find_groups(search.model).groups
    widths = [[Width(0.0, 0.0)] for _ in groups]
    for factor, integer in ((0.5, True), (2.0, False)):
        timed(monkeypatch, factor)
        forms = ComputedForms(search, PRUNE)
        weights = forms.weights(groups, ())
        assert any(len(weight.forms) == 2 for weight in weights)
        choice = solve(widths, weights, 0.1)
        assert choice is not None
        places = choice[len(groups) :]
        assert any(places) == integer
        built = forms.built(search, places, "for a test")
        if not integer:
            assert built is None
            continue
        assert built is not None
        assert built.scheme == "static"
        assert built.variant.startswith(f"{sum(places)} of {len(places)} layers")
        written = [node.op_type for node in built.record.model.nodes()]
        assert written.count("QuantizeLinear") >= 1
