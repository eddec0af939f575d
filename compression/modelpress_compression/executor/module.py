"""The differentiable executor: an ONNX graph as a torch module, on the device that a recipe asks for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.executor.compiler import Compiler, laid_out
from modelpress_compression.executor.dtypes import tensor_of, to_numpy, to_torch
from modelpress_compression.graph.blocks import Selector
from modelpress_compression.graph.edit import replace_numbers
from modelpress_compression.graph.read import constant_tensor
from modelpress_compression.graph.subgraphs import needed_nodes
from modelpress_compression.inputs import Array
from modelpress_compression.model import Model
from modelpress_compression.target import DEVICES


class Executor(nn.Module):
    """Runs a model, or a part of it, in torch, with gradients.

    - `trainable`: which constants (initializers and tensors of Constant nodes, subgraphs included) are parameters; a
      predicate on the value or a collection of names. `weights` picks what training usually changes.
    - `outputs`: values of the main graph to return, by name; the graph's own outputs where left out. Only the nodes
      that they need run.
    - `inputs`: values to take as given, by name: the graph's inputs, or any value between, which cuts the graph there.
    - `device`: where to run; it cannot be changed afterwards.

    The graph decides what is computed: `train()` and `eval()` make no difference. Raises NotExecutableError for
    operators without an implementation, InvalidInputsError for names that the graph does not have.
    """

    def __init__(
        self,
        model: Model,
        *,
        trainable: Selector | Collection[str] = (),
        outputs: Sequence[str] | None = None,
        inputs: Sequence[str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        graph, target = model.graph, torch.device(device)
        chosen = _chosen(model, trainable)
        self._by_name = {
            name: nn.Parameter(laid_out(value, tensor_of(tensor, target))) for name, (value, tensor) in chosen.items()
        }
        for number, parameter in enumerate(self._by_name.values()):
            self.register_parameter(f"constant_{number}", parameter)  # names of values may hold dots
        values = _main_values(graph)
        self._outputs = [_named(values, name) for name in outputs] if outputs is not None else list(graph.outputs)
        self._inputs = (
            [_named(values, name) for name in inputs]
            if inputs is not None
            else [value for value in graph.inputs if value.name not in graph.initializers]
        )
        parameters = {value: self._by_name[name] for name, (value, _) in chosen.items()}
        compiler = Compiler(model.ir.opset_imports, parameters, self._inputs, target)
        self._plan = compiler.compile(
            needed_nodes(graph, frozenset(self._inputs), self._outputs), self._inputs, self._outputs
        )
        self.device = target

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(value.name or "" for value in self._inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(value.name or "" for value in self._outputs)

    @property
    def parameters_by_name(self) -> Mapping[str, nn.Parameter]:
        """The trained constants by the names that they have in the graph."""
        return self._by_name

    def forward(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name for tensors or arrays by name; what the graph does not take is left out.

        Types that torch lacks come as the wider ones that carry them (int4 as int8), sequences as lists.
        Raises InvalidInputsError for an input that is missing, ModelNotRunnableError for values that do not fit.
        """
        arguments = []
        for name in self.input_names:
            if name not in feeds:
                names = ", ".join(self.input_names)
                raise InvalidInputsError(f"The input {name!r} is missing; the executor takes {names}.")
            arguments.append(_placed(feeds[name], self.device))
        return dict(zip(self.output_names, self._plan.run(arguments), strict=True))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        """The same without gradients, as arrays of the graph's own types."""
        with torch.no_grad():
            results = self(feeds)
        return {value.name or "": _array(results[value.name or ""], value.dtype) for value in self._outputs}

    def write_back(self, model: Model) -> None:
        """Puts the trained values into the graph of `model`, this one or a clone, in the element type they have there.

        An initializer that several nodes share stays one. Raises InvalidInputsError where a constant of that name and
        shape is not there any more.
        """
        found = _constants(model)
        for name, parameter in self._by_name.items():
            value = found.get(name)
            tensor = constant_tensor(value)
            if value is None or tensor is None or tuple(tensor.shape.numpy()) != tuple(parameter.shape):
                raise InvalidInputsError(
                    f"The model has no constant {name!r} of shape {list(parameter.shape)}; write trained values into "
                    f"the model that the executor was made from, or into a clone of it."
                )
            replace_numbers(value, np.asarray(to_numpy(parameter)))


def _chosen(
    model: Model, trainable: Selector | Collection[str]
) -> dict[str, tuple[onnx_ir.Value, onnx_ir.TensorProtocol]]:
    names = None if callable(trainable) else frozenset(trainable)
    chosen: dict[str, tuple[onnx_ir.Value, onnx_ir.TensorProtocol]] = {}
    for name, value in _constants(model).items():
        tensor = constant_tensor(value)
        wanted = trainable(value) if callable(trainable) else name in (names or ())
        if not wanted or tensor is None:
            continue
        if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
            raise InvalidInputsError(
                f"The constant {name!r} is of type {tensor.dtype.name}; only float, double and 16-bit float constants "
                f"can be trained."
            )
        chosen[name] = (value, tensor)
    if names is not None and names - set(chosen):
        raise InvalidInputsError(f"The model has no constants {sorted(names - set(chosen))} that could be trained.")
    return chosen


def _constants(model: Model) -> dict[str, onnx_ir.Value]:
    """Initializers and outputs of Constant nodes with a tensor, in the main graph and its subgraphs, by name. Where
    subgraphs use a name again, the further ones are NAME#2, NAME#3 ... in the order of the graph."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    values += [node.outputs[0] for node in model.nodes() if node.op_type == "Constant" and node.outputs]
    found: dict[str, onnx_ir.Value] = {}
    seen: Counter[str] = Counter()
    for value in values:
        if constant_tensor(value) is not None:
            name = value.name or ""
            seen[name] += 1
            found[name if seen[name] == 1 else f"{name}#{seen[name]}"] = value
    return found


def _main_values(graph: onnx_ir.Graph) -> dict[str, onnx_ir.Value]:
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values()) if value.name}
    values.update((value.name, value) for node in graph for value in node.outputs if value.name)
    return values


def _named(values: Mapping[str, onnx_ir.Value], name: str) -> onnx_ir.Value:
    found = values.get(name)
    if found is None:
        raise InvalidInputsError(f"The main graph of the model has no value {name!r}.")
    return found


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return to_torch(np.asarray(value), device)
    if isinstance(value, list):
        return [_placed(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) and value.device != device else value


def _array(value: Any, dtype: onnx_ir.DataType | None) -> Any:
    return [_array(item, dtype) for item in value] if isinstance(value, list) else to_numpy(value, dtype)


def device_for(wanted: str) -> torch.device:
    """CUDA where a recipe asks for a target on a GPU and torch sees one, else the CPU. `wanted`: `target.device`."""
    return torch.device("cuda" if DEVICES[wanted].trains and torch.cuda.is_available() else "cpu")


def device_warning(wanted: str) -> str:
    """A sentence for people if another device than the wanted one is used; else empty."""
    if not DEVICES[wanted].trains or device_for(wanted).type == "cuda":
        return ""
    seen = f"torch {torch.__version__} sees no GPU here"
    return f"target.device is {wanted}, but {seen}: what needs gradients ran on the CPU."
