"""MiniLM's embedding table in 8, 4 and 2 bits; and codebooks beside levels in equal steps.

    python benchmarks/two_bits.py --models DIR [--codebooks]

Prints two tables. Of the embedding: bytes that it takes, signal to noise at the outputs with it alone in that form, and
the task's metric. With --codebooks instead: signal to noise of the matrices themselves, in the mean and of the worst,
and the time of one product on one thread. DIR is as for `real_models.py`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
from model_evaluation import evaluate
from modelpress_compression import load
from modelpress_compression.encodings.weight import pack
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.graph.read import constant_array, is_op, required
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.weight_only.blocks import quantize_blocks
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FORMS = ((8, 32), (4, 128), (4, 32), (2, 64), (2, 32))
EXTENTS = (384, 1536, 32)  # inputs, outputs and rows of the product that is timed
_ROUNDS, _RUNS, _DRAWN = 20, 200, 20_000

Matrix = NDArray[np.float32]


def embeddings(models: Path, folder: Path) -> Iterator[str]:
    """A row for each form of the largest table."""
    evaluate("minilm", models, "--make-calib", str(folder / "data.npz"))
    model = load(models / "files" / "minilm.onnx")
    with np.load(folder / "data.npz") as arrays:
        data = InputData.from_arrays({spec.name: arrays[spec.name] for spec in model.inputs}, model.inputs)
    paths = folder / "float.onnx", folder / "narrow.onnx"
    model.save(paths[0])
    yield "| bits | block | MB | SQNR, dB | metric |\n" + "| --- " * 5 + "|"
    for bits, size in FORMS:
        narrow = model.clone()
        table = max((required(node, 0) for node in narrow.graph if is_op(node, "Gather")), key=_size)
        quantized = quantize_blocks(np.asarray(constant_array(table), np.float32), bits, size)
        replace_numbers(table, quantized.dequantize())
        narrow.save(paths[1])
        fidelity = next(iter(compare_outputs(*paths, data).outputs.values()))
        metric = evaluate("minilm", models, "--model", str(paths[1]), "--threads", "1")
        cells = (bits, size, f"{quantized.stored_bytes / 1e6:.1f}", f"{fidelity.sqnr_db or 0:.1f}", metric)
        yield "| " + " | ".join(map(str, cells)) + " |"


def _size(value: onnx_ir.Value) -> int:
    array = constant_array(value)
    return 0 if array is None else array.size


def codebooks(model: Model) -> Iterator[str]:
    """Signal to noise of the products' weights [O, K]."""
    weights = [
        np.ascontiguousarray(np.asarray(array, np.float32).T)
        for node in model.graph
        if is_op(node, "MatMul") and (array := constant_array(required(node, 1))) is not None and array.ndim == 2
    ]
    yield "| form | bits | bits a weight | SQNR, dB | worst |\n" + "| --- " * 5 + "|"
    for bits in (2, 4):
        for size in (32, 128):
            found = [decibels(w, quantize_blocks(w, bits, size).dequantize()) for w in weights]
            yield f"| equal steps, blocks of {size} | {bits} | {bits + (32 + bits) / size:.2f} | {both(found)} |"
        found = [decibels(w, by_codebook(w, 1 << bits)) for w in weights]
        spent = bits + 32 * sum(len(w) for w in weights) / sum(w.size for w in weights)
        yield f"| codebook, a scale a row | {bits} | {spent:.2f} | {both(found)} |"


def by_codebook(weight: Matrix, count: int) -> Matrix:
    """The values that k-means finds for rows of a mean magnitude of 1."""
    scale = np.abs(weight).mean(axis=1, keepdims=True)
    rows = weight / scale
    drawn = np.random.default_rng(0).choice(rows.reshape(-1), _DRAWN)
    values = np.quantile(drawn, (np.arange(count) + 0.5) / count)
    for _ in range(_ROUNDS):
        nearest = np.abs(drawn[:, None] - values).argmin(axis=1)
        values = np.array([drawn[nearest == k].mean() if (nearest == k).any() else values[k] for k in range(count)])
    found: Matrix = (values[np.searchsorted((values[1:] + values[:-1]) / 2, rows)] * scale).astype(np.float32)
    return found


def decibels(weight: Matrix, other: Matrix) -> float:
    return float(10 * np.log10(np.square(weight).sum() / np.square(weight - other).sum()))


def both(found: list[float]) -> str:
    return f"{np.mean(found):.1f} | {min(found):.1f}"


def times() -> Iterator[str]:
    """Of one product: in float32, with a codebook that is folded and one that is not, and in 4 bits."""
    inputs, outputs, rows = EXTENTS
    rng = np.random.default_rng(0)
    indices = rng.integers(0, 16, (inputs, outputs)).astype(np.uint8)
    values = rng.standard_normal(16).astype(np.float32)
    lookup = [
        helper.make_node("Cast", ["i"], ["j"], to=TensorProto.INT32),
        helper.make_node("Gather", ["c", "j"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    book = {"i": indices, "c": values}
    four = quantize_blocks(np.ascontiguousarray(values[indices].T), 4, 32)
    blocks = {
        "w": pack(four.levels, 4).reshape(outputs, -1, 16),
        "s": four.scale.reshape(-1),
        "z": pack(four.zero_point, 4).reshape(-1),
    }
    size = {"K": inputs, "N": outputs, "bits": 4, "block_size": 32, "accuracy_level": 4}
    product = helper.make_node("MatMulNBits", ["x", "w", "s", "z"], ["y"], domain="com.microsoft", **size)
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    yield "| product | CPU time, ms |\n| --- | --- |"
    yield f"| float32 | {cpu_ms([helper.make_node('MatMul', ['x', 'w'], ['y'])], {'w': values[indices]}, x):.2f} |"
    yield f"| codebook, folded when it is loaded | {cpu_ms(lookup, book, x):.2f} |"
    yield f"| codebook, looked up in every run | {cpu_ms(lookup, book, x, optimize=False):.2f} |"
    yield f"| MatMulNBits, 4 bits | {cpu_ms([product], blocks, x):.2f} |"


def cpu_ms(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], x: Matrix, *, optimize: bool = True) -> float:
    """The median over runs on one thread."""
    graph = helper.make_graph(
        nodes, "product", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    found = []
    for _ in range(_RUNS):
        began = time.process_time()
        session.run(None, {"x": x})
        found.append(1000 * (time.process_time() - began))
    return float(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="Embeddings in 2 bits, and codebooks.")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--codebooks", action="store_true")
    arguments = parser.parse_args()
    models = arguments.models.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.codebooks:
            for row in (*codebooks(load(models / "files" / "minilm.onnx")), *times()):
                print(row, flush=True)
        else:
            for row in embeddings(models, Path(temporary)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
