"""Graphs whose weights stay on the disk: memory-mapped where numbers are read, streamed where a file is written.

    from_file      a file's protobuf with references to the weights in it
    write          a graph into a file, weight after weight, as one protobuf or with a data file beside it
    stored_in      the graph with its weights read from the file that `write` made
    for_session    a graph as onnxruntime takes it: a small protobuf, and where it finds the weights
    WeightFile     weights that a pass has made, one after the other

So memory holds a weight only while a pass works on it, and a session's own copy while there is a session.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir
from numpy.typing import NDArray

from modelpress_compression import wire

# Below this a model is handled in memory: nothing is gained by references to it.
LARGE_BYTES = 64 * 1024**2  # 64 MiB
# Smaller tensors lie in the protobuf: a page for each, and a mapping, would cost more than they do.
MAPPED_BYTES = 64 * 1024  # 64 KiB
STREAMED_BYTES = 1024  # 1 KiB
# Where large tensors begin in a data file, so that every system can map them.
ALIGNMENT_BYTES = 64 * 1024  # 64 KiB
_ALIGNED_BYTES = 1024**2  # 1 MiB
# Location of weights in the file that refers to them, and of those that a writer is still to put in.
OWN_FILE = "\0own file"
_PENDING = "\0pending weight"
# Kinds of elements that numpy has itself.
_NUMPY_KINDS = "fiub"

Places = Mapping[int, tuple[Path, int]]
Finish = Callable[[onnx.ModelProto], None]


def is_large(size_bytes: int) -> bool:
    """Whether a model of this size is handled by references."""
    return size_bytes >= LARGE_BYTES


def is_plain(dtype: onnx_ir.DataType) -> bool:
    """Whether numpy itself has elements of this type."""
    return dtype.numpy().kind in _NUMPY_KINDS


def from_file(path: Path, location: str = OWN_FILE) -> bytes:
    """The serialized ModelProto in a file, whose weights are external data in `location`: in this very file.

    Raises OSError, ValueError for an empty file, DecodeError.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return wire.without_weights(data, location, MAPPED_BYTES)


def read(path: Path) -> onnx.ModelProto:
    """The protobuf in a file, external data not read. Of a large file, weights are references to `OWN_FILE`.

    Raises OSError, ValueError, DecodeError.
    """
    if not is_large(path.stat().st_size):
        return onnx.load(path, format="protobuf", load_external_data=False)
    return onnx.ModelProto.FromString(from_file(path))


def resolve_own_file(ir: onnx_ir.Model, path: Path) -> None:
    """Tensors in `OWN_FILE` are those of the file `path` from now on."""
    for holder in _holders(ir):
        tensor = holder.in_file
        if tensor is not None and tensor.location == OWN_FILE:
            holder.put(_mapped(tensor, path, tensor.offset or 0))


def write(ir: onnx_ir.Model, path: Path, data_path: Path | None = None, *, finish: Finish) -> Places:
    """Writes the graph; where each of its weights of `STREAMED_BYTES` and more lies then, by the tensor's `id`.

    With a `data_path`, in the same folder, the weights go there. `finish` may change the protobuf. Raises OSError.
    """
    light = ir.clone()
    taken = _take_out(light)
    if data_path is None:
        return _write_one_file(_serialized(light, finish), [holder.tensor for holder in taken], path)
    places: dict[int, tuple[Path, int]] = {}
    with data_path.open("wb") as file:
        for tensor in (holder.tensor for holder in taken):
            if id(tensor) in places:
                continue
            if tensor.nbytes >= _ALIGNED_BYTES:
                file.seek(-file.tell() % ALIGNMENT_BYTES, os.SEEK_CUR)
            places[id(tensor)] = data_path, file.tell()
            _copy(tensor, file)
    for holder in taken:
        holder.put(_reference(holder.tensor, data_path.name, places[id(holder.tensor)][1]))
    path.write_bytes(_serialized(light, finish))
    return places


