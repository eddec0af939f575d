"""The one representation: every format is loaded into a `Model`, every pass maps a `Model` to a `Model`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
import onnx_ir

from modelpress_compression import mapped
from modelpress_compression.specs import TensorSpec

# The newest that onnxruntime 1.31 loads; nothing newer is ever written.
MAX_OPSET = 26
MAX_IR_VERSION = 13
# Key in `Node.meta`: the name that the loader gave to a node without one, the same every time, so not worth its bytes.
GIVEN_NAME = "modelpress.given_name"
# Key in `Node.meta`: a pass made the node and its name.
MADE = "modelpress.made"
# Protobuf cannot hold 2 GiB; beyond this the weights go into a file of their own.
EXTERNAL_DATA_THRESHOLD_BYTES = 1536 * 1024 * 1024  # 1.5 GiB


@dataclass(frozen=True)
class Provenance:
    """Where a model came from: `format` is onnx, torch_export, torchscript, state_dict, safetensors or pickled_module;
    digest (hex) and size are those of the uploaded file or files."""

    format: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Model:
    """An ONNX graph and what is known about it. Treat it as immutable: passes change a `clone()`."""

    ir: onnx_ir.Model
    provenance: Provenance
    warnings: tuple[str, ...] = field(default=())

    @property
    def graph(self) -> onnx_ir.Graph:
        return self.ir.graph

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.ir.opset_imports.get("", 0)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs that a caller must give: those with a default value (an initializer of the same name) are left out."""
        return tuple(_spec(value) for value in self.graph.inputs if value.name not in self.graph.initializers)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_spec(value) for value in self.graph.outputs)

    def clone(self) -> Model:
        """A copy whose graph may be changed; tensors are shared, since they are immutable."""
        return replace(self, ir=self.ir.clone())

    def with_warnings(self, *warnings: str) -> Model:
        return replace(self, warnings=(*self.warnings, *warnings))

    def graphs(self) -> Iterator[onnx_ir.Graph]:
        """The main graph and every subgraph, functions not included."""
        yield self.ir.graph
        yield from self.ir.graph.subgraphs()

    def nodes(self) -> Iterator[onnx_ir.Node]:
        """All nodes, those of subgraphs included."""
        return iter(self.ir.graph.all_nodes())

    def weight_bytes(self) -> int:
        """Bytes of all initializers and Constant nodes' tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> Iterator[onnx_ir.TensorProtocol]:
        """Every constant tensor of the model: initializers, then tensors of Constant nodes; shared ones once."""
        seen: set[int] = set()
        for graph in self.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None and id(value.const_value) not in seen:
                    seen.add(id(value.const_value))
                    yield value.const_value
        for node in self.nodes():
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if (
                attribute is not None
                and attribute.type == onnx_ir.AttributeType.TENSOR
                and id(attribute.value) not in seen
            ):
                seen.add(id(attribute.value))
                yield attribute.as_tensor()

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Writes the model; returns the files, the main one first.

        Beyond 1.5 GiB of weights they go into `NAME.data` beside it, so that protobuf's limit of 2 GiB is not met.
        Weights are streamed: memory holds no copy of them. Raises OSError.
        """
        return self._write(Path(path))[0]

    def saved(self, path: str | os.PathLike[str], written: Model | None = None) -> Model:
        """Writes the model as `save` does, or `written`, of the same tensors, in its place.

        The same model, whose weights are read from there where they are large.
        """
        _, places = (written or self)._write(Path(path))
        if not mapped.is_large(self.weight_bytes()):
            return self
        model = self.clone()
        mapped.stored_in(model.ir, places)
        return model

    def _write(self, path: Path) -> tuple[list[Path], mapped.Places]:
        if self.weight_bytes() <= EXTERNAL_DATA_THRESHOLD_BYTES:
            return [path], mapped.write(self.ir, path, finish=self.write_map_types)
        data = data_path_of(path)
        return [path, data], mapped.write(self.ir, path, data, finish=self.write_map_types)

    def write_map_types(self, proto: onnx.ModelProto) -> None:
        """Into the serialized model, whose outputs may be maps: readers may want to know."""
        keys = {value.name: key for value in self.graph.outputs if value.type is None and (key := map_keys(value))}
        for output in proto.graph.output:
            if output.name in keys:
                map_type = output.type.sequence_type.elem_type.map_type
                map_type.key_type = onnx.TensorProto.STRING if keys[output.name] == "string" else onnx.TensorProto.INT64
                map_type.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
                map_type.value_type.tensor_type.shape.SetInParent()


def data_path_of(path: Path) -> Path:
    """Where the weights of a model in `path` are if they are not in it."""
    return path.with_name(path.name + ".data")


def file_size_bytes(path: Path) -> int:
    """Size of a saved model, its external data included."""
    data = data_path_of(path)
    return path.stat().st_size + (data.stat().st_size if data.exists() else 0)


def read_ir(path: Path) -> onnx_ir.Model:
    """The graph in a file that `Model.save` wrote; the weights of a large one stay there.

    Raises OSError, ValueError, DecodeError.
    """
    proto = mapped.read(path)
    forget_maps(proto)
    ir = onnx_ir.from_proto(proto)
    onnx_ir.external_data.set_base_dir(ir.graph, path.parent)
    mapped.resolve_own_file(ir, path)
    return ir


def read_graph(path: Path) -> onnx_ir.Graph:
    """The main graph of such a file, to be looked at."""
    return read_ir(path).graph


def forget_maps(proto: onnx.ModelProto) -> None:
    """Takes the types of maps away, which onnx_ir does not know; `Model.save` writes them anew."""
    for value in (*proto.graph.output, *proto.graph.value_info):
        if holds_map(value.type):
            value.ClearField("type")


def holds_map(value_type: onnx.TypeProto) -> bool:
    """Whether the type is a map, or a sequence or optional of maps."""
    kind = value_type.WhichOneof("value")
    while kind in ("sequence_type", "optional_type"):
        value_type = (value_type.sequence_type if kind == "sequence_type" else value_type.optional_type).elem_type
        kind = value_type.WhichOneof("value")
    return bool(kind == "map_type")


def map_keys(value: onnx_ir.Value) -> str | None:
    """`int64` or `string` for the keys of what ZipMap makes, a sequence of maps to float32; None for anything else.

    onnx_ir has no type for maps, so that such a value has none at all.
    """
    producer = value.producer()
    if producer is None or producer.op_type != "ZipMap" or producer.domain != "ai.onnx.ml":
        return None
    return "string" if "classlabels_strings" in producer.attributes else "int64"


def _spec(value: onnx_ir.Value) -> TensorSpec:
    dtype = _type_name(value.type) if value.type is not None else _untyped_name(value)
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) if value.shape is not None else ()
    return TensorSpec(value.name or "", dtype, dims)


def _type_name(value_type: onnx_ir.TypeProtocol) -> str:
    """`float32` of a tensor, `seq(float32)` and `optional(float32)` of what holds tensors."""
    if isinstance(value_type, onnx_ir.SequenceType | onnx_ir.OptionalType):
        kind = "seq" if isinstance(value_type, onnx_ir.SequenceType) else "optional"
        return f"{kind}({_type_name(value_type.elem_type)})"
    dtype = value_type.dtype
    return "string" if dtype == onnx_ir.DataType.STRING else dtype.numpy().name


def _untyped_name(value: onnx_ir.Value) -> str:
    keys = map_keys(value)
    return "unknown" if keys is None else f"seq(map({keys},float32))"
