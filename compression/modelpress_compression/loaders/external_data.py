"""External data of an ONNX file: every location is checked here before any library opens a file.

A location is a path that the model's author chose. It must stay in the model's folder, by name and on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import onnx

from modelpress_compression.errors import RejectedModelError, UnsupportedFormatError
from modelpress_compression.loaders.source import Source


def check_external_data(proto: onnx.ModelProto, source: Source) -> list[Path]:
    """The data files that the model needs, each checked.

    Links of any kind are refused, for they could lead to any file of this machine; a store that hands out its blobs
    must copy them.

    Raises RejectedModelError (finding=EXTERNAL_PATH) for paths that lead elsewhere, UnsupportedFormatError for files
    that are missing or too short.
    """
    folder = source.main.parent
    found: dict[str, Path] = {}
    for tensor in _tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        if location not in found:
            found[location] = _check_location(location, folder)
        _check_range(tensor, fields, found[location])
    return list(found.values())


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


def _check_range(tensor: onnx.TensorProto, fields: dict[str, str], path: Path) -> None:
    """Offset and length must lie in the file: memory-mapped beyond its end they would kill the process."""
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


def _bits(data_type: int) -> int:
    """Bits of one element. Raises RejectedModelError for types that have no fixed size."""
    import onnx_ir

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
