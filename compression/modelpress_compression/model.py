"""The one representation: every format is loaded into a `Model`, every pass maps a `Model` to a `Model`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir

from modelpress_compression.specs import TensorSpec

# The newest that onnxruntime 1.31 loads; nothing newer is ever written.
MAX_OPSET = 26
MAX_IR_VERSION = 13
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

        Beyond 1.5 GiB of weights they go into `NAME.data` beside it, so that memory stays flat and protobuf's limit of
        2 GiB is not met. Raises OSError.
        """
        path = Path(path)
        if self.weight_bytes() <= EXTERNAL_DATA_THRESHOLD_BYTES:
            onnx_ir.save(onnx_ir.external_data.load_to_model(self.ir.clone()), path, format="protobuf")
            return [path]
        data = path.with_name(path.name + ".data")
        onnx_ir.save(self.ir.clone(), path, format="protobuf", external_data=data.name)
        return [path, data]


def _spec(value: onnx_ir.Value) -> TensorSpec:
    dtype = value.dtype.numpy().name if value.dtype is not None and value.dtype != onnx_ir.DataType.STRING else "string"
    dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) if value.shape is not None else ()
    return TensorSpec(value.name or "", dtype, dims)
