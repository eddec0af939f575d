"""The pass as a whole: undone where it is wrong, the same the second time, linear, and safe in parallel."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from modelpress_compression.errors import TimeLimitError
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse import fuse as module
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse, Verification
from modelpress_compression.passes.fuse.rewriting import FIRED, Scope, Tally, apply
from modelpress_compression.techniques import TECHNIQUES
from onnx import helper


def _network(rng: np.random.Generator) -> tuple[list[Any], dict[str, Any]]:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv_1", pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c1", "g", "b", "m", "v"], ["n1"], name="bn_1"),
        helper.make_node("Add", ["n1", "three"], ["a"]),
        helper.make_node("Clip", ["a", "zero", "six"], ["k"]),
        helper.make_node("Mul", ["n1", "k"], ["p"]),
        helper.make_node("Div", ["p", "six"], ["s"]),
        helper.make_node("Identity", ["s"], ["i"]),
        helper.make_node("Conv", ["i", "w2"], ["y"], name="conv_2"),
    ]
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)),
        "w2": rng.standard_normal((4, 8, 1, 1)),
        "g": rng.standard_normal(8),
        "b": rng.standard_normal(8),
        "m": rng.standard_normal(8),
        "v": rng.random(8) + 0.1,
        "three": 3.0,
        "zero": 0.0,
        "six": 6.0,
    }
    return nodes, weights


def test_registry_makes_the_pass() -> None:
    """A recipe's `fuse` is this class."""
    assert isinstance(TECHNIQUES["fuse"].make_pass(FuseConfig()), Fuse)


def test_whole_network_and_again(build: Any, fuse: Any, ops: Any, rng: Any) -> None:
    """Everything fires together, and a second run finds nothing to do and returns the model itself."""
    result = fuse(build(*_network(rng)))
    assert ops(result) == ["Conv", "HardSwish", "Conv"]
    assert result.changes == {"no_op": 1, "conv_batchnorm": 1, "hard_swish": 1}
    again = fuse(result.model)
    assert not again.changed
    assert again.model is result.model


def test_wrong_rewrite_is_undone(build: Any, fuse: Any, ops: Any, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that changes outputs costs its group, with the reason; the other groups stand."""

    class _Wrong:
        name = "wrong"
        op_types = frozenset({"Conv"})

        def __call__(self, node: Any, scope: Scope) -> Any:
            made = scope.make_like(node, "Sigmoid", [node.inputs[0]])
            negated = scope.make_like(node, "Conv", [made.outputs[0], *node.inputs[1:]], node.attributes.values())
            scope.replace(node, [node], [made, negated])
            return FIRED

    monkeypatch.setattr(module, "FuseHardSwish", _Wrong)
    result = fuse(build(*_network(rng)))
    assert "wrong" not in result.changes
    assert result.changes["conv_batchnorm"] == 1
    assert "Sigmoid" not in ops(result)
    (undone,) = [skip for skip in result.skipped if skip.node == "activations"]
    assert "undone" in undone.reason
    assert "differs by up to" in undone.reason


def test_result_that_does_not_load_is_undone(build: Any, fuse: Any, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for an operator that onnxruntime does not know."""

    class _Unknown:
        name = "unknown"
        op_types = frozenset({"Clip"})

        def __call__(self, node: Any, scope: Scope) -> Any:
            scope.replace(node, [node], [scope.make_like(node, "NoSuchOperator", [node.inputs[0]])])
            return FIRED

    monkeypatch.setattr(module, "FuseHardSwish", _Unknown)
    result = fuse(build(*_network(rng)))
    assert any("does not run" in skip.reason for skip in result.skipped)


def test_verification_sees_the_batch_axis(build: Any, samples: Any) -> None:
    """A model that mixes samples up agrees on single samples, and differs on a batch of two."""
    plain = build([helper.make_node("Identity", ["x"], ["y"])], {}, shape=("n", 4))
    mixed = build([helper.make_node("CumSum", ["x", "axis"], ["y"])], {"axis": np.array(0, np.int64)}, shape=("n", 4))
    verification = Verification(plain, samples(plain))
    assert verification.why_different(plain) is None
    assert "differs by up to" in (verification.why_different(mixed) or "")


def test_verification_compares_special_values(build: Any, samples: Any) -> None:
    """NaN where NaN was is equal; NaN elsewhere is not."""
    nan = build([helper.make_node("Add", ["x", "k"], ["y"])], {"k": [np.nan, 0.0, 0.0, 0.0]}, shape=("n", 4))
    other = build([helper.make_node("Add", ["x", "k"], ["y"])], {"k": [0.0, 0.0, 0.0, 0.0]}, shape=("n", 4))
    verification = Verification(nan, samples(nan))
    assert verification.why_different(nan) is None
    assert verification.why_different(other) is not None


def test_parallel_runs_do_not_meddle(build: Any, samples: Any, rng: Any, tmp_path: Path) -> None:
    """The same pass object and the same model in four threads give the same result."""
    model, configured = build(*_network(rng)), Fuse(FuseConfig())
    context = Context(samples(model), tmp_path)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: configured(model, context), range(8)))
    kinds = {tuple(node.op_type for node in result.model.nodes()) for result in results}
    assert kinds == {("Conv", "HardSwish", "Conv")}
    assert len({tuple(sorted(result.changes.items())) for result in results}) == 1


def test_large_graph_takes_linear_work(build: Any, fuse: Any) -> None:
    """2,000 nodes, each asked once per rewrite and round: the walk does not depend on the graph's size squared."""
    nodes, last = [], "x"
    for number in range(1000):
        nodes.append(helper.make_node("Add", [last, "k"], [f"a{number}"], name=f"add_{number}"))
        nodes.append(helper.make_node("Identity", [f"a{number}"], [f"i{number}"]))
        last = f"i{number}"
    nodes.append(helper.make_node("Relu", [last], ["y"]))
    asked = 0

    class _Count:
        name = "count"
        op_types = frozenset({"Add", "Identity"})

        def __call__(self, node: Any, scope: Scope) -> Any:
            nonlocal asked
            asked += 1
            return None

    model = build(nodes, {"k": 0.001}, shape=("n", 4))
    apply([_Count()], Scope(model.clone()), Tally())
    assert asked == 2000
    assert fuse(model).changes["no_op"] == 1000


def test_deadline_is_kept(build: Any, samples: Any, rng: Any, tmp_path: Path) -> None:
    """A job whose time is up stops with the error for it."""
    model = build(*_network(rng))
    with pytest.raises(TimeLimitError):
        Fuse(FuseConfig())(model, Context(samples(model), tmp_path, deadline=time.monotonic() - 1))


def test_model_without_inputs(build: Any, tmp_path: Path) -> None:
    """Everything is constant; what remains names the output."""
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": np.ones((1, 4))}, shape=(1, 4))
    result = Fuse(FuseConfig())(model, Context(InputData((), {}), tmp_path))
    assert [spec.name for spec in result.model.outputs] == ["y"]


def test_progress_reaches_the_end(build: Any, samples: Any, rng: Any, tmp_path: Path) -> None:
    """Shares of the pass never fall, and end at 1."""
    model, seen = build(*_network(rng)), []
    context = Context(samples(model), tmp_path, progress=lambda fraction, message: seen.append(fraction))
    Fuse(FuseConfig())(model, context)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
