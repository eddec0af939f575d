"""What a TorchScript module's `forward` takes and gives: which of the user's inputs is which argument, and a list of
results one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.inputs import Feeds
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.specs import TensorSpec

# Arguments that an ONNX input of no dimensions can stand for, and how TorchScript makes them of a tensor.
_SCALARS = {"int": "int({name})", "float": "float({name})", "bool": "bool({name})"}
_TENSORS = ("Tensor", "Optional[Tensor]")


@dataclass(frozen=True)
class Argument:
    """One argument of `forward`; `type` in TorchScript's spelling."""

    name: str
    type: str
    required: bool


def arguments(module: torch.jit.ScriptModule) -> list[Argument]:
    """The arguments of `forward` but for `self`.

    Raises InvalidInputsError where there is no `forward`, and where no input can stand for one of them.
    """
    try:
        schema: Any = getattr(module.forward, "schema")  # noqa: B009  torch does not type it
    except (AttributeError, RuntimeError) as error:
        raise InvalidInputsError(_no_forward(module)) from error
    found = [Argument(item.name, _type_name(item), not item.has_default_value()) for item in schema.arguments[1:]]
    for argument in found:
        if argument.required:
            _check_type(argument)
    return found


def _no_forward(module: torch.jit.ScriptModule) -> str:
    others: list[str] = sorted(module._c._method_names())
    has = f"; it has {', '.join(others[:5])}. Script a module whose forward calls it" if others else ""
    return f"The TorchScript module has no method 'forward', so it cannot be run{has}."


def _type_name(argument: Any) -> str:
    text = str(argument.type.annotation_str)
    return text.replace("torch.", "").replace(" ", "")


def signature(module: torch.jit.ScriptModule) -> str:
    """`forward(x: Tensor, sr: int)`."""
    listed = ", ".join(f"{item.name}: {item.type}" + ("" if item.required else " = ...") for item in arguments(module))
    return f"forward({listed})"


@dataclass(frozen=True)
class Binding:
    """`specs`: in the order of `forward`'s arguments. `names[i]`: the argument that spec i feeds."""

    specs: tuple[TensorSpec, ...]
    arguments: tuple[Argument, ...]
    direct: bool

    def wrap(self, module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        """A module that takes tensors alone, in the order of `specs`."""
        if self.direct:
            return module
        parameters = ", ".join(f"{item.name}: Tensor" for item in self.arguments)
        given = ", ".join(
            f"{item.name}={_SCALARS[item.type].format(name=item.name) if item.type in _SCALARS else item.name}"
            for item in self.arguments
        )
        return around(module, f"def forward(self, {parameters}):\n    return self.inner.forward({given})\n")

    def scalars(self, feeds: Feeds) -> dict[str, int | float | bool]:
        """Values of the arguments that are plain numbers to the module."""
        pairs = zip(self.specs, self.arguments, strict=True)
        return {spec.name: feeds[spec.name].item() for spec, item in pairs if item.type in _SCALARS}


def bind(module: torch.jit.ScriptModule, specs: Sequence[TensorSpec]) -> Binding:
    """Inputs by the arguments' names where all of them are such names, by position elsewhere.

    Raises InvalidInputsError where the number or the types do not fit.
    """
    have = arguments(module)
    by_name = {item.name: item for item in have}
    if all(spec.name in by_name for spec in specs):
        order = {item.name: index for index, item in enumerate(have)}
        specs = sorted(specs, key=lambda spec: order[spec.name])
        chosen = [by_name[spec.name] for spec in specs]
    else:
        chosen = have[: len(specs)]
    missing = [item.name for item in have if item.required and item not in chosen]
    if missing or len(specs) > len(have):
        given = ", ".join(map(str, specs))
        raise InvalidInputsError(
            f"The module is {signature(module)}, but the inputs given are {given}; "
            f"give one --input for each argument that has no default."
        )
    for spec, argument in zip(specs, chosen, strict=True):
        _check(spec, argument)
    # Of arguments that are left to their defaults, exporters make inputs.
    direct = chosen == have and all(item.type in _TENSORS for item in chosen)
    return Binding(tuple(specs), tuple(chosen), direct)


def returns_list(module: torch.jit.ScriptModule) -> bool:
    """Whether `forward` gives a list of tensors, by itself or in a tuple: exporters write it as one sequence, or not at
    all."""
    return any(_holds_list(item.type) for item in _returns(module))


def spread(module: torch.jit.ScriptModule, given: Sequence[torch.Tensor]) -> torch.jit.ScriptModule:
    """A module that gives, one by one, the tensors in what `module`, of tensors alone, gives; its lists are as long as
    those for the inputs `given`."""
    with torch.no_grad(), quiet():
        result: Any = module(*given)
    parameters = ", ".join(f"{item.name}: {item.type}" for item in arguments(module))
    names = ", ".join(f"{item.name}={item.name}" for item in arguments(module))
    lines, tensors = [f"result = self.inner.forward({names})"], list[str]()
    for item in _returns(module):
        _take_apart(item.type, result, "result", lines, tensors)
    lines.append(f"return {', '.join(tensors)}")
    return around(module, f"def forward(self, {parameters}):\n" + "".join(f"    {line}\n" for line in lines))


def _returns(module: torch.jit.ScriptModule) -> Sequence[Any]:
    schema: Any = getattr(module.forward, "schema")  # noqa: B009  torch does not type it
    returns: Sequence[Any] = schema.returns
    return returns


def _holds_list(kind: Any) -> bool:
    if kind.kind() == "TupleType":
        return any(_holds_list(element) for element in kind.elements())
    return str(kind) == "List[Tensor]"


def _take_apart(kind: Any, value: Any, name: str, lines: list[str], tensors: list[str]) -> None:
    """Appends lines that take `name`, of type `kind`, which held `value` once, apart into `tensors`."""
    if kind.kind() == "TupleType":
        for number, element in enumerate(kind.elements()):
            _take_apart(element, value[number], f"{name}[{number}]", lines, tensors)
    elif str(kind) == "List[Tensor]":
        parts = [f"part_{len(tensors) + number}" for number in range(len(value))]
        lines.append(
            f"{', '.join(parts)} = {name}" if len(parts) > 1 else f"{parts[0]} = {name}[0]" if parts else "pass"
        )
        tensors.extend(parts)
    else:
        tensors.append(name)


def around(module: torch.jit.ScriptModule, forward: str) -> torch.jit.ScriptModule:
    """A module whose `forward` is written so, in TorchScript, and which has `module` as its `inner`."""
    holder = torch.nn.Module()
    holder.inner = module
    with quiet():  # torch.jit.script is deprecated; there is no other way to wrap a TorchScript module
        wrapper: Any = torch.jit.script(holder)
    wrapper.define(forward)
    wrapper.eval()
    bound: torch.jit.ScriptModule = wrapper
    return bound


def _check(spec: TensorSpec, argument: Argument) -> None:
    if argument.type in _SCALARS and spec.shape != ():
        raise InvalidInputsError(
            f"Input {spec}: the module's argument {argument.name!r} is a single {argument.type}; "
            f"give it as '{spec.name}:{'float32' if argument.type == 'float' else 'int64'}[]'."
        )
    _check_type(argument)


def _check_type(argument: Argument) -> None:
    if argument.type not in (*_SCALARS, *_TENSORS):
        raise InvalidInputsError(
            f"The module's argument {argument.name!r} is a {argument.type}; only tensors and numbers can be inputs "
            f"of an ONNX model. Wrap the module in one that takes tensors, and script that."
        )
