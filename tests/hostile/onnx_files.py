"""ONNX models that lie, explode, or point elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# A terminal's colour and title, a cleared screen, markup, text turned around, and lines of its own.
EVIL = '\x1b[31mRED\x1b]0;title\x07\x9b2J<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202e\r\n'


def value(name: str, shape: list[Any] | None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model_of(nodes: list[onnx.NodeProto], **parts: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", parts.get("inputs", [value("x", [2, 4])]), [value("y", None)], parts.get("weights", [])
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(name, 1) for name in parts.get("domains", ()))]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=parts.get("functions", ()))


def relu(**parts: Any) -> onnx.ModelProto:
    return model_of([helper.make_node("Relu", ["x"], ["y"])], **parts)


def weighted(weight: onnx.TensorProto) -> onnx.ModelProto:
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], weights=[weight])


def external(*entries: tuple[str, str], dims: tuple[int, ...] = (4,)) -> onnx.ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, text in entries:
        tensor.external_data.add(key=key, value=text)
    return weighted(tensor)


def claiming(*dims: int) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.zeros(4, np.float32), "w")
    del weight.dims[:]
    weight.dims.extend(dims)
    return weighted(weight)


def functions(count: int, *, closed: bool) -> onnx.ModelProto:
    """Each calls the one before twice; `closed`: and the first calls the last."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    made = []
    for index in range(count):
        inner = f"f{index - 1}" if index or closed else "Relu"
        inner = f"f{count - 1}" if closed and not index else inner
        domain = "" if inner == "Relu" else "f"
        nodes = [helper.make_node(inner, [source], [target], domain=domain) for source, target in ("ab", "bc")]
        made.append(helper.make_function("f", f"f{index}", ["a"], ["c"], nodes, opsets))
    call = helper.make_node(f"f{count - 1}", ["x"], ["y"], domain="f")
    return model_of([call], functions=made, domains=["f"])


def nested(depth: int) -> bytes:
    """Graphs within attributes of nodes within graphs, in wire format: no library would write so many."""

    def field(number: int, data: bytes) -> bytes:
        size, out = len(data), bytes([number << 3 | 2])
        while size > 127:
            out, size = out + bytes([size & 127 | 128]), size >> 7
        return out + bytes([size]) + data

    data = b""
    for _ in range(depth):
        data = field(1, field(5, field(6, data)))
    return b"\x08\x08" + field(7, data)


def hostile_names(path: Path) -> Path:
    """Every name, and whatever else is text, is hostile."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32), EVIL + n) for n in ("w", "v")]
    nodes = [
        helper.make_node("MatMul", [EVIL + "x", EVIL + "w"], [EVIL + "a"], name=EVIL + "1"),
        helper.make_node("Relu", [EVIL + "a"], [EVIL + "b"], name=EVIL + "2"),
        helper.make_node("MatMul", [EVIL + "b", EVIL + "v"], [EVIL + "y"], name=EVIL + "3"),
    ]
    x = helper.make_tensor_value_info(EVIL + "x", TensorProto.FLOAT, [EVIL + "batch", 16])
    y = helper.make_tensor_value_info(EVIL + "y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, EVIL, [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name=EVIL)
    model.metadata_props.add(key=EVIL, value=EVIL)
    onnx.save(model, path)
    return path
