"""TorchScript graphs run in Python, operator by operator, so that torch can trace them.

Exporters for TorchScript stop at what only a scripted module has: objects of classes, dicts, lists that grow, and loops
over them, as torchvision's detectors have. Where such a module is run by Python, torch's tracer sees the operators on
tensors alone: what a trace of the original module would hold. Sizes stay traced, so that dimensions which vary stay
dynamic; branches and the number of rounds of other loops are those of the inputs that it is run on.

Of a loop with as many rounds as a tensor says, one round is recorded where it can be, and it stays a loop
(`script_rounds`).

A graph's values are Python's: lists, dicts, tuples and numbers are themselves, types of tensors are numbers as in
TorchScript, and sizes are, while torch traces, tensors without axes.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from modelpress_compression.loaders.script_graph import TO_THE_END
from modelpress_compression.loaders.script_inputs import around
from modelpress_compression.loaders.script_rounds import (
    Exchange,
    NotRecordedError,
    Round,
    is_none,
    is_tracing,
    repeated,
    tensors_within,
    used,
)
from modelpress_compression.loaders.torch_run import tensors_of

_DTYPES = (
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64,
    torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.qint8, torch.quint8, torch.qint32,
    torch.bfloat16,
)  # fmt: skip
_MEMORY_FORMATS = (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
_ALPHA = "alpha"  # of additions: as a place it is, to Python, that of an older form
# Where Python's functions of operators lie.
_FUNCTIONS: tuple[Any, ...] = (torch._C._VariableFunctions, torch._C._nn, torch.Tensor)


class Replay(torch.nn.Module):
    """A module that runs the graph of a TorchScript module, and gives the tensors in its result one by one.

    It must have run once before it is traced: what members hold is read by methods of TorchScript.
    """

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        super().__init__()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        self.inner = module
        self._graph: Any = module.inlined_graph
        self._members = [_Members(module)]  # in a list, since it is no part of this one

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raises NotImplementedError for an operator that Python has no function of."""
        return tuple(tensors_of(_Run(self._members[0]).block(self._graph, [self.inner, *inputs])))


class _Object(SimpleNamespace):
    """Of a class that is no module, made in a run."""


@dataclass(frozen=True)
class _Member:
    """An object of a class that is no module, which a module has. Python gets none of those, but what they hold.

    `path`: how TorchScript's source gets at it.
    """

    path: str


class _Members:
    """What modules and their members hold; it lasts as long as the `Replay`."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self._holder: Any = around(module, "def forward(self):\n    return 0\n")
        self._paths = {id(module): "self.inner"}
        self._read: dict[str, Any] = {}
        self.functions: list[Any] = []  # that traces of the module call

    def get(self, owner: Any, name: str) -> Any:
        """The attribute of a module or member."""
        path = f"getattr({owner.path if isinstance(owner, _Member) else self._paths[id(owner)]}, {name!r})"
        if path not in self._read:
            self._read[path] = self._got(owner, name, path)
        found = self._read[path]
        return list(found) if isinstance(found, list) else dict(found) if isinstance(found, dict) else found

    def _got(self, owner: Any, name: str, path: str) -> Any:
        if isinstance(owner, _Member):
            getter = f"member_{len(self._read)}"
            lines = f"owner = {owner.path}", "assert owner is not None", f"return owner.{name}"  # it may be optional
            self._holder.define("\n    ".join((f"def {getter}(self):", *lines)) + "\n")
            return getattr(self._holder, getter)()
        try:
            found = getattr(owner, name)
        except RuntimeError:  # the class is not known to Python
            return _Member(path)
        self._paths[id(found)] = path
        return found


@dataclass(frozen=True)
class _View:
    """Part of a tensor, `base`. `first`: where it begins along each axis of the base. `axes`: those that it has."""

    base: torch.Tensor
    first: tuple[Any, ...]
    axes: tuple[int, ...]

    @classmethod
    def whole(cls, base: torch.Tensor) -> _View:
        return cls(base, (0,) * base.dim(), tuple(range(base.dim())))

    def part(self, axis: int, first: Any, *, keeps_axis: bool) -> _View:
        """What begins at `first` of an axis of this one, or is that place alone."""
        place = axis % len(self.axes)
        own = self.axes[place]
        begins = (*self.first[:own], self.first[own] + first, *self.first[own + 1 :])
        return _View(self.base, begins, self.axes if keeps_axis else (*self.axes[:place], *self.axes[place + 1 :]))

    def filled(self, view: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The base with values in the place of this part, which is `view`."""
        indices = [_as_tensor(first) for first in self.first]
        for place, axis in enumerate(self.axes):
            along = torch.arange(view.size(place)) + self.first[axis]
            indices[axis] = along.reshape([-1, *[1] * (len(self.axes) - place - 1)])
        return self.base.index_put(tuple(indices), values.to(self.base.dtype).expand_as(view))


