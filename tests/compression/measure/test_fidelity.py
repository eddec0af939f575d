"""Figures of output fidelity by hand, and what must never break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from modelpress_compression import runtime
from modelpress_compression.backends.cpu import OnnxRuntime, OnnxRuntimeRunner
from modelpress_compression.inputs import Array, InputData
from modelpress_compression.measure import fidelity
from modelpress_compression.measure.fidelity import MAX_SQNR_DB, KnownOutputs, WaitingOutputs, compare_outputs
from modelpress_compression.specs import parse_specs

IDENTITY = "g (float[batch,3] x) => (float[batch,3] y) { y = Identity(x) }"
SCALED = "g (float[batch,3] x) => (float[batch,3] y) { y = Mul(x, k) }"
LINEAR = "g (float[batch,3] x) => (float[batch,3] scores) { scores = MatMul(x, w) }"
Samples = Callable[..., InputData]
Save = Callable[..., Path]


@pytest.fixture
def threes(samples: Samples) -> InputData:
    """Fifty samples of three numbers."""
    return samples("x:float32[batch,3]", np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32))


def top1_of(data: InputData) -> float:
    """The mean of the largest softmax probability."""
    powers = np.exp(np.asarray(data.arrays["x"], np.float64))
    return float((powers.max(axis=1) / powers.sum(axis=1)).mean())


def test_identical_models(save_model: Save, threes: InputData) -> None:
    """Cosine 1, the cap of the signal-to-noise ratio, no error, agreement 1; the dictionary is JSON without NaN."""
    path = save_model(LINEAR, {"w": np.eye(3, dtype=np.float32)})
    found = compare_outputs(path, path, threes)
    assert found.to_dict() == {
        "data": "provided",
        "samples": 50,
        "outputs": {"scores": {"cosine": pytest.approx(1.0), "sqnr_db": MAX_SQNR_DB, "max_abs_error": 0.0}},
        "top1_agreement": 1.0,
        "expected_top1": pytest.approx(top1_of(threes)),
        "expected_drop": 0.0,
        "agreement": 1.0,
        "notes": [],
    }
    json.dumps(found.to_dict(), allow_nan=False)


def test_figures_by_hand(save_model: Save, threes: InputData) -> None:
    """y = 0.9 x: cosine 1, 20 dB, the largest |x| / 10; no class scores, so the agreement is the cosine (rtol 1e-5)."""
    after = save_model(SCALED, {"k": np.float32(0.9)}, "after")
    found = compare_outputs(save_model(IDENTITY), after, threes)
    output = found.outputs["y"]
    assert output.cosine == pytest.approx(1.0, rel=1e-5)
    assert output.sqnr_db == pytest.approx(20.0, rel=1e-5)
    assert output.max_abs_error == pytest.approx(np.abs(threes.arrays["x"]).max() * 0.1, rel=1e-5)
    assert found.top1_agreement is None
    assert found.agreement == pytest.approx(1.0, rel=1e-5)


def test_top1_counts_samples(save_model: Save, threes: InputData) -> None:
    """Two classes swapped: the answers that name neither of them agree."""
    swapped = np.eye(3, dtype=np.float32)[[1, 0, 2]]
    before = save_model(LINEAR, {"w": np.eye(3, dtype=np.float32)})
    found = compare_outputs(before, save_model(LINEAR, {"w": swapped}, "after"), threes)
    expected = float((threes.arrays["x"].argmax(1) == 2).mean())
    assert found.top1_agreement == found.agreement == pytest.approx(expected)


def test_hidden_states_are_no_classes(save_model: Save, threes: InputData) -> None:
    """An output that ends in a normalization has no meaningful largest element."""
    text = "g (float[batch,3] x) => (float[batch,3] y) { a = MatMul(x, w)  y = LayerNormalization(a, s) }"
    path = save_model(text, {"w": np.eye(3, dtype=np.float32), "s": np.ones(3, np.float32)})
    found = compare_outputs(path, path, threes)
    assert found.top1_agreement is None
    assert found.agreement == pytest.approx(1.0)


def test_shapes_that_differ_never_agree(save_model: Save, threes: InputData) -> None:
    """An output of another shape has agreement 0, no figures, and a note."""
    other = save_model("g (float[batch,3] x) => (float[batch,1] y) { y = ReduceSum(x, a) }", {"a": np.int64([1])}, "b")
    found = compare_outputs(save_model(IDENTITY), other, threes)
    assert found.agreement == 0.0
    assert found.outputs["y"].cosine is None
    assert "shape (1, 3) in the original and (1, 1)" in found.notes[0]


def test_a_missing_output_never_agrees(save_model: Save, threes: InputData) -> None:
    """An output that is gone is noted."""
    both = "g (float[batch,3] x) => (float[batch,3] y, float[batch,3] z) { y = Identity(x)  z = Neg(x) }"
    found = compare_outputs(save_model(both), save_model(IDENTITY, name="after"), threes)
    assert found.agreement == 0.0
    assert "'z' is missing" in found.notes[0]


def test_nan_and_infinity(save_model: Save, threes: InputData) -> None:
    """Equal NaN and infinities are no difference; where only one model is finite the cosine is 0. Always JSON."""
    log = save_model("g (float[batch,3] x) => (float[batch,3] y) { y = Log(x) }")
    same = compare_outputs(log, log, threes)
    assert same.agreement == pytest.approx(1.0)
    assert same.outputs["y"].max_abs_error == 0.0
    broken = compare_outputs(save_model(IDENTITY, name="before"), log, threes)
    assert broken.agreement == 0.0
    assert "finite in only one" in broken.notes[0]
    json.dumps([same.to_dict(), broken.to_dict()], allow_nan=False)


def test_integers_strings_and_empty_outputs(save_model: Save, threes: InputData) -> None:
    """Other types have the share of equal elements; an output that is always empty says nothing."""
    text = (
        "g (float[batch,3] x) => (int64[batch] i, bool[batch,3] b, float[e,3] none, string[batch,3] s) "
        "{ i = ArgMax <axis = 1, keepdims = 0> (x)  b = Greater(x, k)  none = Slice(x, z, z)  s = Cast <to = 8> (b) }"
    )
    weights = {"k": np.float32(0), "z": np.int64([0])}
    before = save_model(text, weights)
    after = save_model(text, weights | {"k": np.float32(100)}, "after")
    found = compare_outputs(before, after, threes)
    positive = float((threes.arrays["x"] > 0).mean())
    assert found.outputs["i"].equal == 1.0
    assert found.outputs["b"].equal == pytest.approx(1 - positive)
    assert found.outputs["s"].equal == pytest.approx(1 - positive)
    assert found.outputs["none"].to_dict() == {"cosine": None, "sqnr_db": None, "max_abs_error": None}
    assert found.agreement == pytest.approx((1 + 2 * (1 - positive)) / 3)


def test_limit_and_budget(save_model: Save, threes: InputData) -> None:
    """`samples` says how many were compared."""
    path = save_model(IDENTITY)
    assert compare_outputs(path, path, threes, limit=7).samples == 7
    assert compare_outputs(path, path, threes, budget_s=0.0).samples == 1


def test_expected_drop_by_hand(save_model: Save, samples: Samples) -> None:
    """Classes 0 and 1 swap in both samples: between .5 and .45 that costs .05 of an answer, between .9 and .05 it costs
    .85; .5 and .9 answers are expected to be right (rtol 1e-5). Probabilities are classes whatever made them."""
    data = samples("x:float32[batch,3]", np.asarray([[0.5, 0.45, 0.05], [0.9, 0.05, 0.05]], np.float32))
    swapped = save_model(
        "g (float[batch,3] x) => (float[batch,3] y) { y = Gather<axis=1>(x, order) }", {"order": np.asarray([1, 0, 2])}
    )
    found = compare_outputs(save_model(IDENTITY, name="before"), swapped, data)
    assert found.top1_agreement == 0.0
    assert found.expected_top1 == pytest.approx((0.5 + 0.9) / 2, rel=1e-5)
    assert found.expected_drop == pytest.approx((0.05 + 0.85) / 2, rel=1e-5)


def test_padding_is_not_compared(save_model: Save) -> None:
    """Positions that attention_mask leaves out may differ as they like; those that count are compared (rtol 1e-5)."""
    text = """g (float[batch,4,2] x, float[batch,4] attention_mask) => (float[batch,4,2] y)
        {{ m = Unsqueeze(attention_mask, last)  y = {} }}"""
    last = {"last": np.asarray([2])}
    before = save_model(text.format("Identity(x)"), last, "before")
    after = save_model(text.format("Mul(x, m)"), last, "after")
    mask = np.asarray([[1, 1, 0, 0], [1, 1, 1, 0]], np.float32)
    values = np.random.default_rng(1).normal(0, 1, (2, 4, 2)).astype(np.float32)
    specs = parse_specs(["x:float32[batch,4,2]", "attention_mask:float32[batch,4]"])
    data = InputData.from_arrays({"x": values, "attention_mask": mask}, specs)
    found = compare_outputs(before, after, data)
    assert found.outputs["y"].cosine == pytest.approx(1.0, rel=1e-5)
    assert found.outputs["y"].max_abs_error == 0.0


def test_large_models_take_turns(save_model: Save, threes: InputData, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same figures as together, outputs of the original being known or not; a full disk file ends it early."""
    before = save_model(LINEAR, {"w": np.eye(3, dtype=np.float32)})
    after = save_model(LINEAR, {"w": np.float32(0.9) * np.eye(3, dtype=np.float32)}, "after")
    together = compare_outputs(before, after, threes)
    opened: list[Path] = []

    def open_one(backend: OnnxRuntime, path: Path, **options: Any) -> OnnxRuntimeRunner:
        opened.append(path)
        return open_model(backend, path, **options)

    open_model = OnnxRuntime.open

    monkeypatch.setattr(runtime, "SPARE_BYTES", -(10**9))
    monkeypatch.setattr(OnnxRuntime, "open", open_one)
    assert compare_outputs(before, after, threes) == together
    known = KnownOutputs()
    assert compare_outputs(before, after, threes, known=known) == together
    assert compare_outputs(before, after, threes, known=known) == together
    assert opened == [before, after, before, after, after]
    monkeypatch.setattr(fidelity, "WAITING_BYTES", 0)
    assert compare_outputs(before, after, threes).samples < together.samples


def test_outputs_wait_as_they_were(tmp_path: Path) -> None:
    """Numbers of any shape, bfloat16 and strings."""
    outputs: dict[str, Array] = {
        "scalar": np.asarray(np.float32(2)),
        "empty": np.zeros((0, 3), np.int64),
        "half": np.ones((2, 2), ml_dtypes.bfloat16),
        "words": np.asarray(["a", "b"], object),
    }
    with WaitingOutputs(tmp_path) as waiting:
        for number in range(2):
            waiting.put(number, outputs)
        found = waiting.get(1)
    assert list(tmp_path.iterdir()) == []
    for name, array in outputs.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
