"""Inputs of a torch.export program: names, types, and names for its dynamic dimensions.

torch renames dynamic dimensions when it saves (`batch` becomes `s77`), and the archive does not keep the user's words.
Dimensions are the user's where an --input names them; otherwise the first axis of the first input is `batch`, and
others are called after their axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.specs import DTYPES, TensorSpec

# Numbers that the program takes, by the types that torch has for them.
_NUMBERS = {torch.SymInt: torch.int64, torch.SymFloat: torch.float32, torch.SymBool: torch.bool}


def program_specs(
    program: torch.export.ExportedProgram, labels: Mapping[str, str] = MappingProxyType({})
) -> tuple[TensorSpec, ...]:
    """The user's inputs in order; `labels`: names for inputs that shall not be called as their nodes are.

    Raises InvalidInputsError for inputs that are neither tensors nor numbers.
    """
    values = [(labels.get(name, name), _as_tensor(name, value)) for name, value in _user_inputs(program)]
    words = _words(values)
    return tuple(
        TensorSpec(name, _dtype(name, value), tuple(words.get(str(dim), _size(dim)) for dim in value.shape))
        for name, value in values
    )


def number_inputs(program: torch.export.ExportedProgram) -> list[bool]:
    """For each of the user's inputs whether the program takes a number there."""
    return [not isinstance(value, torch.Tensor) for _, value in _user_inputs(program)]


def _user_inputs(program: torch.export.ExportedProgram) -> list[tuple[str, Any]]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = map(str, program.graph_signature.user_inputs)
    return [(name, nodes[name].meta.get("val") if name in nodes else None) for name in names]


def _as_tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    for kind, dtype in _NUMBERS.items():
        if isinstance(value, kind):
            return torch.empty((), dtype=dtype)
    raise InvalidInputsError(
        f"The program's input {name!r} is {type(value).__name__}, neither a tensor nor a number; export it with "
        f"tensors."
    )


def _dtype(name: str, value: torch.Tensor) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InvalidInputsError(f"The program's input {name!r} has the type {dtype}; use one of {', '.join(DTYPES)}.")
    return dtype


def _size(dim: Any) -> int | None:
    return dim if isinstance(dim, int) else None


def _words(values: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Each of torch's sizes -> a word: symbols, and expressions such as 2*s77, which the program takes some of only."""
    words: dict[str, str] = {}
    for name, value in values:
        for axis, dim in enumerate(value.shape):
            symbol = str(dim)
            if isinstance(dim, int) or symbol in words:
                continue
            taken = words.values()
            word = "batch" if axis == 0 and "batch" not in taken else f"dim_{axis}"
            words[symbol] = word if word not in taken else f"{name}_dim_{axis}"
    return words


def tied_sizes(
    program: torch.export.ExportedProgram, specs: Sequence[TensorSpec]
) -> Callable[[Mapping[str, int], str], Mapping[str, int]]:
    """What makes extents of the specs' dimensions go together: of 2*h and 2*h + 1, h is that of the one that leads."""
    groups: defaultdict[Any, dict[str, tuple[int, int]]] = defaultdict(dict)
    for spec, (_, value) in zip(specs, _user_inputs(program), strict=True):
        for word, dim in zip(spec.shape, value.shape if isinstance(value, torch.Tensor) else (), strict=True):
            if isinstance(word, str) and isinstance(dim, torch.SymInt) and (line := _line(dim.node.expr)):
                symbol, factor, offset = line
                groups[symbol][word] = (factor, offset)

    def tie(sizes: Mapping[str, int], lead: str) -> Mapping[str, int]:
        tied = dict(sizes)
        for members in groups.values():
            word = lead if lead in members else next(iter(members))
            factor, offset = members[word]
            extent = max(1, (sizes[word] - offset) // factor)
            tied.update({name: a * extent + b for name, (a, b) in members.items()})
        return tied

    return tie


def _line(expression: Any) -> tuple[Any, int, int] | None:
    """(symbol, factor, offset) of a size that is factor * symbol + offset; None: it is another."""
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        return None
    factor, offset = expression.coeff(symbols[0], 1), expression.subs(symbols[0], 0)
    if not (factor.is_Integer and offset.is_Integer and factor > 0):
        return None
    is_line = (expression - factor * symbols[0] - offset).expand() == 0
    return (symbols[0], int(factor), int(offset)) if is_line else None


def match_specs(own: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The program's inputs with the user's words for dimensions. Raises InvalidInputsError where they contradict."""
    listed = ", ".join(map(str, own))
    by_name = {spec.name: spec for spec in given}
    if len(own) == len(given) == 1:
        by_name = {own[0].name: given[0]}
    if unknown := by_name.keys() - {spec.name for spec in own}:
        raise InvalidInputsError(f"The program has no input {', '.join(sorted(unknown))}; it has {listed}.")
    words: dict[str, int | str] = {}
    for spec in own:
        want = by_name.get(spec.name, spec)
        if want.dtype != spec.dtype or len(want.shape) != len(spec.shape):
            raise InvalidInputsError(f"Input {want} does not fit the program, which has {listed}.")
        for old, new in zip(spec.shape, want.shape, strict=True):
            if isinstance(old, int) and new not in (old, None):
                raise InvalidInputsError(
                    f"Input {want}: the program was exported with the fixed size {old} there, it has {listed}. "
                    f"Export it with dynamic_shapes to vary it."
                )
            if isinstance(old, str) and new is not None and words.setdefault(old, new) != new:
                raise InvalidInputsError(f"Input {want}: one dimension has two names; it has {listed}.")
    return tuple(
        TensorSpec(
            spec.name, spec.dtype, tuple(words.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
        )
        for spec in own
    )
