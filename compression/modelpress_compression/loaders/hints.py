"""What a TorchScript module tells of its inputs, for the error of a user who gave none.

The archive records no inputs. But the first layer that an argument reaches has a weight whose shape says how many
channels or features it takes, and a traced archive may hold the shapes that it was traced with.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelpress_compression.archive import Archive
from modelpress_compression.loaders.formats.pickle_scan import MAX_PICKLE_BYTES
from modelpress_compression.loaders.formats.torch_archive import inner_members
from modelpress_compression.loaders.script_inputs import Argument, arguments, input_names, signature

_MAX_NODES = 20_000  # followed from one argument
_TYPES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class FirstLayer:
    """The operator that an argument reaches first among those with a weight. `spec`: a suggestion for --input."""

    argument: str
    description: str
    spec: str


def suggest_inputs(module: torch.jit.ScriptModule, path: Path) -> str:
    """The whole message: what is missing, what the first layers tell, and what to type."""
    text = f"A TorchScript archive does not record its inputs ({signature(module)}); say what they are."
    layers = {layer.argument: layer for layer in first_layers(module)}
    sequence = next((layer.spec for layer in layers.values() if layer.description.startswith("embedding")), None)
    traced = traced_shapes(path)
    options = []
    for index, argument in enumerate(arguments(module)):
        layer = layers.get(argument.name)
        if layer:
            text += f" First layer of {argument.name!r}: {layer.description}."
        if index < len(traced):
            text += f" It was traced with {argument.name}:{traced[index]}."
        if argument.required:
            shape = traced[index] if index < len(traced) else ""
            kind = _suggested(argument, layer, sequence, shape)
            options += [f"--input '{name}:{kind}'" for name in input_names(argument)]
    return (
        f"{text} Try {' '.join(options)}, with your own numbers or words for dimensions that vary; or give --data with "
        "the inputs' names, which says it as well."
    )


def _suggested(argument: Argument, layer: FirstLayer | None, sequence: str | None, traced: str) -> str:
    """What to say of an input behind its name."""
    if sequence and "mask" in argument.name:
        return sequence.split(":", 1)[1]  # a mask has the shape of the ids that it masks
    if layer:
        return layer.spec.split(":", 1)[1]
    if argument.type in ("int", "bool"):
        return "int64[]"
    if argument.type == "float":
        return "float32[]"
    dtype, _, dims = traced.partition("[")
    _, varies, rest = dims.rstrip("]").partition(",")
    return f"{dtype}[batch,{rest}]" if varies else "float32[batch,...]"


def first_layers(module: torch.jit.ScriptModule) -> list[FirstLayer]:
    """For each tensor argument the first weighted operator in the graph that its value reaches."""
    try:
        graph = module.inlined_graph
    except RuntimeError:
        return []
    inputs = list(graph.inputs())[1:]
    layers = []
    for argument, value in zip(arguments(module), inputs, strict=False):
        if "Tensor" not in argument.type:
            continue
        reached = {value.debugName()}
        for node in _in_order(graph):
            if not any(item.debugName() in reached for item in node.inputs()):
                continue
            layer = _describe(argument.name, node, module)
            if layer:
                layers.append(layer)
                break
            reached |= {item.debugName() for item in node.outputs()}
    return layers


def _in_order(block: Any) -> Iterator[Any]:
    """Nodes in the order of execution, inner blocks where they stand."""
    for count, node in enumerate(block.nodes()):
        if count > _MAX_NODES:
            return
        yield node
        for inner in node.blocks():
            yield from _in_order(inner)


def _describe(name: str, node: Any, module: torch.jit.ScriptModule) -> FirstLayer | None:
    kind = node.kind().removeprefix("aten::").rstrip("_")
    values = list(node.inputs())
    if kind in ("conv1d", "conv2d", "conv3d", "_convolution", "convolution"):
        return _describe_conv(name, kind, values, module)
    if kind in ("linear", "matmul", "addmm", "mm"):
        weight = next(
            (item for item in (_tensor(value, module) for value in values) if item is not None and item.ndim == 2), None
        )
        if weight is None:
            return None
        features = weight.shape[1] if kind == "linear" else weight.shape[0]
        return FirstLayer(name, f"linear, {features} input features", f"{name}:float32[batch,{features}]")
    if kind == "embedding":
        weight = _tensor(values[0], module)
        rows = "" if weight is None else f", ids below {weight.shape[0]}"
        return FirstLayer(name, f"embedding{rows}", f"{name}:int64[batch,seq]")
    if kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return _describe_recurrent(name, kind, values, module)
    return None


def _describe_conv(name: str, kind: str, values: list[Any], module: torch.jit.ScriptModule) -> FirstLayer | None:
    weight = _tensor(values[1], module)
    if weight is None:
        return None
    groups = values[8 if "convolution" in kind else 6].toIValue()
    channels = weight.shape[1] * (groups if isinstance(groups, int) else 1)
    space = {1: "length", 2: "H,W", 3: "D,H,W"}[weight.ndim - 2]
    layer = f"conv{weight.ndim - 2}d"
    plural = "channel" if channels == 1 else "channels"
    return FirstLayer(name, f"{layer}, {channels} input {plural}", f"{name}:float32[batch,{channels},{space}]")


def _describe_recurrent(name: str, kind: str, values: list[Any], module: torch.jit.ScriptModule) -> FirstLayer | None:
    weights = [item for value in values for item in _tensor_list(value, module) if item.ndim == 2]
    if not weights:
        return None
    features = weights[0].shape[1]
    # Both are usual; the module's own flag is the last argument of the operator.
    batch_first = values[-1].toIValue() if values else None
    axes = "batch,seq" if batch_first else "seq,batch"
    return FirstLayer(name, f"{kind}, {features} input features", f"{name}:float32[{axes},{features}]")


def _tensor_list(value: Any, module: torch.jit.ScriptModule) -> list[torch.Tensor]:
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return [item for item in (_tensor(part, module) for part in node.inputs()) if item is not None]
    found = _attribute(value, module)
    return [item for item in found if isinstance(item, torch.Tensor)] if isinstance(found, list) else []


def _tensor(value: Any, module: torch.jit.ScriptModule) -> torch.Tensor | None:
    """The tensor that a value of the graph is, where it is a parameter, maybe transposed."""
    node = value.node()
    if node.kind() in ("aten::t", "aten::numpy_T"):
        inner = _tensor(next(iter(node.inputs())), module)
        return None if inner is None else inner.t()
    found = _attribute(value, module)
    return found if isinstance(found, torch.Tensor) else None


def _attribute(value: Any, module: Any) -> Any:
    """Follows a chain of prim::GetAttr back to the module."""
    path: list[str] = []
    node = value.node()
    while node.kind() == "prim::GetAttr":
        path.append(node.s("name"))
        node = next(iter(node.inputs())).node()
    if not path or node.kind() != "prim::Param":
        return None
    for name in reversed(path):
        module = getattr(module, name, None)
    return module


class _Shapes(pickle.Unpickler):
    """Knows nothing but tensors, and of these only type and shape; any other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, *rest: (storage, tuple(size)),
            ("collections", "OrderedDict"): dict,
        }
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) not in known:
            raise pickle.UnpicklingError(name)
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]


def traced_shapes(path: Path) -> list[str]:
    """`float32[1,1,28,28]` for each tensor input of a traced module; empty where the archive has none."""
    try:
        with Archive.open(path) as archive:
            recorded = archive.read(inner_members(archive)["traced_inputs.pkl"], MAX_PICKLE_BYTES)
        shapes = _Shapes(io.BytesIO(recorded)).load()["forward"]
        return [f"{dtype}[{','.join(str(int(dim)) for dim in shape)}]" for dtype, shape in shapes]
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        EOFError,
    ):
        return []
