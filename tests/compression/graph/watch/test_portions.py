"""How much of a model is looked at together, and that nothing depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression.graph import watch
from modelpress_compression.graph.shapes import static_shapes
from modelpress_compression.graph.watch import portions as module
from modelpress_compression.graph.watch.portions import activations_bytes, made_bytes, portions, sample_bytes
from modelpress_compression.inputs import InputData, values_bytes
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.quantize.ranges.observers import observe
from modelpress_compression.runtime import run

COMPUTED = """
<ir_version: 8, opset_import: ["": 17]>
computed (float[n, 4] x, int64[2] extents) => (float[a, b] y) {
  a = Relu(x)
  s = Add(a, a)
  y = Reshape(s, extents)
}
"""
POSITIONS = """
<ir_version: 8, opset_import: ["": 17]>
positions (float[n, 4] x) => (float[2, m] y) {
  a = Exp(x)
  k = NonZero(a)
  y = Cast<to = 1>(k)
}
"""


def test_sizes_of_one_sample(chain: Any, images: Any, data_of: Any) -> None:
    """What one sample makes of a value, by what the graph tells of it, is what a run gives; unknown names count 0."""
    model = chain()
    samples = data_of(model, images(5))
    names = [value.name for node in model.graph for value in node.outputs]
    with watch.taps(model, names) as look:
        seen = look({"x": images(1)})
    found = sample_bytes(model, [*names, "nothing"], samples)
    assert found == {**{name: array.nbytes for name, array in seen.items()}, "nothing": 0}
    assert activations_bytes(model, samples) == sum(made_bytes(model, samples)) == values_bytes(seen)


def test_shapes_that_only_a_run_tells(model_from_text: Any) -> None:
    """Where a shape is computed from data, the model runs; no activation is handed out for that."""
    model = model_from_text(COMPUTED)
    samples = InputData.from_arrays({"x": np.ones((3, 4), np.float32), "extents": np.array([[2, 2]] * 3)}, model.inputs)
    assert sample_bytes(model, ["a", "s"], samples) == {"a": 16, "s": 16}


def test_a_run_for_shapes_holds_no_activations(model_from_text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 65,536 numbers and more of each value only the shape comes back, some bytes each."""
    model, handed_out = model_from_text(POSITIONS), []

    def running(session: Any, feed: Any) -> Any:
        found = run(session, feed)
        handed_out.append(values_bytes(found))
        return found

    monkeypatch.setattr(watch, "run", running)
    ir = static_shapes(model, {"x": (16384, 4)})
    shapes = {value.name: value.shape for node in ir.graph for value in node.outputs}
    assert shapes["y"] is not None
    assert list(shapes["y"]) == [2, 65536]
    assert handed_out
    assert max(handed_out) < 256


def test_portions_stay_within_the_budget(
    chain: Any, images: Any, data_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, as many groups as fit; one that does not fit by itself stands alone; shared values count once."""
    model = chain()
    samples = data_of(model, images(2))
    size = sample_bytes(model, ["c1"], samples)["c1"]
    groups = [("c1",), ("r1",), ("c1", "r1"), ("c2",)]
    assert list(portions(model, groups, samples)) == [[0, 1, 2, 3]]
    monkeypatch.setattr(module, "WATCHED_BYTES", 2 * size)
    assert next(iter(portions(model, groups, samples))) == [0, 1, 2]
    monkeypatch.setattr(module, "WATCHED_BYTES", 1)
    assert list(portions(model, groups, samples)) == [[0], [1], [2], [3]]
    assert list(portions(model, [], samples)) == []


def test_calibration_in_portions_is_the_same(
    chain: Any, images: Any, data_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histograms of one activation at a time are those of all at once, to the last count; the share that is done still
    goes from 0 to 1."""
    model = chain()
    context = Context(data_of(model, images(4)), tmp_path)
    values = [value for node in model.graph for value in node.outputs]
    heard: list[float] = []
    whole = observe(model, values, context)
    monkeypatch.setattr(module, "WATCHED_BYTES", 1)
    parts = observe(model, values, context, heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert len(heard) == 4 * len(values)
    for name, histogram in whole.items():
        np.testing.assert_array_equal(parts[name].counts, histogram.counts)
        assert (parts[name].low, parts[name].high) == (histogram.low, histogram.high)