def _serialized(light: onnx_ir.Model, finish: Finish) -> bytes:
    """`light` loses the shapes of its constants, which stand with the constants themselves."""
    for graph in (light.graph, *light.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None and not value.is_graph_input() and not value.is_graph_output():
                value.shape = value.type = None
    proto = onnx_ir.to_proto(light)
    _list_once(proto.graph)
    finish(proto)
    return proto.SerializeToString()


def _list_once(graph: onnx.GraphProto) -> None:
    """Of constants that are outputs too, shapes and types stand with the outputs."""
    outputs = {value.name for value in graph.output}
    for index in reversed(range(len(graph.value_info))):
        if graph.value_info[index].name in outputs:
            del graph.value_info[index]


def _write_one_file(serialized: bytes, tensors: list[onnx_ir.TensorProtocol], path: Path) -> Places:
    places: dict[int, tuple[Path, int]] = {}
    with path.open("wb") as file:
        for piece in wire.with_weights(serialized, _PENDING):
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                places[id(tensors[piece])] = path, file.tell()
                _copy(tensors[piece], file)
    return places


def stored_in(ir: onnx_ir.Model, places: Places) -> None:
    """Large initializers are read from the places that `write` gave for them, from now on; memory is free of them."""
    for holder in _holders(ir):
        tensor = holder.tensor
        if tensor.nbytes >= MAPPED_BYTES and (place := places.get(id(tensor))) is not None:
            holder.put(_mapped(tensor, *place))


def stored_at(value: onnx_ir.Value, tensor: onnx_ir.TensorProtocol, path: Path, offset: int) -> None:
    """The initializer has the tensor's numbers, and reads them from this place in a file."""
    value.const_value = _mapped(tensor, path, offset)


def keep_mapped(ir: onnx_ir.Model) -> None:
    """Maps all weights that lie in files: they can be read as long as the graph lives, even when the files are gone."""
    for holder in _holders(ir):
        if holder.in_file is not None:
            holder.in_file.numpy()


def load_all(ir: onnx_ir.Model) -> None:
    """Brings every tensor that lies in a file into memory; the files may go then."""
    for holder in _holders(ir):
        if holder.in_file is not None:
            holder.put(_in_memory(holder.in_file))


class WeightFile:
    """A new file in a folder, for the weights that are made of a large model's: each is written when it is there, and
    read from the file from then on. The folder has to be there as long as sessions are opened."""

    def __init__(self, folder: Path) -> None:
        descriptor, name = tempfile.mkstemp(prefix="made-", suffix=".weights", dir=folder)
        os.close(descriptor)
        self._path = Path(name)

    @classmethod
    def for_large(cls, size_bytes: int, folder: Path) -> WeightFile | None:
        """None: a model of this size is handled in memory."""
        return cls(folder) if is_large(size_bytes) else None

    def put(self, tensor: onnx_ir.TensorProtocol) -> onnx_ir.TensorProtocol:
        """The same numbers in the file; a small tensor is left as it is. Raises OSError."""
        if tensor.nbytes < MAPPED_BYTES:
            return tensor
        with self._path.open("ab") as file:
            file.write(bytes(-file.tell() % ALIGNMENT_BYTES))
            offset = file.tell()
            _copy(tensor, file)
        return _mapped(tensor, self._path, offset)

    def remove(self) -> None:
        """Gives the room back. What is mapped already can still be read, but not by a new session."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class SessionModel:
    """What onnxruntime is given. `folder` holds the files that `proto` refers to; `arrays`: weights by name, with
    element types; they must live as long as the session."""

    proto: bytes
    folder: Path
    arrays: Mapping[str, tuple[NDArray[np.generic], int]]


def for_session(ir: onnx_ir.Model, most_bytes: int, *, finish: Finish) -> SessionModel | None:
    """The graph for a session: what lies in files stays there, what lies in memory is shared.

    None: more than `most_bytes` would have to be in the protobuf.
    """
    light = ir.clone()
    own = {id(value): name for name, value in light.graph.initializers.items()}
    holders = [holder for holder in _holders(light) if holder.tensor.nbytes >= MAPPED_BYTES]
    files = {Path(holder.in_file.path).resolve() for holder in holders if holder.in_file is not None}
    folder = Path(os.path.commonpath([file.parent for file in files])) if files else Path(os.sep)
    arrays: dict[str, tuple[NDArray[np.generic], int]] = {}
    inside_bytes = 0
    for holder in holders:
        tensor = holder.tensor
        if holder.in_file is not None:
            location = Path(holder.in_file.path).resolve().relative_to(folder)
            holder.put(_reference(tensor, str(location), holder.in_file.offset or 0))
        elif id(holder.value) in own and is_plain(tensor.dtype):
            arrays[own[id(holder.value)]] = tensor.numpy(), int(tensor.dtype)
            holder.put(_reference(tensor, "in memory", 0))
        else:
            inside_bytes += tensor.nbytes
    _load_small(light)
    if inside_bytes > most_bytes:
        return None
    return SessionModel(_serialized(light, finish), folder, arrays)


@dataclass(frozen=True)
class _Holder:
    """Where a graph holds a tensor of numbers: an initializer, or an attribute of a node."""

    tensor: onnx_ir.TensorProtocol
    value: onnx_ir.Value | None = None
    node: onnx_ir.Node | None = None
    attribute: str = ""

    @property
    def in_file(self) -> onnx_ir.ExternalTensor | None:
        """The tensor if it lies in a file."""
        return self.tensor if isinstance(self.tensor, onnx_ir.ExternalTensor) else None

    def put(self, tensor: onnx_ir.TensorProtocol) -> None:
        """Another tensor of the same numbers in its place."""
        if self.value is not None:
            self.value.const_value = tensor
        elif self.node is not None:
            self.node.attributes[self.attribute] = onnx_ir.AttrTensor(self.attribute, tensor)


def _holders(ir: onnx_ir.Model) -> Iterator[_Holder]:
    """Every tensor of numbers, those of functions included."""
    bodies: list[onnx_ir.Graph | onnx_ir.Function] = [ir.graph, *ir.functions.values()]
    for graph in (ir.graph, *(graph for body in bodies for graph in body.subgraphs())):
        for value in list(graph.initializers.values()):
            if value.const_value is not None and not value.const_value.dtype.is_string():
                yield _Holder(value.const_value, value)
    for node in (node for body in bodies for node in body.all_nodes()):
        for name, attribute in list(node.attributes.items()):
            if attribute.type == onnx_ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = attribute.as_tensor()
                if not tensor.dtype.is_string():
                    yield _Holder(tensor, node=node, attribute=name)


def _take_out(light: onnx_ir.Model) -> list[_Holder]:
    """Leaves a reference, by its number, in the place of each weight that is to be streamed; where these were."""
    taken = [holder for holder in _holders(light) if holder.tensor.nbytes >= STREAMED_BYTES]
    for number, holder in enumerate(taken):
        holder.put(_reference(holder.tensor, _PENDING, number))
    _load_small(light)
    return taken


def _load_small(light: onnx_ir.Model) -> None:
    """Small tensors that lie in files go into the protobuf."""
    for holder in _holders(light):
        tensor = holder.in_file
        if tensor is not None and tensor.location != _PENDING and tensor.nbytes < MAPPED_BYTES:
            holder.put(_in_memory(tensor))


def _in_memory(tensor: onnx_ir.ExternalTensor) -> onnx_ir.TensorProtocol:
    return onnx_ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)


def _reference(tensor: onnx_ir.TensorProtocol, location: str, offset: int) -> onnx_ir.ExternalTensor:
    return onnx_ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=onnx_ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
    )


def _mapped(tensor: onnx_ir.TensorProtocol, path: Path, offset: int) -> onnx_ir.ExternalTensor:
    """The tensor in a file that is known to be meant: no folder bounds it."""
    return _reference(tensor, str(path.resolve()), offset)


def _copy(tensor: onnx_ir.TensorProtocol, file: BinaryIO) -> None:
    """A tensor's bytes, without a copy of them in memory where numpy has the type."""
    # A file that has been removed can still be read through its mapping.
    if isinstance(tensor, onnx_ir.ExternalTensor) and Path(tensor.path).is_file():
        tensor.tofile(file)
        return
    if tensor.dtype.bitwidth < 8 or not is_plain(tensor.dtype):
        file.write(tensor.tobytes())
        return
    array = tensor.numpy()
    array = array if array.dtype.byteorder in "=|<" else array.astype(array.dtype.newbyteorder("<"))
    file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
