"""What an ONNX file may contain, checked before any library follows it.

- Functions call functions. Twenty-six of them, each calling the one before twice, are 1.6 KB in a file and 67 million
  nodes in any tool that inlines them; a function that calls itself never ends.
- The location of external data is a path that the model's author chose. It must stay in the model's folder, by name and
  on the disk.
- Inputs must be tensors, and every operator one that onnxruntime has.
- A sparse tensor of a few bytes may claim any size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir

from modelpress_compression import mapped
from modelpress_compression.errors import (
    ModelNotRunnableError,
    RejectedModelError,
    UnsupportedFormatError,
    UnsupportedOperatorError,
)
from modelpress_compression.loaders.source import Source
from modelpress_compression.model import holds_map
from modelpress_compression.specs import DTYPES

# About half a millisecond of a processor for each, for an inspection alone; the largest models in use have 50,000.
MAX_NODES = 100_000
MAX_NAME_CHARS = 4096
# Domains whose operators onnxruntime has for CPU; everything else must be a function of the model.
_ONNX_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
_RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc", "ai.onnx.contrib")

# Operators that onnxruntime has beside the standard in the standard's own domain; its tools write them there.
_RUNTIME_OPERATORS = frozenset((
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization", "Affine", "Crop",
    "DynamicSlice", "ImageScaler", "MeanVarianceNormalization", "ParametricSoftplus", "ScaledTanh", "ThresholdedRelu",
    "Scale",
))  # fmt: skip
_KINDS = {
    "sequence_type": "a sequence",
    "map_type": "a map",
    "optional_type": "an optional",
    "sparse_tensor_type": "a sparse tensor",
}

_Key = tuple[str, str, str]
_Functions = dict[_Key, onnx.FunctionProto]


def check_graph(proto: onnx.ModelProto) -> None:
    """Raises ModelNotRunnableError, UnsupportedOperatorError, UnsupportedFormatError, RejectedModelError."""
    check_functions(proto)
    check_names(proto)
    if not proto.graph.node:
        raise ModelNotRunnableError("The model's graph has no nodes: there is nothing to run or compress.")
    if not proto.graph.output:
        raise ModelNotRunnableError("The model's graph has no outputs.")
    _check_input_types(proto)
    _check_map_outputs(proto)
    _check_reads(proto.graph, ())


def _check_reads(graph: onnx.GraphProto, outer: tuple[Set[str], ...]) -> None:
    """What a node reads must be there; in which order nodes stand does not matter here. `outer`: the names of the
    graphs around this one."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {sparse.values.name for sparse in graph.sparse_initializer}
    own |= {name for node in graph.node for name in node.output}
    scopes = (own, *outer)
    for node in graph.node:
        for name in filter(None, node.input):
            if not any(name in scope for scope in scopes):
                reader = node.name or next(iter(node.output), "")
                raise RejectedModelError(
                    f"The ONNX graph is not valid: node {reader[:120]!r} ({node.op_type[:80]}) reads {name[:120]!r}, "
                    f"which no node makes, and which is neither an input nor an initializer.",
                    finding="INVALID_GRAPH",
                )
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _check_reads(inner, scopes)


def _check_map_outputs(proto: onnx.ModelProto) -> None:
    zipped = {output for node in proto.graph.node if node.op_type == "ZipMap" for output in node.output}
    for value in proto.graph.output:
        if holds_map(value.type) and value.name not in zipped:
            raise UnsupportedFormatError(
                f"Output {value.name!r} is a map. Of these only the outputs of ZipMap are kept; end the graph "
                f"before the map, and give out the tensor that it is made from."
            )


