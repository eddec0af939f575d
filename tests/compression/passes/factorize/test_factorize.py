"""The pass: what it factorizes, what it leaves, and what it says of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression.errors import InvalidDataError, InvalidRecipeError, TimeLimitError
from modelpress_compression.graph.macs import count_macs
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.passes.factorize.config import FactorizeConfig
from modelpress_compression.passes.factorize.factorize import Factorize
from onnx import helper

RNG = np.random.default_rng(3)
KERNEL = RNG.standard_normal((32, 16, 3, 3)) / 12
TALL = RNG.standard_normal((64, 48)) / 8


def error(one: Any, other: Any) -> float:
    """Mean squared difference over the variance of `other`."""
    return float(np.square(one - other).mean() / other.var())


@pytest.fixture
def net(channel_model: Any) -> Any:
    """Two convolutions and a product on the mean of what they make."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["h1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["h2"], "second", strides=[2, 2]),
        helper.make_node("Relu", ["h2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["g"], "pool"),
        helper.make_node("Flatten", ["g"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "head", transB=1),
    ]
    weights = {
        "w1": KERNEL,
        "b1": RNG.standard_normal(32),
        "w2": RNG.standard_normal((64, 32, 3, 3)) / 17,
        "w3": TALL.T,
        "b3": RNG.standard_normal(48),
    }
    return channel_model(nodes, weights, ["n", 16, 9, 10], ["n", 48])


@pytest.mark.parametrize("method", ["auto", "svd", "tucker", "spatial", "depthwise"])
def test_costs_fall_by_what_is_said(method: str, net: Any, factorize: Any, outputs_of: Any, correlated: Any) -> None:
    """MACs and parameters are counted on the result; each layer costs at most its share; names of layers stay."""
    result = factorize(net, method=method, rank_ratio=0.5)
    rows = {row["layer"]: row for row in result.details}
    assert set(rows) >= {"first", "second"}
    before, after = (count_macs(model, {"x": (1, 16, 9, 10)}).total for model in (net, result.model))
    saved = sum(row["macs_before"] - row["macs_after"] for row in rows.values())
    assert before - after == saved
    assert result.changes["macs_removed_share"] == pytest.approx(saved / before)
    assert all(row["macs_after"] <= row["macs_before"] / 2 for row in rows.values())
    assert {node.name for node in net.graph} <= {node.name for node in result.model.graph}
    assert result.changes["layers_factorized"] == len(rows)
    assert outputs_of(result.model, correlated(2, 16)).shape == (2, 48)
    assert ("head" in rows) == (method in ("auto", "svd"))


def test_data_makes_it_better(net: Any, factorize: Any, outputs_of: Any, correlated: Any) -> None:
    """On inputs that it did not see: whitened factors err less than half as much, fitted ones less again."""
    x = correlated(32, 16, seed=5)
    expected = outputs_of(net, x)
    plain = factorize(net, rank_ratio=0.4)
    whitened = factorize(net, correlated(64, 16), rank_ratio=0.4, repair="none")
    fitted = factorize(net, correlated(64, 16), rank_ratio=0.4)
    errors = [error(outputs_of(result.model, x), expected) for result in (plain, whitened, fitted)]
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1]
    assert fitted.changes["layers_repaired"] == 3
    assert fitted.skipped == ()
    assert "that needs representative inputs" in plain.warnings[0]
    assert fitted.warnings == ()


def test_auto_errs_least(net: Any, factorize: Any, correlated: Any) -> None:
    """Of every layer, no method by itself errs less at the same share."""
    data = correlated(16, 16)
    best = {row["layer"]: row["relative_error"] for row in factorize(net, data, repair="none").details}
    for method in ("svd", "tucker", "spatial", "depthwise"):
        for row in factorize(net, data, method=method, repair="none").details:
            assert best[row["layer"]] <= row["relative_error"]


@pytest.mark.parametrize("energy", [0.6, 0.9])
def test_energy(energy: float, net: Any, factorize: Any, correlated: Any) -> None:
    """Each layer that is factorized keeps so much; more energy costs more."""
    data = correlated(16, 16)
    result = factorize(net, data, energy=energy, repair="none")
    assert result.details
    assert all(1 - row["relative_error"] >= energy for row in result.details)
    assert all(row["macs_after"] < row["macs_before"] for row in result.details)


@pytest.mark.parametrize("of", ["macs", "parameters"])
def test_budget(of: str, net: Any, factorize: Any, correlated: Any) -> None:
    """The model costs at most the budget, and not far less; a looser one errs less."""
    data = correlated(16, 16)
    found = {}
    for budget in (0.4, 0.7):
        result = factorize(net, data, budget=budget, budget_of=of, repair="none")
        left = 1 - result.changes[f"{of}_removed_share"]
        assert budget / 2 < left <= budget
        assert not result.warnings
        found[budget] = sum(row["relative_error"] for row in result.details)
    assert found[0.7] < found[0.4]


def test_a_budget_out_of_reach(net: Any, factorize: Any) -> None:
    """What can be had is done, and how far that is from the budget is said."""
    result = factorize(net, budget=0.01)
    assert any("The budget of 1% of the multiply-accumulates is out of reach" in text for text in result.warnings)
    assert result.changes["layers_factorized"] == 3


def test_max_error(net: Any, factorize: Any) -> None:
    """Layers whose factors lose more stay, and the loss is said; the model is then as it was."""
    result = factorize(net, max_error=1e-6)
    assert not result.changed
    assert all("Its factors would lose 0." in skip.reason for skip in result.skipped)
    assert result.warnings[0].startswith("No layer was factorized")


@pytest.mark.parametrize("name", ["w1", "first", "fir*"])
def test_exclude(name: str, net: Any, factorize: Any) -> None:
    """A layer is left alone by its own name and by its weight's; a pattern without a match is told of."""
    result = factorize(net, exclude=(name, "nothing*"))
    assert Skip("first", "Excluded by the recipe.") in result.skipped
    assert "first" not in {row["layer"] for row in result.details}
    assert any("'nothing*'" in text for text in result.warnings)


def test_a_shared_weight_is_factorized_once(channel_model: Any, factorize: Any, outputs_of: Any) -> None:
    """Siamese products read the same two factors; answers are near (2 % of the variance, rank 8 of 8 directions)."""
    weight = RNG.standard_normal((32, 8)) @ RNG.standard_normal((8, 32))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("Relu", ["x"], ["p"], "relu"),
        helper.make_node("MatMul", ["p", "w"], ["b"], "two"),
        helper.make_node("Add", ["a", "b"], ["y"], "sum"),
    ]
    model = channel_model(nodes, {"w": weight}, ["n", 32], ["n", 32])
    result = factorize(model)
    assert len(result.model.graph.initializers) == 2
    assert [node.op_type for node in result.model.graph].count("MatMul") == 4
    x = RNG.standard_normal((20, 32)).astype(np.float32)
    assert error(outputs_of(result.model, x), outputs_of(model, x)) < 1e-8
    fitted = factorize(model, x)
    assert error(outputs_of(fitted.model, x), outputs_of(model, x)) < 1e-8


