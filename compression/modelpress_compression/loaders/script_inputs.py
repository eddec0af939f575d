"""What a TorchScript module's `forward` takes and gives: which of the user's inputs is which argument, and a list of
results one by one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.specs import TensorSpec

# Arguments that an ONNX input of no dimensions can stand for, and how TorchScript makes them of a tensor.
_SCALARS = {"int": "int({name})", "float": "float({name})", "bool": "bool({name})"}
_TENSORS = ("Tensor", "Optional[Tensor]")
_GROUP = re.compile(
    r"(?:Optional\[)?(?:(?P<list>List\[Tensor\])|(?P<tuple>Tuple\[Tensor(?:,Tensor)*\])|(?P<dict>Dict\[str,Tensor\]))\]?"
)


@dataclass(frozen=True)
class Argument:
    """One argument of `forward`; `type` in TorchScript's spelling."""

    name: str
    type: str
    required: bool

    @cached_property
    def group(self) -> str:
        """What holds its tensors: List, Tuple, Dict; empty: it is one itself, or a number."""
        match = _GROUP.fullmatch(self.type)
        return "" if match is None else "Tuple" if match["tuple"] else "List" if match["list"] else "Dict"

    @property
    def count(self) -> int:
        """How many inputs it is made of; 0: any number."""
        return self.type.count("Tensor") if self.group == "Tuple" else 0 if self.group else 1


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
class Given:
    """An argument, and the inputs that it is made of: one, or as many as its list, tuple or dict has tensors."""

    argument: Argument
    specs: tuple[TensorSpec, ...]

    def made_of(self, names: Sequence[str]) -> str:
        """The argument's value in TorchScript, of tensors with these names."""
        kind = self.argument.group
        if kind == "Dict":
            keys = (spec.name.removeprefix(f"{self.argument.name}.") for spec in self.specs)
            return "{" + ", ".join(f"{key!r}: {name}" for key, name in zip(keys, names, strict=True)) + "}"
        if kind:
            listed = "".join(f"{name}, " for name in names)
            return f"[{listed}]" if kind == "List" else f"({listed})"
        return _SCALARS.get(self.argument.type, "{name}").format(name=names[0])


@dataclass(frozen=True)
class Binding:
    """What the user's inputs are to `forward`. `given`: in the order of its arguments. `direct`: it takes them as they
    are."""

    given: tuple[Given, ...]
    direct: bool

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The inputs in the order of `forward`'s arguments."""
        return tuple(spec for item in self.given for spec in item.specs)

    def wrap(self, module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        """A module that takes tensors alone, in the order of `specs`."""
        if self.direct:
            return module
        names = [f"input_{number}" for number in range(len(self.specs))]
        parameters = ", ".join(f"{name}: Tensor" for name in names)
        values, rest = [], iter(names)
        for item in self.given:
            made = item.made_of([next(rest) for _ in item.specs])
            values.append(f"{item.argument.name}={made}")
        return around(module, f"def forward(self, {parameters}):\n    return self.inner.forward({', '.join(values)})\n")


def bind(module: torch.jit.ScriptModule, specs: Sequence[TensorSpec]) -> Binding:
    """Inputs by the arguments' names where all of them are such names, by position elsewhere.

    The tensors of a list or tuple `parts` are `parts.0`, `parts.1`, ..., those of a dict `parts.KEY`. By position, one
    list or dict takes what the other arguments leave; keys of a dict are then the names of its inputs.

    Raises InvalidInputsError where the number or the types do not fit.
    """
    have = arguments(module)
    given = _by_name(have, specs) or _by_position(have, specs)
    chosen = [item.argument for item in given]
    if [item for item in have if item.required and item not in chosen] or sum(len(item.specs) for item in given) < len(
        specs
    ):
        listed = ", ".join(map(str, specs))
        groups = [item for item in have if item.group]
        raise InvalidInputsError(
            f"The module is {signature(module)}, but the inputs given are {listed}; "
            f"give one --input for each argument that has no default"
            + "".join(f", and for each tensor of {item.name!r} ({', '.join(input_names(item))})" for item in groups)
            + "."
        )
    for item in given:
        for spec in item.specs:
            _check(spec, item.argument)
    # Of arguments that are left to their defaults, exporters make inputs.
    direct = chosen == have and all(item.type in _TENSORS for item in chosen)
    return Binding(tuple(given), direct)


def _by_name(have: Sequence[Argument], specs: Sequence[TensorSpec]) -> list[Given]:
    """Empty where an input has no argument's name, or places of a list are left out."""
    named: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        name, _, part = spec.name.partition(".")
        argument = next((item for item in have if item.name == (name if part else spec.name)), None)
        if argument is None or bool(part) != bool(argument.group):
            return []
        named.setdefault(argument.name, []).append(spec)
    found = []
    for argument in (item for item in have if item.name in named):
        kind, count = argument.group, argument.count
        own = {spec.name: spec for spec in named[argument.name]}
        if kind in ("List", "Tuple"):
            places = [f"{argument.name}.{place}" for place in range(count or len(own))]
            if set(places) != own.keys():
                return []
            own = {name: own[name] for name in places}
        found.append(Given(argument, tuple(own.values())))
    return found


def _by_position(have: Sequence[Argument], specs: Sequence[TensorSpec]) -> list[Given]:
    """As far as the inputs go; one list or dict takes what the others leave. Empty where there are two, and where an
    input has a name of `_by_name`'s."""
    counts = [item.count for item in have]
    groups = {item.name for item in have if item.group}
    if counts.count(0) > 1 or any(spec.name.partition(".")[0] in groups for spec in specs if "." in spec.name):
        return []
    if 0 in counts:
        others = [item for item in have if item.count and item.required]
        left = len(specs) - sum(item.count for item in others)
        counts = [
            max(left, 0) if not count else count if item in others else 0
            for item, count in zip(have, counts, strict=True)
        ]
    found, rest = [], list(specs)
    for argument, count in zip(have, counts, strict=True):
        if not count:
            continue
        if len(rest) < count:
            break
        found.append(Given(argument, tuple(rest[:count])))
        rest = rest[count:]
    return found


def input_names(argument: Argument) -> list[str]:
    """How the inputs of an argument are named; the first two of a list, and KEY for the keys of a dict."""
    kind, count = argument.group, argument.count
    if kind == "Dict":
        return [f"{argument.name}.KEY"]
    return [f"{argument.name}.{place}" for place in range(count or 2)] if kind else [argument.name]


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
    if argument.type not in (*_SCALARS, *_TENSORS) and not argument.group:
        raise InvalidInputsError(
            f"The module's argument {argument.name!r} is a {argument.type}; only numbers, tensors, and lists, "
            f"tuples and dicts of tensors can be inputs of an ONNX model. Wrap the module in one that takes tensors, "
            f"and script that."
        )