def _check_input_types(proto: onnx.ModelProto) -> None:
    given = {item.name for item in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in given:
            continue
        if (kind := value.type.WhichOneof("value")) not in ("tensor_type", None):
            raise UnsupportedFormatError(
                f"Input {value.name!r} is {_KINDS.get(str(kind), 'no tensor')}. Samples are read from arrays, one for "
                f"each input, so inputs must be tensors; export the model with the tensors themselves as inputs."
            )
        if value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            continue
        try:
            dtype = onnx_ir.DataType(value.type.tensor_type.elem_type).numpy().name
        except (TypeError, ValueError):
            dtype = "unknown"
        if dtype not in DTYPES:
            raise UnsupportedFormatError(
                f"Input {value.name!r} has the element type {dtype}; it must be one of {', '.join(DTYPES)}."
            )


def check_names(proto: onnx.ModelProto) -> None:
    """Names go into messages, reports and file names, so they have an end.

    Raises RejectedModelError (finding=NAME_TOO_LONG).
    """
    longest = max(_names(proto), key=len, default="")
    if len(longest) > MAX_NAME_CHARS:
        raise RejectedModelError(
            f"The model has a name of {len(longest)} characters, which begins with {longest[:40]!r}; at most "
            f"{MAX_NAME_CHARS} are read.",
            finding="NAME_TOO_LONG",
        )


def _names(proto: onnx.ModelProto) -> Iterator[str]:
    yield from (proto.producer_name, proto.producer_version, proto.domain)
    for graph in graphs_within([proto.graph]):
        yield graph.name
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        yield from (tensor.name for tensor in graph.initializer)
        yield from _node_names(graph.node)
    for function in proto.functions:
        yield from (function.name, function.domain, *function.input, *function.output)
        yield from _node_names(function.node)


def _node_names(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, *node.output)


def graphs_within(graphs: Iterable[onnx.GraphProto]) -> Iterator[onnx.GraphProto]:
    """The graphs and those within them."""
    for graph in graphs:
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                yield from graphs_within((attribute.g, *attribute.graphs))


def check_operators(proto: onnx.ModelProto) -> None:
    """Every operator must be in a standard, in onnxruntime, or a function of the model.

    Raises UnsupportedOperatorError.
    """
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
    if domain == "" and node.op_type in _RUNTIME_OPERATORS:
        return True
    version = min(opsets.get(domain, 1), onnx.defs.onnx_opset_version() if domain == "" else 1000)
    return bool(onnx.defs.has(node.op_type, version, domain))


def check_functions(proto: onnx.ModelProto) -> int:
    """Number of nodes after inlining.

    Raises RejectedModelError (finding=TOO_MANY_NODES, FUNCTION_BOMB or RECURSIVE_FUNCTION).
    """
    written = itertools.chain(proto.graph.node, *(function.node for function in proto.functions))
    # No further than the limit: counting what is far beyond it takes long as well.
    if next(itertools.islice(_calls(written), MAX_NODES, None), None) is not None:
        raise RejectedModelError(
            f"The model has more than {MAX_NODES} nodes, the most that are read. Export it with loops that are not "
            "unrolled, or in parts.",
            finding="TOO_MANY_NODES",
        )
    functions: _Functions = {(item.domain, item.name, item.overload): item for item in proto.functions}
    sizes: dict[_Key, int] = {}
    for key in functions:
        _size(key, functions, sizes)
    total = sum(sizes.get(call, 1) for call in _calls(proto.graph.node))
    if total > MAX_NODES:
        raise _too_many(total)
    return total


def _too_many(total: int) -> RejectedModelError:
    return RejectedModelError(
        f"The model has {total} nodes when its functions are written out; at most {MAX_NODES} are read.",
        finding="FUNCTION_BOMB",
    )


def _size(start: _Key, functions: _Functions, sizes: dict[_Key, int]) -> None:
    """Fills in sizes[start], depth first without recursion: the nesting is as deep as the file's author likes."""
    stack, open_calls = [start], set[_Key]()
    while stack:
        key = stack[-1]
        if key in sizes:
            open_calls.discard(stack.pop())
            continue
        open_calls.add(key)
        calls = list(_calls(functions[key].node))
        pending = {call for call in calls if call in functions and call not in sizes}
        if pending & open_calls:
            raise RejectedModelError(
                f"The model's function {key[1][:80]!r} calls itself; ONNX does not allow that.",
                finding="RECURSIVE_FUNCTION",
            )
        if pending:
            stack.extend(pending)
            continue
        sizes[key] = sum(sizes.get(call, 1) for call in calls)
        if sizes[key] > MAX_NODES:
            raise _too_many(sizes[key])


def _calls(nodes: Iterable[onnx.NodeProto]) -> Iterator[_Key]:
    for node in nodes:
        yield node.domain, node.op_type, node.overload
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _calls(graph.node)


def check_external_data(proto: onnx.ModelProto, source: Source) -> list[Path]:
    """The data files that the model needs, each checked; the model then says of each tensor what was checked, no more.

    Links of any kind are refused, for they could lead to any file of this machine; a store that hands out its blobs
    must copy them.

    Raises RejectedModelError (finding=EXTERNAL_PATH) for paths that lead elsewhere, UnsupportedFormatError for files
    that are missing or too short.
    """
    folder = source.main.parent
    found: dict[str, Path] = {}
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            _check_extent(tensor)
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        if location == mapped.OWN_FILE:
            _settle(tensor, location, *_check_range(tensor, fields, source.main))
            continue
        if location not in found:
            found[location] = _check_location(location, folder)
        _settle(tensor, location, *_check_range(tensor, fields, found[location]))
    return list(found.values())


def _check_extent(tensor: onnx.TensorProto) -> None:
    """Bytes in the file itself are as many as the shape says: else whoever believes the shape asks for terabytes."""
    if not tensor.HasField("raw_data"):
        return
    expected = (math.prod(tensor.dims) * _bits(tensor.data_type) + 7) // 8
    if len(tensor.raw_data) != expected:
        raise RejectedModelError(
            f"The weight {tensor.name[:80]!r} has {len(tensor.raw_data)} bytes, but its shape "
            f"{list(tensor.dims)[:8]} needs {expected}. Export the model again.",
            finding="WEIGHT_SIZE",
        )


def _settle(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Writes down what was checked: a key given twice, or data beside it, could be read in another way."""
    for field in tensor.DESCRIPTOR.fields:
        if field.name.endswith("_data"):
            tensor.ClearField(field.name)
    for key, value in (("location", str(PurePosixPath(location))), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _check_location(location: str, folder: Path) -> Path:
    path = PurePosixPath(location)
    windows = "\\" in location or (len(location) > 1 and location[1] == ":")
    if not location or path.is_absolute() or ".." in path.parts or windows or not location.isprintable():
        raise _escapes(location)
    target = folder / path
    for part in (target, *target.parents):
        if part == folder:
            break
        if part.is_symlink():
            raise _escapes(location)
    if not target.resolve().is_relative_to(folder.resolve()):
        raise _escapes(location)
    if not target.is_file():
        raise UnsupportedFormatError(
            f"The model keeps weights in the file {location[:200]!r}, which is not there; "
            f"upload it together with the model."
        )
    if target.stat().st_nlink > 1:
        raise _escapes(location)
    return target


def _escapes(location: str) -> RejectedModelError:
    return RejectedModelError(
        f"The model's external data is at {location[:200]!r}, which may lead out of the model's folder; save the data "
        f"beside the model, as a file of its own.",
        finding="EXTERNAL_PATH",
    )


def _check_range(tensor: onnx.TensorProto, fields: dict[str, str], path: Path) -> tuple[int, int]:
    """Offset and length, which must lie in the file: memory-mapped beyond its end they would kill the process."""
    try:
        offset, length = int(fields.get("offset") or 0), int(fields.get("length") or 0)
    except ValueError as error:
        raise RejectedModelError(
            f"Weight {tensor.name[:80]!r}: offset or length of its external data is no number.", finding="EXTERNAL_DATA"
        ) from error
    expected = (math.prod(tensor.dims) * _bits(tensor.data_type) + 7) // 8
    if min(offset, length, *tensor.dims, 0) < 0 or (length and length != expected):
        raise RejectedModelError(
            f"Weight {tensor.name[:80]!r}: its external data has {length} bytes, its shape needs {expected}.",
            finding="EXTERNAL_DATA",
        )
    if offset + expected > path.stat().st_size:
        raise UnsupportedFormatError(
            f"The data file {path.name!r} has {path.stat().st_size} bytes, but weight {tensor.name[:80]!r} ends at "
            f"{offset + expected}: it is cut short, or belongs to another model."
        )
    return offset, expected


def _bits(data_type: int) -> int:
    """Bits of one element. Raises RejectedModelError for types that have no fixed size."""
    try:
        return onnx_ir.DataType(data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise RejectedModelError(
            f"A weight of the element type {data_type} has external data, which numbers alone may have.",
            finding="EXTERNAL_DATA",
        ) from error


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)
        yield from _attribute_tensors(function.attribute_proto)
    for training in proto.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.TensorProto]:
    for attribute in attributes:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        if attribute.HasField("g"):
            yield from _graph_tensors(attribute.g)
        for graph in attribute.graphs:
            yield from _graph_tensors(graph)
