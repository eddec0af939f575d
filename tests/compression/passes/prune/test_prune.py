"""What is pruned, how much of it, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.inputs import InputData
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.config import PruneConfig
from modelpress_compression.passes.prune.prune import Prune
from modelpress_compression.techniques import TECHNIQUES
from onnx import TensorProto, helper, numpy_helper

WeightOf = Callable[..., Any]


def _gemm(weight: str, source: str, target: str, name: str = "", **attributes: Any) -> Any:
    return helper.make_node("Gemm", [source, weight], [target], name=name, **attributes)


def _two_layers(rng: np.random.Generator) -> tuple[list[Any], dict[str, Any]]:
    """The second layer's weights are ten times the first one's."""
    nodes = [_gemm("w1", "x", "h", "layer_1"), _gemm("w2", "h", "y", "layer_2")]
    return nodes, {"w1": rng.standard_normal((10, 20)), "w2": 10 * rng.standard_normal((20, 30))}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_registry_makes_the_pass() -> None:
    """A recipe's `prune` is this class."""
    assert isinstance(TECHNIQUES["prune"].make_pass(PruneConfig()), Prune)


@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 5), criterion=st.sampled_from(["l1", "random"]))
@settings(max_examples=30)
def test_share_is_exact(
    network: Any, prune: Any, weight_of: WeightOf, sparsity: float, seed: int, criterion: str
) -> None:
    """Each layer loses round(sparsity * size); l1 keeps the largest; a second run changes nothing."""
    nodes, weights = _two_layers(np.random.default_rng(seed))
    config = PruneConfig(sparsity=sparsity, criterion=criterion, seed=seed)
    result = prune(network(nodes, weights), config)
    for name, before in weights.items():
        after = weight_of(result, name)
        assert np.count_nonzero(after == 0) == round(sparsity * before.size)
        np.testing.assert_array_equal(after[after != 0], before.astype(np.float32)[after != 0])
        kept, gone = np.abs(before[after != 0]), np.abs(before[after == 0])
        if criterion == "l1" and gone.size and kept.size:
            assert gone.max() <= kept.min()
    again = prune(result.model, config)
    assert again.model is result.model
    assert not again.changed


def test_a_weight_that_a_caller_may_override_stays(network: Any, prune: Any, weight_of: WeightOf, rng: Any) -> None:
    """An input with a default is not constant, though it has numbers."""
    nodes, weights = _two_layers(rng)
    model = network(nodes, weights)
    model.graph.inputs.append(model.graph.initializers["w1"])
    result = prune(model, PruneConfig(sparsity=0.5))
    assert np.count_nonzero(weight_of(result, "w1") == 0) == 0
    assert np.count_nonzero(weight_of(result, "w2") == 0) == 300


@given(sparsity=st.floats(0, 0.99), criterion=st.sampled_from(["l1", "random"]))
@settings(max_examples=30)
def test_global_share_is_exact(network: Any, prune: Any, weight_of: WeightOf, sparsity: float, criterion: str) -> None:
    """One threshold over both layers: the share holds for their sum, and repeats."""
    nodes, weights = _two_layers(np.random.default_rng(1))
    config = PruneConfig(sparsity=sparsity, scope="global", criterion=criterion)
    result = prune(network(nodes, weights), config)
    zeros = {name: int(np.count_nonzero(weight_of(result, name) == 0)) for name in weights}
    assert sum(zeros.values()) == round(sparsity * 800)
    gone = np.concatenate([np.abs(before[weight_of(result, name) == 0]) for name, before in weights.items()])
    kept = np.concatenate([np.abs(before[weight_of(result, name) != 0]) for name, before in weights.items()])
    if criterion == "l1" and gone.size and kept.size:
        assert gone.max() <= kept.min()  # across both layers, not within each
    assert not prune(result.model, config).changed


def test_report(network: Any, prune: Any, rng: Any) -> None:
    """Counts, achieved share, and the word that zeros are not faster."""
    result = prune(network(*_two_layers(rng)), PruneConfig(sparsity=0.25))
    assert result.changes == {"weights_pruned": 200, "layers_pruned": 2, "sparsity": 0.25}
    assert any("do not make onnxruntime faster" in warning for warning in result.warnings)


def test_overrides_of_single_weights_are_named(network: Any, prune: Any, rng: Any) -> None:
    """They are nothing that this structure has, and no silent success."""
    for structure in ("unstructured", "n:m"):
        config = PruneConfig(structure=structure, overrides=(("layer_1", 0.9),))
        result = prune(network(*_two_layers(rng)), config)
        assert f"The overrides are for channels and blocks: {structure} pruning has none." in result.warnings


