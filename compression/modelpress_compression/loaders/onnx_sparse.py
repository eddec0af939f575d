"""Sparse constants of an ONNX file, written out: onnxruntime does the same when it loads them.

A sparse tensor holds values [NNZ] and where they stand: indices [NNZ] into the flattened tensor, or [NNZ, rank]. All
other elements are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from modelpress_compression.errors import RejectedModelError
from modelpress_compression.loaders.onnx_check import graphs_within

# All of a model's together, written out: a few bytes may claim any size.
MAX_DENSE_BYTES = 1024**3  # 1 GiB


def write_out_sparse(proto: onnx.ModelProto) -> int:
    """Sparse initializers and Constant nodes become dense ones, in place; returns how many there were.

    Raises RejectedModelError (finding=SPARSE_TENSOR) where indices do not fit, or where the dense tensors of the model
    would have more than 1 GiB.
    """
    left_bytes, count = MAX_DENSE_BYTES, 0
    for graph in graphs_within([proto.graph]):
        for sparse in graph.sparse_initializer:
            dense = _dense(sparse, left_bytes)
            left_bytes, count = left_bytes - len(dense.raw_data), count + 1
            graph.initializer.append(dense)
        graph.ClearField("sparse_initializer")
    for attribute in _sparse_constants(proto):
        dense = _dense(attribute.sparse_tensor, left_bytes)
        left_bytes, count = left_bytes - len(dense.raw_data), count + 1
        attribute.ClearField("sparse_tensor")
        attribute.t.CopyFrom(dense)
        attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
    return count


def _sparse_constants(proto: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """`sparse_value` of Constant nodes, wherever they are."""
    nodes = [node for graph in graphs_within([proto.graph]) for node in graph.node]
    for function in proto.functions:
        nodes += function.node
        bodies = [graph for node in function.node for item in node.attribute for graph in (item.g, *item.graphs)]
        nodes += [node for graph in graphs_within(bodies) for node in graph.node]
    for node in nodes:
        yield from (item for item in node.attribute if item.name == "sparse_value" and item.HasField("sparse_tensor"))


def _dense(sparse: onnx.SparseTensorProto, limit_bytes: int) -> onnx.TensorProto:
    name, dims = sparse.values.name, tuple(sparse.dims)
    if onnx.TensorProto.EXTERNAL in (sparse.values.data_location, sparse.indices.data_location):
        raise _refused(name, "its numbers lie in a file of their own, which is read for dense weights only")
    try:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    except (ValueError, TypeError, KeyError) as error:
        raise _refused(name, "its numbers cannot be read") from error
    if min(dims, default=1) < 0:
        raise _refused(name, f"its shape {list(dims)} has a negative extent")
    if math.prod(dims) * values.itemsize > limit_bytes:
        raise _refused(name, f"written out, the sparse tensors would have more than {MAX_DENSE_BYTES >> 30} GiB")
    dense = np.zeros(math.prod(dims), values.dtype)
    flat = _flat(indices, dims, name)
    if values.shape != flat.shape:
        raise _refused(name, f"it has {values.size} values and {flat.size} places for them")
    dense[flat] = values
    return numpy_helper.from_array(dense.reshape(dims), name)


def _flat(indices: NDArray[np.int64], dims: tuple[int, ...], name: str) -> NDArray[np.int64]:
    """Places in the flattened tensor."""
    limits = np.asarray(dims if indices.ndim == 2 else [math.prod(dims)], np.int64)
    rows = indices if indices.ndim == 2 else indices.reshape(-1, 1)
    if indices.ndim not in (1, 2) or indices.dtype != np.int64 or rows.shape[1] != len(limits):
        raise _refused(name, f"its indices have the shape {indices.shape}, its tensor {dims}")
    if rows.size and (rows.min() < 0 or (rows >= limits).any()):
        raise _refused(name, "an index lies outside of the tensor")
    return np.ravel_multi_index(tuple(rows.T), dims) if indices.ndim == 2 else indices


def _refused(name: str, why: str) -> RejectedModelError:
    return RejectedModelError(
        f"The sparse constant {name[:80]!r} cannot be read: {why}. Export it with dense weights.",
        finding="SPARSE_TENSOR",
    )
