"""MatMulNBits and GatherBlockQuantized as others write them, against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from modelpress_compression.encodings.read import stored_weights
from modelpress_compression.encodings.weight import pack, unpack
from modelpress_compression.graph.read import MICROSOFT
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.model import Model
from onnx import helper

ModelOf = Callable[..., Model]
AnswerOf = Callable[..., np.ndarray]
ROWS = 12


def n_bits(names: str, columns: int, bits: int, size: int, output: str = "y"):  # type: ignore[no-untyped-def]
    """A node that names its inputs; "-" leaves one out."""
    inputs = ["" if name == "-" else name for name in names.split()]
    attributes = {"K": columns, "N": ROWS, "bits": bits, "block_size": size}
    return helper.make_node("MatMulNBits", inputs, [output], domain=MICROSOFT, **attributes)


def constants(rng: np.random.Generator, columns: int, bits: int, size: int) -> dict[str, np.ndarray]:
    """Bytes, scales, packed zero points, a bias."""
    blocks = -(-columns // size)
    return {
        "q": rng.integers(0, 256, (ROWS, blocks, size * bits // 8)).astype(np.uint8),
        "s": rng.uniform(0.01, 0.02, (ROWS, blocks)).astype(np.float32),
        "z": pack(rng.integers(0, 1 << bits, (ROWS, blocks)), bits),
        "b": rng.normal(0, 1, ROWS).astype(np.float32),
    }


@pytest.mark.parametrize("inputs", ["x q s", "x q s z", "x q s - - b", "x q s z - b"])
@pytest.mark.parametrize(("bits", "columns", "size"), [(4, 64, 32), (4, 33, 16), (8, 33, 16), (8, 70, 32), (2, 64, 32)])
def test_products(model_of: ModelOf, answer_of: AnswerOf, inputs: str, bits: int, columns: int, size: int) -> None:
    """The matrix that is read gives the answers of onnxruntime (rtol 1e-4); a bias counts N, zero points nothing."""
    rng = np.random.default_rng(bits * columns)
    given = {name: array for name, array in constants(rng, columns, bits, size).items() if name in inputs.split()}
    model = model_of([n_bits(inputs, columns, bits, size)], given, {"x": ["n", columns]})
    (stored,) = stored_weights(next(iter(model.nodes())))
    real, bias = stored.weight.dequantize(), given.get("b", np.float32(0))
    assert real.shape == (ROWS, columns)
    stats = model_stats(model)
    assert stats.parameters == ROWS * columns + bias.size * bias.ndim
    assert stats.nonzero_parameters == np.count_nonzero(real) + bias.size * bias.ndim
    assert [layer.bytes for layer in stats.layers] == [sum(array.nbytes for array in given.values())]
    x = rng.normal(0, 1, (3, columns)).astype(np.float32)
    np.testing.assert_allclose(answer_of(model, x), x @ real.T + bias, rtol=1e-4, atol=1e-4)


def test_scales_and_zero_points_in_other_forms(model_of: ModelOf, answer_of: AnswerOf) -> None:
    """Flat scales and zero points that are floats are read as onnxruntime reads them (rtol 1e-4)."""
    rng = np.random.default_rng(0)
    given = constants(rng, 70, 4, 32)
    given |= {"s": given["s"].reshape(-1), "z": rng.uniform(0, 15, (ROWS, 3)).astype(np.float32)}
    del given["b"]
    model = model_of([n_bits("x q s z", 70, 4, 32)], given, {"x": ["n", 70]})
    (stored,) = stored_weights(next(iter(model.nodes())))
    assert model_stats(model).nonzero_parameters == ROWS * 70
    x = rng.normal(0, 1, (3, 70)).astype(np.float32)
    np.testing.assert_allclose(answer_of(model, x), x @ stored.weight.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero_points", [True, False])
def test_columns_in_an_order_of_their_own(model_of: ModelOf, answer_of: AnswerOf, zero_points: bool) -> None:
    """With a group for each column (g_idx) its scale and zero point are that group's; its bytes stay (rtol 1e-4).

    Zero points are floats here: onnxruntime takes no notice of packed ones beside g_idx.
    """
    rng = np.random.default_rng(0)
    given = constants(rng, 64, 4, 16)
    del given["b"], given["z"]
    given |= {"z": rng.uniform(0, 15, (ROWS, 4)).astype(np.float32)} if zero_points else {}
    given["g"] = rng.permutation(np.repeat(np.arange(4), 16)).astype(np.int32)
    model = model_of([n_bits(f"x q s {'z' if zero_points else '-'} g", 64, 4, 16)], given, {"x": ["n", 64]})
    (stored,) = stored_weights(next(iter(model.nodes())))
    np.testing.assert_array_equal(stored.pack(stored.weight.levels), given["q"])
    stats = model_stats(model)
    assert (stats.parameters, stats.layers[0].parameters) == (ROWS * 64, ROWS * 64)
    scale = given["s"][:, given["g"]]
    zero = given["z"][:, given["g"]] if zero_points else 8
    levels = unpack(given["q"].reshape(ROWS, -1), 4).astype(np.float32)
    np.testing.assert_array_equal(stored.weight.dequantize(), (levels - zero) * scale)
    x = rng.normal(0, 1, (3, 64)).astype(np.float32)
    np.testing.assert_allclose(answer_of(model, x), x @ stored.weight.dequantize().T, rtol=1e-4, atol=1e-4)


def test_a_weight_of_two_nodes_counts_once(model_of: ModelOf) -> None:
    """Shared bytes, scales and zero points, with a bias for one of them."""
    given = constants(np.random.default_rng(0), 33, 4, 16)
    nodes = [
        n_bits("x q s z", 33, 4, 16, "one"),
        n_bits("x q s z - b", 33, 4, 16, "two"),
        helper.make_node("Add", ["one", "two"], ["y"]),
    ]
    assert model_stats(model_of(nodes, given, {"x": ["n", 33]})).parameters == ROWS * 33 + ROWS


def test_other_sizes_are_not_read(model_of: ModelOf) -> None:
    """Bytes or scales that K, N and the block size do not go with; figures count what is in the file."""
    given = constants(np.random.default_rng(0), 64, 4, 32)
    for name, array in (("q", given["q"][:, :1]), ("s", given["s"][:, :1])):
        model = model_of(
            [n_bits("x q s", 64, 4, 32)], {"q": given["q"], "s": given["s"], name: array}, {"x": ["n", 64]}
        )
        assert not any(stored_weights(node) for node in model.nodes())
        assert model_stats(model).parameters >= ROWS * 16


def test_a_computed_scale_leaves_the_bytes(model_of: ModelOf) -> None:
    """Where scales are not constant the weight is not read; figures count what is in the file and do not fail."""
    given = constants(np.random.default_rng(0), 64, 4, 32)
    nodes = [helper.make_node("Abs", ["s"], ["t"]), n_bits("x q t", 64, 4, 32)]
    model = model_of(nodes, {"q": given["q"], "s": given["s"]}, {"x": ["n", 64]})
    assert not any(stored_weights(node) for node in model.nodes())
    assert model_stats(model).parameters >= ROWS * 32


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("zero_points", [True, False])
def test_tables(model_of: ModelOf, answer_of: AnswerOf, packed: bool, zero_points: bool) -> None:
    """A table in bytes or in a type of 4 bits, whose zero is 8 or 0 where it has no zero points (rtol 1e-6)."""
    rng = np.random.default_rng(0)
    levels, zeros = rng.integers(0, 16, (20, 70)), rng.integers(0, 16, (20, 3))
    kind = onnx_tensor(packed)
    given = {"q": kind(levels), "s": rng.uniform(0.01, 0.02, (20, 3)).astype(np.float32)}
    given |= {"z": kind(zeros)} if zero_points else {}
    attributes = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    inputs = ["q", "x", "s", *(["z"] if zero_points else [])]
    node = helper.make_node("GatherBlockQuantized", inputs, ["y"], domain=MICROSOFT, **attributes)
    model = model_of([node], given, {"x": ["n"]}, True)
    (stored,) = stored_weights(next(iter(model.nodes())))
    zero = np.repeat(zeros, 32, axis=1)[:, :70] if zero_points else (8 if packed else 0)
    assert model_stats(model).parameters == 20 * 70
    assert model_stats(model).nonzero_parameters == np.count_nonzero(levels != zero)
    index = np.asarray([0, 19, -1, 7])
    np.testing.assert_allclose(answer_of(model, index), stored.weight.dequantize()[index], rtol=1e-6, atol=1e-7)


def onnx_tensor(packed: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Levels as bytes of two, or in numpy's type of 4 bits."""
    import ml_dtypes

    return (lambda levels: pack(levels, 4)) if packed else (lambda levels: levels.astype(ml_dtypes.uint4))