def test_random_differs_by_seed_and_layer(network: Any, prune: Any, weight_of: WeightOf, rng: Any) -> None:
    """The same seed repeats, another one does not; layers of one shape are drawn apart."""
    weight = rng.standard_normal((20, 20))
    model = network([_gemm("w1", "x", "h"), _gemm("w2", "h", "y")], {"w1": weight, "w2": weight})
    masks = [
        weight_of(prune(model, PruneConfig(criterion="random", seed=seed)), name) == 0
        for seed, name in ((0, "w1"), (0, "w1"), (1, "w1"), (0, "w2"))
    ]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()
    assert (masks[0] != masks[3]).any()


def _groups(array: Any, m: int) -> Any:
    """Rows to whole groups of m."""
    return array[:, : array.shape[1] // m * m].reshape(-1, m)


@pytest.mark.parametrize(
    ("node", "shape", "rows"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (10, 6), lambda w: w.T),
        (helper.make_node("MatMul", ["w", "x"], ["y"]), (6, 10), lambda w: w),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (3, 10, 6), lambda w: w.transpose(0, 2, 1).reshape(-1, 10)),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), (10, 6), lambda w: w.T),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (6, 10), lambda w: w),
        (helper.make_node("Conv", ["x", "w"], ["y"]), (6, 8, 3, 3), lambda w: w.transpose(0, 2, 3, 1).reshape(6, -1)),
        (helper.make_node("Conv", ["x", "w"], ["y"]), (6, 3, 3, 3), lambda w: w.transpose(0, 2, 3, 1).reshape(6, -1)),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=6), (6, 1, 5), lambda w: w.reshape(6, -1)),
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], group=2),
            (8, 3, 2, 2),
            lambda w: w.reshape(2, 4, 3, 2, 2).transpose(0, 2, 3, 4, 1).reshape(6, -1),
        ),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 5)])