class _Run:
    """One run. `values`: by their numbers, which are a graph's with all its blocks."""

    def __init__(self, members: _Members) -> None:
        self.members = members
        self.values: dict[int, Any] = {}
        self.attributes: dict[tuple[int, str], Any] = {}  # of modules, that were assigned to: they stay as they are
        # By a tensor's number, with the tensor: once that is gone, another one may have its number.
        self.views: dict[int, tuple[torch.Tensor, _View]] = {}
        # By a list's number, with the list, and what it held: its tensors as rows of one.
        self.rows: dict[int, tuple[list[Any], list[Any], torch.Tensor]] = {}

    def block(self, block: Any, inputs: Sequence[Any]) -> list[Any]:
        """What a block, or a graph, gives."""
        self.values.update(zip((value.unique() for value in block.inputs()), inputs, strict=True))
        for node in block.nodes():
            self._run(node)
        return self._of(block.outputs())

    def _of(self, values: Any) -> list[Any]:
        return [self.values[value.unique()] for value in values]

    def _run(self, node: Any) -> None:
        given = self._of(node.inputs())
        kind, outputs = node.kind(), list(node.outputs())
        if kind in _CONTROL:
            results = _CONTROL[kind](self, node, given)
        else:
            result = _STRUCTURE[kind](node, given) if kind in _STRUCTURE else _operator(node, kind, given)
            results = [result] if len(outputs) == 1 else list(result) if outputs else []
        self.values.update(zip((value.unique() for value in outputs), results, strict=True))

    def _if(self, node: Any, given: list[Any]) -> list[Any]:
        then, otherwise = node.blocks()
        return self.block(then if bool(given[0]) else otherwise, [])

    def _loop(self, node: Any, given: list[Any]) -> list[Any]:
        (body,) = node.blocks()
        if is_tracing() and isinstance(given[0], torch.Tensor) and given[1] is True:
            with contextlib.suppress(NotRecordedError):
                return self._repeated(body, given[0], given[2:])
        most, going, carried = int(given[0]), bool(given[1]), given[2:]
        index = 0
        while going and index < most:
            going, *carried = self.block(body, [index, *carried])
            index += 1
        return carried

    def _repeated(self, body: Any, count: torch.Tensor, carried: list[Any]) -> list[Any]:
        """What a loop gives that stays one. Raises NotRecordedError; nothing has changed then."""
        if is_none(count) or not all(isinstance(value, torch.Tensor) for value in carried):
            raise NotRecordedError("there is no round, or a number is carried along")
        values = {number: self.values[number] for number in used(body)}
        outer = list({id(tensor): tensor for tensor in tensors_within([values, self.attributes])}.values())
        first, lists = len(carried), list[list[Any]]()

        def run(index: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Round:
            exchange = Exchange({id(old): new for old, new in zip(outer, tensors[first:], strict=True)})
            inner = _Run(self.members)
            inner.values = {number: exchange.of(value) for number, value in values.items()}
            inner.attributes = exchange.of(self.attributes)
            given = dict(inner.values)
            going, *left = inner.block(body, [index, *tensors[:first]])
            if going is not True:
                raise NotRecordedError("a round may be the last one")
            written = {
                first + place: inner.values[number]
                for place, tensor in enumerate(outer)
                for number, value in values.items()
                if value is tensor and inner.values[number] is not given[number]
            }
            grown = exchange.grown()
            lists.extend(own for own, _ in grown)
            return Round({**dict(enumerate(left)), **written}, tuple(row for _, row in grown))

        left = repeated(run, count, [*carried, *outer], self.members.functions)
        for place, tensor in enumerate(outer, start=first):
            if place in left.states:
                self._replace(tensor, left.states[place])
        for own, rows in zip(lists, left.rows, strict=True):
            own.extend(rows.unbind(0))
            self.rows[id(own)] = own, [*own], rows
        return [left.states[place] for place in range(first)]

    def _stack(self, node: Any, given: list[Any]) -> list[Any]:
        """Of what a loop found: as many as it finds, and not as many as in the run that is traced."""
        own, held, rows = self.rows.get(id(given[0]), (None, [], None))
        same = own is given[0] and len(held) == len(own) and all(map(operator.is_, held, own))
        return [rows if same and given[1] == 0 else _operator(node, node.kind(), given)]

    def _get(self, node: Any, given: list[Any]) -> list[Any]:
        owner, name = given[0], node.s("name")
        if isinstance(owner, _Object):
            return [getattr(owner, name)]
        key = id(owner), name
        return [self.attributes[key] if key in self.attributes else self.members.get(owner, name)]

    def _set(self, node: Any, given: list[Any]) -> list[Any]:
        if isinstance(given[0], _Object):
            setattr(given[0], node.s("name"), given[1])
        else:
            self.attributes[id(given[0]), node.s("name")] = given[1]
        return []

    def _view(self, node: Any, given: list[Any]) -> list[Any]:
        """A part of a tensor, or of a list; it is known as such where its places follow each other."""
        result = _operator(node, node.kind(), given)
        if isinstance(result, torch.Tensor) and (len(given) == 3 or given[4] == 1):
            whole = self._view_of(given[0]) or _View.whole(given[0])
            first = 0 if given[2] is None else given[2]  # a tensor while torch traces: it is not asked
            self.views[id(result)] = result, whole.part(given[1], first, keeps_axis=len(given) > 3)
        return [result]

    def _view_of(self, tensor: torch.Tensor) -> _View | None:
        _, view = self.views.get(id(tensor), (None, None))
        return view

    def _copy(self, node: Any, given: list[Any]) -> list[Any]:
        """Into a part of a tensor: exporters lose that, so that there is another tensor from then on."""
        view = self._view_of(given[0])
        if view is None:
            return [_operator(node, node.kind(), given)]
        self._replace(view.base, view.filled(given[0], given[1]))
        return [given[1]]

    def _replace(self, old: torch.Tensor, new: torch.Tensor) -> None:
        for number, value in self.values.items():
            if value is old:
                self.values[number] = new
            elif isinstance(value, list):
                value[:] = [new if item is old else item for item in value]


_CONTROL: Mapping[str, Callable[[_Run, Any, list[Any]], list[Any]]] = MappingProxyType(
    {
        "aten::copy_": _Run._copy, "aten::select": _Run._view, "aten::slice": _Run._view, "aten::stack": _Run._stack,
        "prim::GetAttr": _Run._get, "prim::If": _Run._if, "prim::Loop": _Run._loop, "prim::SetAttr": _Run._set,
    }
)  # fmt: skip


def _constant(node: Any, _: list[Any]) -> Any:
    return node.output().toIValue() if node.hasAttribute("value") else None


def _raise(_: Any, given: list[Any]) -> Any:
    raise RuntimeError(str(given[0]))


def _is_instance(node: Any, given: list[Any]) -> bool:
    kinds = {kind.kind() for kind in node.tys("types")}
    return any(isinstance(given[0], _PYTHON_TYPES[kind]) for kind in kinds if kind in _PYTHON_TYPES)


_PYTHON_TYPES: Mapping[str, Any] = MappingProxyType(
    {
        "TensorType": torch.Tensor, "ListType": list, "TupleType": tuple, "DictType": dict, "StringType": str,
        "BoolType": bool, "IntType": int, "FloatType": float, "NoneType": type(None),
    }
)  # fmt: skip


# What makes and takes apart values, and asks about tensors: of the node and its inputs.
_STRUCTURE: Mapping[str, Callable[[Any, list[Any]], Any]] = MappingProxyType(
    {
        "prim::Constant": _constant,
        "prim::CreateObject": lambda node, given: _Object(),
        "prim::DictConstruct": lambda node, given: dict(zip(given[::2], given[1::2], strict=True)),
        "prim::Enter": lambda node, given: None,
        "prim::Exit": lambda node, given: None,
        "prim::ListConstruct": lambda node, given: list(given),
        "prim::ListUnpack": lambda node, given: given[0] if node.outputsSize() > 1 else given[0][0],
        "prim::RaiseException": _raise,
        "prim::TupleConstruct": lambda node, given: tuple(given),
        "prim::TupleIndex": lambda node, given: given[0][given[1]],
        "prim::TupleUnpack": lambda node, given: given[0] if node.outputsSize() > 1 else given[0][0],
        "prim::Uninitialized": lambda node, given: None,
        "prim::device": lambda node, given: given[0].device,
        "prim::dtype": lambda node, given: _DTYPES.index(given[0].dtype),
        "prim::isinstance": _is_instance,
        "prim::layout": lambda node, given: 0,
        "prim::max": lambda node, given: _extreme(max, torch.maximum, given),
        "prim::min": lambda node, given: _extreme(min, torch.minimum, given),
        "prim::tolist": lambda node, given: given[0].tolist(),
        "prim::type": lambda node, given: given[0].type,
        "prim::unchecked_cast": lambda node, given: given[0],
    }
)


def _operator(node: Any, kind: str, given: list[Any]) -> Any:
    """Of the namespace `aten` or another, on tensors or on what Python has itself."""
    space, name = kind.split("::")
    if space == "prim":
        raise NotImplementedError(f"{kind} is not run in Python")
    if space != "aten":
        return getattr(getattr(torch.ops, space), name)(*given)
    arguments = _arguments(node.schema())
    first = arguments[0].type.kind() if arguments else ""
    if name in _ON_PYTHON and (first != "TensorType" or name not in _ON_BOTH):
        return _ON_PYTHON[name](*given)
    if name in _ON_TENSORS:
        rest = {item.name: value for item, value in zip(arguments[1:], given[1:], strict=True)}
        return _ON_TENSORS[name](given[0], **rest)
    return _called(name, arguments, given)


@cache
def _arguments(schema: str) -> Sequence[Any]:
    """Of an operator: a loop asks again in every round."""
    arguments: Sequence[Any] = torch._C.parse_schema(schema).arguments
    return arguments


def _called(name: str, arguments: Sequence[Any], given: Sequence[Any]) -> Any:
    """What torch's function of this name gives; it takes dtypes for their numbers, and has defaults for None."""
    pairs = [(item, _of_python(item.name, value)) for item, value in zip(arguments, given, strict=True)]
    options = {
        item.name: value for item, value in pairs if (item.kwarg_only or item.name == _ALPHA) and value is not None
    }
    options.pop("layout", None)
    for owner in _FUNCTIONS:
        if (function := getattr(owner, name, None)) is not None:
            return function(*(value for item, value in pairs if not item.kwarg_only and item.name != _ALPHA), **options)
    raise NotImplementedError(f"aten::{name} is not run in Python")


def _of_python(argument: str, value: Any) -> Any:
    if argument == "dtype" and isinstance(value, int):
        return _DTYPES[value]
    return _MEMORY_FORMATS[value] if argument == "memory_format" and isinstance(value, int) else value


def _as_tensor(number: Any) -> torch.Tensor:
    """Without axes. What `torch.as_tensor` gives is a constant of a trace, be it a tensor that is traced."""
    return number if isinstance(number, torch.Tensor) else torch.full((), number)


def _sliced(values: Any, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    """Of a list or a text."""
    return values[_place(start) : _place(end) : _place(step)]


def _place(index: Any) -> int | None:
    return None if index is None else int(index)


def _slice(self: torch.Tensor, dim: int, start: Any, end: Any, step: Any) -> torch.Tensor:
    end = None if isinstance(end, int) and end == TO_THE_END else end
    return self[(*[slice(None)] * (dim % self.dim()), slice(start, end, step))]


def _index(self: torch.Tensor, indices: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return self[_indices(indices)]


def _index_put(
    self: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, accumulate: bool = False
) -> torch.Tensor:
    if accumulate:
        return self.index_put_([index for index in indices if index is not None], values, accumulate)
    self[_indices(indices)] = values
    return self


def _indices(indices: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
    return tuple(slice(None) if index is None else index for index in indices)


def _to(self: torch.Tensor, other: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    if other is not None:
        return self.to(other)
    wanted = {name: _of_python(name, value) for name, value in options.items() if value is not None}
    return self.to(**wanted)


def _tensor(data: Any, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    if isinstance(data, torch.Tensor):  # a size, while torch traces: as a new tensor it would be a constant
        return data if dtype is None else data.to(_of_python("dtype", dtype))
    if isinstance(data, bool | int | float):
        return torch.full((), data, dtype=_of_python("dtype", dtype), device=device)
    return torch.tensor(data, dtype=_of_python("dtype", dtype), device=device)


def _size(self: torch.Tensor, dim: int | None = None) -> Any:
    return list(self.size()) if dim is None else self.size(dim)


def _int(value: Any) -> Any:
    """A size, or a number that was read from a tensor, stays one while torch traces."""
    if not isinstance(value, torch.Tensor):
        return int(value)
    if not value.is_floating_point():
        return value
    return value.to(torch.int64) if is_tracing() else int(value)


def _item(self: torch.Tensor) -> Any:
    return self.reshape(()) if is_tracing() else self.item()


def _extreme(of_numbers: Callable[..., Any], of_tensors: Callable[..., torch.Tensor], given: Sequence[Any]) -> Any:
    """Of two numbers, or of those in a list; one that is traced may be the other one next time."""
    numbers = given[0] if len(given) == 1 else given
    if not any(isinstance(number, torch.Tensor) for number in numbers):
        return of_numbers(numbers)
    return reduce(of_tensors, map(_as_tensor, numbers))


def _set_item(values: Any, key: Any, value: Any) -> Any:
    values[_key(values, key)] = value
    return values


def _key(values: Any, key: Any) -> Any:
    return key if isinstance(values, dict) else int(key)


def _range_length(start: Any, stop: Any, step: Any) -> int:
    return len(range(int(start), int(stop), int(step)))


def _listed(method: str) -> Callable[[dict[Any, Any]], list[Any]]:
    return lambda values: list(getattr(values, method)())


def _appended(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


def _inserted(values: list[Any], place: Any, value: Any) -> None:
    values.insert(int(place), value)


def _formatted(text: str, *values: Any) -> str:
    """As TorchScript does it. Python's own would read widths and attributes out of a user's text."""
    first, *rest = text.split("{}")
    return first + "".join(f"{value}{part}" for value, part in zip(values, rest, strict=False))


# Operators that Python has itself, on numbers, texts, lists and dicts.
_ON_PYTHON: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "Bool": bool, "Float": float, "FloatImplicit": float, "Int": _int, "IntImplicit": _int,
        "ScalarImplicit": lambda value: value, "__and__": operator.and_, "__or__": operator.or_,
        "__xor__": operator.xor,
        "__contains__": operator.contains, "__derive_index": lambda index, start, step: start + index * step,
        "__getitem__": lambda values, key: values[_key(values, key)], "__is__": operator.is_,
        "__isnot__": operator.is_not, "__not__": operator.not_, "__range_length": _range_length,
        "_set_item": _set_item, "add": operator.add, "append": _appended, "ceil": math.ceil,
        "copy": lambda values: values.copy(),
        "dict": dict, "div": operator.truediv, "eq": operator.eq, "exp": math.exp,
        "extend": lambda values, others: values.extend(others), "floor": math.floor, "floordiv": operator.floordiv,
        "format": _formatted, "ge": operator.ge,
        "get": lambda values, *given: values.get(*given),
        "gt": operator.gt, "insert": _inserted, "items": _listed("items"), "keys": _listed("keys"), "le": operator.le,
        "len": lambda values: values.shape[0] if isinstance(values, torch.Tensor) else len(values), "list": list,
        "log": math.log, "log2": math.log2, "lt": operator.lt, "mul": operator.mul, "ne": operator.ne,
        "neg": operator.neg, "pop": lambda values, *key: values.pop(*key), "pow": operator.pow,
        "remainder": operator.mod, "round": round,
        "slice": _sliced, "sqrt": math.sqrt, "sub": operator.sub, "update": dict.update, "values": _listed("values"),
        "warn": lambda *_: None,
    }
)  # fmt: skip
# Those that torch has functions of as well, for tensors.
_ON_BOTH = frozenset(_ON_PYTHON) - {
    "Bool", "Float", "FloatImplicit", "Int", "IntImplicit", "ScalarImplicit", "__is__", "__isnot__", "__not__",
    "append",
    "len", "__contains__", "_set_item", "dict", "insert", "items", "keys", "list", "update", "values", "warn",
}  # fmt: skip
# Operators on tensors that Python writes otherwise; they take their arguments by name.
_ON_TENSORS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "index": _index,
        "index_put_": _index_put,
        "item": _item,
        "size": _size,
        "slice": _slice,
        "tensor": _tensor,
        "to": _to,
    }
)  # fmt: skip
