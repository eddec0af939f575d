"""Inner values are what the whole model makes of them, one sample at a time."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression import parallel
from modelpress_compression.errors import TimeLimitError
from modelpress_compression.graph import watch
from modelpress_compression.graph.watch import observable, stream, taps
from modelpress_compression.inputs import InputData
from modelpress_compression.runtime import run

MASKED = """
<ir_version: 8, opset_import: ["": 17]>
masked (int64[n, t] attention_mask, float[n, t, 2] x) => (float[n, t, 2] y) {
  a = Neg(x)
  y = Relu(a)
}
"""


def test_taps_give_inputs_and_inner_values(chain: Any, images: Any) -> None:
    """An input is what was fed; an inner value follows from the one before it (exactly, a Relu)."""
    x = images(2)
    with taps(chain(), ["x", "c1", "r1"]) as look:
        found = look({"x": x})
    np.testing.assert_array_equal(found["x"], x)
    np.testing.assert_array_equal(found["r1"], np.maximum(found["c1"], 0))


def test_inputs_alone_need_no_run(model_from_text: Any) -> None:
    """A model that cannot run hands out its inputs nevertheless, since nothing is run for them."""
    model = model_from_text(MASKED.replace("Neg", "Unknown"))
    with taps(model, ["x"]) as look:
        assert list(look({"x": np.ones((1, 1, 2), np.float32)})) == ["x"]


def test_stream_goes_through_the_samples_in_order(chain: Any, images: Any, data_of: Any) -> None:
    """Each sample's values come once, in order, and the listener hears the share that is done."""
    model, x = chain(), images(4)
    heard: list[float] = []
    found = [values["x"] for values in stream(model, ["x", "f"], data_of(model, x), lambda: None, heard.append)]
    np.testing.assert_array_equal(np.concatenate(found), x)
    assert heard == [0.25, 0.5, 0.75, 1.0]


def test_a_sample_is_let_go(chain: Any, images: Any, data_of: Any) -> None:
    """While one sample is looked at, no activation of an earlier one is alive, unless the caller keeps it."""
    model = chain()
    names = ["c1", "r1", "c2", "y"]
    earlier: list[weakref.ref[Any]] = []
    for values in stream(model, names, data_of(model, images(6)), lambda: None):
        assert sorted(values) == sorted(names)
        assert [reference() for reference in earlier if reference() is not None] == []
        earlier = [*earlier, *(weakref.ref(array) for array in values.values())]
    assert len(earlier) == 6 * len(names)


def test_no_earlier_sample_is_held_while_the_next_runs(
    chain: Any, images: Any, data_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of large activations there are never those of two samples, though the caller's loop still names the first."""
    handed_out: list[weakref.ref[Any]] = []

    def running(session: Any, feed: Any) -> Any:
        assert [reference() for reference in handed_out if reference() is not None] == []
        return run(session, feed)

    monkeypatch.setattr(parallel, "AHEAD_BYTES", 0)
    monkeypatch.setattr(watch, "run", running)
    for values in stream(chain(), ["c1", "y"], data_of(chain(), images(3)), lambda: None):
        handed_out += [weakref.ref(array) for array in values.values()]
    assert len(handed_out) == 6


def test_time_is_checked_before_each_sample(chain: Any, images: Any, data_of: Any) -> None:
    """When time is up no further sample runs, and the error reaches the caller."""
    model, checks = chain(), 0

    def check_time() -> None:
        nonlocal checks
        checks += 1
        if checks > 2:
            raise TimeLimitError("up")

    found = stream(model, ["y"], data_of(model, images(5)), check_time)
    assert all(next(found) for _ in range(2))
    with pytest.raises(TimeLimitError, match="up"):
        next(found)


def test_padding_is_taken_away_where_asked(model_from_text: Any) -> None:
    """Without padding [N, T, ...] is [positions that count, ...]; with it, the array as it is."""
    model = model_from_text(MASKED)
    mask, x = np.array([[1, 1, 0]]), np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    samples = InputData.from_arrays({"attention_mask": mask, "x": x}, model.inputs)
    (whole,) = (values["a"] for values in stream(model, ["a"], samples, lambda: None))
    (counted,) = (values["a"] for values in stream(model, ["a"], samples, lambda: None, padding=False))
    np.testing.assert_array_equal(whole, -x)
    np.testing.assert_array_equal(counted, -x[0, :2])


def test_what_is_observable(chain: Any) -> None:
    """Inputs and computed values of the main graph with a name are; weights and nameless values are not."""
    model = chain()
    first = model.graph[0]
    assert observable(first.inputs[0], model)
    assert observable(first.outputs[0], model)
    assert not observable(first.inputs[1], model)
    assert not observable(onnx_ir.Value(), model)
    assert not observable(None, model)