def test_a_weight_read_in_two_ways_stays(channel_model: Any, factorize: Any) -> None:
    """By other strides, or by an operator that multiplies by nothing: the reason is said."""
    convs = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one"),
        helper.make_node("Conv", ["x", "w"], ["y"], "two", strides=[2, 2]),
    ]
    result = factorize(channel_model(convs, {"w": KERNEL}, ["n", 16, 9, 10], ["n", 32, None, None]))
    assert result.skipped == (Skip("one", "Its weight is shared by nodes that read it in different ways."),)
    mixed = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("ReduceSum", ["w"], ["s"], "sum", keepdims=0),
        helper.make_node("Add", ["a", "s"], ["y"], "add"),
    ]
    result = factorize(channel_model(mixed, {"w": TALL}, ["n", 64], ["n", 48]))
    assert (result.changed, result.skipped) == (False, (Skip("one", "Others read its weight as well."),))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_numbers_beyond_their_squares(scale: float, model_from_text: Any, factorize: Any) -> None:
    """A float64 weight whose energy is zero or infinite is left, with its reason."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (double[n, 64] x) => (double[n, 48] y) { y = MatMul(x, w) }'
    result = factorize(model_from_text(text, {"w": scale * TALL}))
    assert (result.changed, result.skipped[0].reason) == (
        False,
        "The squares of its numbers exceed what float64 holds.",
    )


def test_other_products_are_told_of(channel_model: Any, factorize: Any) -> None:
    """A transposed convolution and a quantized weight are left with a reason; a product of activations with none."""
    transposed = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up")
    result = factorize(channel_model([transposed], {"w": KERNEL}, ["n", 32, 4, 4], ["n", 16, None, None]))
    assert result.skipped == (
        Skip("up", "It cannot be factorized: ConvTranspose is no plain product with one weight."),
    )
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], "dequantize"),
        helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
        helper.make_node("Transpose", ["h"], ["t"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["y"], "scores"),
    ]
    weights = {"q": np.ones((16, 16), np.int8), "s": np.float32(0.1)}
    result = factorize(channel_model(nodes, weights, ["n", 16], ["n", "n"]))
    reason = "Its weight is quantized or computed; factorize before quantizing."
    assert (result.changed, result.skipped) == (False, (Skip("product", reason),))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (np.where(np.arange(64 * 48).reshape(64, 48) == 5, np.nan, TALL), "Its weight holds NaN or infinity."),
        (np.where(np.arange(64 * 48).reshape(64, 48) == 5, np.inf, TALL), "Its weight holds NaN or infinity."),
        (np.zeros((64, 48)), "Its weight is zero throughout."),
        (TALL[:1], "It has one input or one answer in each group: its rank is 1."),
        (TALL[:, :1], "It has one input or one answer in each group: its rank is 1."),
        (TALL[:3, :3], "No factors cost so little: it is too small, or its rank too low."),
    ],
    ids=["nan", "inf", "zero", "one input", "one answer", "small"],
)
@pytest.mark.parametrize("options", [{}, {"energy": 0.5}, {"budget": 0.5}], ids=str)
def test_bad_input_is_left_unharmed(weight: Any, reason: str, options: Any, channel_model: Any, factorize: Any) -> None:
    """The layer stays, with its reason, whatever rules the ranks."""
    inputs, answers = weight.shape
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "m")
    model = channel_model([node], {"w": weight}, ["n", inputs], ["n", answers])
    x = RNG.standard_normal((12, inputs)).astype(np.float32)
    if inputs == 3 and options:
        options = {"rank_ratio": 0.3}
    result = factorize(model, x, **options)
    assert (result.changed, result.skipped) == (False, (Skip("m", reason),))
    assert result.details == ()


@pytest.mark.parametrize(
    "option", [{"rank_ratio": 0}, {"rank_ratio": 1.0}, {"energy": 1.5}, {"budget": 0}, {"round_to": 0}]
)
def test_ranks_of_nothing_are_refused(option: dict[str, Any]) -> None:
    """A share of 0, or of all, is no factorization."""
    with pytest.raises(InvalidRecipeError, match=next(iter(option))):
        FactorizeConfig(**option)


def test_a_depthwise_convolution_stays(convolution: Any, factorize: Any) -> None:
    """Its groups have one answer each."""
    result = factorize(convolution(RNG.standard_normal((16, 1, 3, 3)), 16, group=16))
    assert result.skipped == (Skip("conv", "It has one input or one answer in each group: its rank is 1."),)


def test_samples_that_are_all_the_same(net: Any, factorize: Any, correlated: Any) -> None:
    """They say nothing: the weights alone decide, as without data."""
    data = np.repeat(correlated(1, 16), 8, axis=0)
    result, plain = factorize(net, data), factorize(net)
    assert result.details == plain.details
    assert "that needs representative inputs that differ" in result.warnings[0]


def test_repair_by_name_needs_data(net: Any, factorize: Any) -> None:
    """Without data it is refused, and says what to do."""
    with pytest.raises(InvalidDataError, match="needs representative inputs; give some"):
        factorize(net, repair="least_squares")


@pytest.mark.parametrize("dtype", [onnx_ir.DataType.FLOAT16, onnx_ir.DataType.DOUBLE])
def test_other_floats(dtype: onnx_ir.DataType, model_from_text: Any, factorize: Any, outputs_of: Any) -> None:
    """Factors have the weight's own type; a product of rank 8 is as it was (4e-3 of its largest in float16)."""
    name = "float16" if dtype == onnx_ir.DataType.FLOAT16 else "double"
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({name}[n, 32] x) => ({name}[n, 32] y) {{ y = MatMul(x, w) }}'
    weight = RNG.standard_normal((32, 8)) @ RNG.standard_normal((8, 32)) / 8
    model = model_from_text(text, {"w": weight.astype(dtype.numpy())})
    result = factorize(model)
    assert {value.dtype for value in result.model.graph.initializers.values()} == {dtype}
    x = RNG.standard_normal((5, 32)).astype(dtype.numpy())
    expected = outputs_of(model, x)
    np.testing.assert_allclose(
        outputs_of(result.model, x),
        expected,
        rtol=0,
        atol=(4e-3 if name == "float16" else 1e-9) * np.abs(expected).max(),
    )