def test_n_of_m(
    network: Any, prune: Any, weight_of: WeightOf, rng: Any, node: Any, shape: Any, rows: Any, n: int, m: int
) -> None:
    """Every group of m neighbours along the input axis has n zeros; a remainder has none; a second run changes none."""
    config = PruneConfig(structure="n:m", n=n, m=m)
    result = prune(network([node], {"w": rng.standard_normal(shape)}), config)
    zeros = rows(weight_of(result, "w") == 0)
    assert (_groups(zeros, m).sum(axis=1) == n).all()
    assert not zeros[:, zeros.shape[1] // m * m :].any()
    assert not prune(result.model, config).changed


def test_narrow_input_axis_is_left_alone(network: Any, prune: Any, rng: Any) -> None:
    """Rows of three have no group of four."""
    model = network([_gemm("w", "x", "y")], {"w": rng.standard_normal((3, 8))})
    result = prune(model, PruneConfig(structure="n:m"))
    assert not result.changed
    assert "fewer than a group of 4" in result.skipped[0].reason


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_weights(network: Any, prune: Any, weight_of: WeightOf, rng: Any, op: str, gates: int) -> None:
    """Input and recurrent weights; the bias is left alone."""
    node = helper.make_node(op, ["x", "w", "r", "b"], ["y"], hidden_size=8)
    weights = {
        "w": rng.standard_normal((1, 8 * gates, 12)),
        "r": rng.standard_normal((1, 8 * gates, 8)),
        "b": rng.standard_normal((1, 16 * gates)),
    }
    result = prune(network([node], weights), PruneConfig(structure="n:m"))
    assert result.changes["layers_pruned"] == 2
    assert (_groups(weight_of(result, "r")[0] == 0, 4).sum(axis=1) == 2).all()
    assert (weight_of(result, "b") != 0).all()


@pytest.mark.parametrize("op", ["Attention", "FusedConv", "FusedGemm", "FusedMatMul"])
def test_operators_of_onnxruntime(network: Any, prune: Any, rng: Any, op: str) -> None:
    """Fused operators have weights as well."""
    shape = (4, 4, 3, 3) if op == "FusedConv" else (16, 48)
    node = helper.make_node(op, ["x", "w"], ["y"], domain="com.microsoft")
    result = prune(network([node], {"w": rng.standard_normal(shape)}, domain="com.microsoft"), PruneConfig())
    assert result.changes["layers_pruned"] == 1


def test_shared_weight_counts_once(network: Any, prune: Any, rng: Any) -> None:
    """Two layers, one weight: it is pruned once, not to a fourth."""
    model = network([_gemm("w", "x", "h"), _gemm("w", "h", "y")], {"w": rng.standard_normal((10, 10))})
    assert prune(model, PruneConfig()).changes == {"weights_pruned": 50, "layers_pruned": 1, "sparsity": 0.5}


def test_embeddings_norms_and_biases_stay(network: Any, prune: Any, rng: Any) -> None:
    """With a reason each, the small ones in one line."""
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("LayerNormalization", ["e", "scale", "shift"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["h"]),
        helper.make_node("Add", ["h", "bias"], ["y"]),
    ]
    weights = {"table": rng.standard_normal((50, 8)), "w": rng.standard_normal((8, 8))}
    weights |= {name: rng.standard_normal(8) for name in ("scale", "shift", "bias")}
    result = prune(network(nodes, weights), PruneConfig())
    assert result.changes["layers_pruned"] == 1
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert "embedding" in reasons["table"]
    assert "each one matters" in reasons["3 biases and parameters of normalizations"]


def test_tied_embedding_stays(network: Any, prune: Any, rng: Any) -> None:
    """A table that is the output projection as well is looked up too."""
    nodes = [
        helper.make_node("Cast", ["x"], ["ids"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        _gemm("table", "e", "y", transB=1),
    ]
    result = prune(network(nodes, {"table": rng.standard_normal((50, 8))}), PruneConfig())
    assert not result.changed
    assert [skip.node for skip in result.skipped] == ["table"]


def test_quantized_weights_stay(network: Any, prune: Any) -> None:
    """Behind DequantizeLinear, and inside of integer operators."""
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        _gemm("w", "x", "h", "gemm"),
        helper.make_node("MatMulInteger", ["h8", "q"], ["y"], name="integer"),
    ]
    result = prune(
        network(nodes, {"q": np.ones((8, 8), np.int8), "s": 0.1, "h8": np.ones((2, 8), np.uint8)}), PruneConfig()
    )
    assert not result.changed
    assert {skip.node for skip in result.skipped} == {"w", "integer"}
    assert all("quantized already" in skip.reason for skip in result.skipped)


def test_product_of_activations_is_no_weight(network: Any, prune: Any) -> None:
    """Attention's own MatMul has nothing to prune, and needs no reason."""
    result = prune(network([helper.make_node("MatMul", ["x", "x"], ["y"])], {}), PruneConfig())
    assert not result.changed
    assert result.skipped == ()


@pytest.mark.parametrize("pattern", ["layer_1", "w1", "*_1"])
def test_excluded(network: Any, prune: Any, weight_of: WeightOf, rng: Any, pattern: str) -> None:
    """By name of the node or of the weight."""
    result = prune(network(*_two_layers(rng)), PruneConfig(exclude=(pattern,)))
    assert (weight_of(result, "w1") != 0).all()
    assert (weight_of(result, "w2") == 0).any()
    assert ("w1", "Excluded by the recipe.") in {(skip.node, skip.reason) for skip in result.skipped}


def test_exclude_that_matches_nothing_warns(network: Any, prune: Any, rng: Any) -> None:
    """A typing mistake should not go unnoticed."""
    result = prune(network(*_two_layers(rng)), PruneConfig(exclude=("layer_1", "lyaer_2")))
    assert [warning for warning in result.warnings if "lyaer_2" in warning]
    assert not [warning for warning in result.warnings if "layer_1" in warning]


def test_constant_node_in_a_branch(network: Any, prune: Any, rng: Any) -> None:
    """Weights in Constant nodes inside of an If are found and replaced."""

    def branch(name: str) -> Any:
        value = numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32))
        nodes = [helper.make_node("Constant", [], [f"{name}_w"], value=value), _gemm(f"{name}_w", "x", f"{name}_o")]
        output = helper.make_tensor_value_info(f"{name}_o", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [output])

    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch("a"), else_branch=branch("b"))
    result = prune(network([node], {"condition": np.array(True)}), PruneConfig())
    assert result.changes == {"weights_pruned": 64, "layers_pruned": 2, "sparsity": 0.5}
    tensors = [
        node.attributes["value"].as_tensor().numpy() for node in result.model.nodes() if node.op_type == "Constant"
    ]
    assert [int(np.count_nonzero(tensor == 0)) for tensor in tensors] == [32, 32]


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_keep_theirs(network: Any, prune: Any, weight_of: WeightOf, rng: Any, dtype: Any) -> None:
    """float16 and float64 weights stay what they are."""
    weight = rng.standard_normal((16, 16)).astype(dtype)
    model = network([_gemm("w", "x", "y")], {"w": weight}) if dtype == np.float16 else _double(network, weight)
    result = prune(model, PruneConfig())
    after = weight_of(result, "w")
    assert after.dtype == dtype
    assert np.count_nonzero(after == 0) == 128


def _double(network: Any, weight: Any) -> Any:
    model = network([_gemm("w", "x", "y")], {"w": np.zeros((16, 16), np.float32)})
    model.graph.initializers["w"].const_value = onnx_ir.Tensor(weight, name="w")
    return model


def test_parallel_runs_agree(network: Any, rng: Any) -> None:
    """One pass object on one model in four threads."""
    model, configured = network(*_two_layers(rng)), Prune(PruneConfig(scope="global"))
    context = Context(InputData((), {}), Path("unused"))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: configured(model, context), range(8)))
    weights = {result.model.graph.initializers["w1"].const_value.tobytes() for result in results}
    assert len(weights) == 1
