"""ONNX files, and ONNX graphs that an exporter made, into a `Model`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx_ir
from google.protobuf.message import DecodeError

from modelpress_compression.errors import (
    ModelNotRunnableError,
    RejectedModelError,
    UnsupportedFormatError,
    UnsupportedOperatorError,
)
from modelpress_compression.graph.metadata import clear_debug_metadata
from modelpress_compression.loaders.external_data import check_external_data
from modelpress_compression.loaders.functions import check_functions
from modelpress_compression.loaders.named_inputs import apply_specs
from modelpress_compression.loaders.normalize import normalize
from modelpress_compression.loaders.source import Source
from modelpress_compression.model import Model, Provenance
from modelpress_compression.specs import DTYPES, TensorSpec

_MAX_PROTOBUF_BYTES = 2**31 - 1
# Domains whose operators onnxruntime has for CPU; everything else must be a function of the model.
_ONNX_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
_RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc", "ai.onnx.contrib")


def load_onnx(source: Source, specs: Sequence[TensorSpec]) -> Model:
    """An ONNX file with its data files. Raises as `loaders.load`."""
    from modelpress_compression.runtime import session_of

    proto = _parse(source.main)
    data = check_external_data(proto, source)
    ir = _to_ir(proto, source.main.parent)
    del proto
    model = normalize(Model(ir, source.provenance("onnx", data)))
    model = apply_specs(model, specs)
    with session_of(model, optimize=False):  # says what onnxruntime refuses, now rather than in the middle of a job
        return model


def from_exporter(path: str | os.PathLike[str], provenance: Provenance) -> Model:
    """The file that an exporter of ours wrote; its inputs and outputs are as the exporter named them."""
    path = Path(path)
    # In memory: the exporter's folder is gone before the model is.
    ir = onnx_ir.external_data.load_to_model(_to_ir(_parse(path), path.parent))
    clear_debug_metadata(ir)  # the exporter's, not the user's
    return normalize(Model(ir, provenance))


def _parse(path: Path) -> onnx.ModelProto:
    if path.stat().st_size > _MAX_PROTOBUF_BYTES:
        raise UnsupportedFormatError(
            "The ONNX file has more than 2 GiB, which protobuf cannot read; save it with external data."
        )
    try:
        # Without its external data: their paths are not checked yet.
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise UnsupportedFormatError(
            "The file is no readable ONNX model: it is damaged, cut short or of another format."
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise UnsupportedFormatError("The file is no ONNX model: it holds no graph.")
    _check_graph(proto)
    return proto


def _check_graph(proto: onnx.ModelProto) -> None:
    check_functions(proto)
    if not proto.graph.node:
        raise ModelNotRunnableError("The model's graph has no nodes: there is nothing to run or compress.")
    if not proto.graph.output:
        raise ModelNotRunnableError("The model's graph has no outputs.")
    if proto.graph.sparse_initializer:
        raise UnsupportedOperatorError(
            "The model has sparse initializers, which cannot be compressed here; export it with dense weights.",
            op_type="SparseTensor",
        )
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.WhichOneof("value") not in ("tensor_type", None):
            raise UnsupportedFormatError(
                f"{value.name!r} is a sequence, map or optional; inputs and outputs must be tensors."
            )
    _check_input_types(proto)


def _check_input_types(proto: onnx.ModelProto) -> None:
    given = {item.name for item in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in given:
            continue
        try:
            dtype = onnx_ir.DataType(value.type.tensor_type.elem_type).numpy().name
        except (TypeError, ValueError):
            dtype = "unknown"
        if dtype not in DTYPES:
            raise UnsupportedFormatError(
                f"Input {value.name!r} has the element type {dtype}; it must be one of {', '.join(DTYPES)}."
            )


def _to_ir(proto: onnx.ModelProto, folder: Path) -> onnx_ir.Model:
    _check_operators(proto)
    try:
        ir = onnx_ir.from_proto(proto)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RecursionError) as error:
        raise RejectedModelError(
            f"The ONNX graph is not valid: {' '.join(str(error).split())[:300]}", finding="INVALID_GRAPH"
        ) from error
    onnx_ir.external_data.set_base_dir(ir.graph, folder)
    return ir


def _check_operators(proto: onnx.ModelProto) -> None:
    """Every operator must be in a standard, in onnxruntime, or a function of the model."""
    opsets = {item.domain if item.domain != "ai.onnx" else "": item.version for item in proto.opset_import}
    functions = {(item.domain, item.name) for item in proto.functions}
    _check_nodes(proto.graph.node, opsets, functions)
    for function in proto.functions:
        own = {item.domain if item.domain != "ai.onnx" else "": item.version for item in function.opset_import}
        _check_nodes(function.node, own or opsets, functions)


def _check_nodes(nodes: Sequence[onnx.NodeProto], opsets: dict[str, int], functions: set[tuple[str, str]]) -> None:
    for node in nodes:
        if (node.domain, node.op_type) not in functions and not _is_known(node, opsets):
            domain = node.domain or "ai.onnx"
            raise UnsupportedOperatorError(
                f"Node {(node.name or node.output[0] if node.output else '')[:120]!r}: there is no operator "
                f"{node.op_type[:80]!r} in the domain {domain[:80]!r}"
                f"{f' version {opsets[node.domain]}' if node.domain in opsets else ''}; export the model with standard "
                f"ONNX operators.",
                op_type=node.op_type[:80],
                domain=domain[:80],
                node=node.name[:120],
            )
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                _check_nodes(graph.node, opsets, functions)


def _is_known(node: onnx.NodeProto, opsets: dict[str, int]) -> bool:
    if node.domain in _RUNTIME_DOMAINS:
        return True
    if node.domain not in _ONNX_DOMAINS:
        return False
    domain = "" if node.domain == "ai.onnx" else node.domain
    version = min(opsets.get(domain, 1), onnx.defs.onnx_opset_version() if domain == "" else 1000)
    return bool(onnx.defs.has(node.op_type, version, domain))