def test_inside_a_branch(model_from_text: Any, factorize: Any, outputs_of: Any) -> None:
    """A layer of a subgraph is factorized by its weight alone; its factors lie where they are read."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[n, 32] x) => (float[n, 32] y) {
        one = Constant<value = int64 {1}>()
        rows = Shape<end = 1>(x)
        many = Greater(rows, one)
        yes = Squeeze(many)
        y = If (yes) <then_branch = a () => (float[n, 32] u) { u = MatMul(x, w) },
                      else_branch = b () => (float[n, 32] v) { v = Identity(x) }>
    }"""
    weight = (RNG.standard_normal((32, 8)) @ RNG.standard_normal((8, 32))).astype(np.float32)
    model = model_from_text(text, {"w": weight})
    x = RNG.standard_normal((6, 32)).astype(np.float32)
    for data in (None, x):
        result = factorize(model, data)
        assert result.changes["layers_factorized"] == 1
        np.testing.assert_allclose(outputs_of(result.model, x), outputs_of(model, x), rtol=0, atol=1e-3)


def test_again_and_out_of_time(net: Any, factorize: Any, tmp_path: Any) -> None:
    """A second run at the same energy finds factors that are full already; without time it ends at once."""
    weight_only = factorize(net, method="svd", rank_ratio=0.3)
    again = factorize(weight_only.model, method="svd", energy=0.9999)
    assert not again.changed
    context = Context(InputData(net.inputs, {"x": np.zeros((1, 16, 9, 10), np.float32)}, provided=False), tmp_path, 0.0)
    with pytest.raises(TimeLimitError):
        Factorize(FactorizeConfig())(net, context)
