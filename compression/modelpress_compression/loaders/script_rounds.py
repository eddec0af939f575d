"""Loops that stay loops while torch traces a graph that Python runs (`script_replay`).

A trace has the rounds of one run: of a loop over what a detector found, as many as it found then. Where one round can
be recorded by itself, it is, and TorchScript's own loop calls it as often as a tensor says.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.jit._trace import TracerWarning

from modelpress_compression.loaders.quiet import quiet

_TRACER: Any = torch._C  # torch does not type it


class NotRecordedError(Exception):
    """A round does something that the rounds behind it would see, or asks for what a trace does not hold."""


@dataclass(frozen=True)
class Round:
    """What a round leaves: new tensors in place of some that it was given, by their places, and rows that it found."""

    states: Mapping[int, torch.Tensor]
    rows: tuple[torch.Tensor, ...]


def repeated(
    run: Callable[[torch.Tensor, Sequence[torch.Tensor]], Round],
    count: torch.Tensor,
    given: Sequence[torch.Tensor],
    functions: list[Any],
) -> Round:
    """What `count` rounds leave, one behind the other, in the trace that is being made; of rows, all of a kind in one
    tensor, along a new first axis.

    `run(index, tensors)`: one round, on tensors in place of `given`. `count`: without axes, and not 0 while this is
    traced. Rounds of another run may be none: there are no rows then, of the size that those of this one have.
    `functions`: gets what the trace calls, which must be there for as long as it is not inlined: it keeps none of it.

    Raises NotRecordedError where a round cannot be recorded.
    """
    found: list[Round] = []

    def a_round(index: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found.append(run(index, tensors))
        if any(tensor._version for tensor in tensors):
            raise NotRecordedError("a tensor is written into")
        return (*found[-1].states.values(), *found[-1].rows)

    with _by_itself(), quiet():
        copies = [tensor.detach().clone() for tensor in given]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", TracerWarning)
            recorded = torch.jit.trace(  # type: ignore[no-untyped-call]
                a_round, (torch.tensor(0), *copies), check_trace=False
            )
        for warning in said:
            if issubclass(warning.category, TracerWarning):  # a number became one of this round alone
                raise NotRecordedError(str(warning.message))
        (left,) = found
        loop = _loop(recorded, len(given), left)
        none = [row.new_zeros((0, *row.shape)) for row in left.rows]
    functions += (recorded, loop)
    results = loop(count, *given, *none)
    return Round(dict(zip(left.states, results, strict=False)), tuple(results[len(left.states) :]))


def _loop(recorded: Any, number: int, left: Round) -> Any:
    """A function of TorchScript that runs the recorded round so often; it finds it by this name."""
    if not left.states and not left.rows:
        raise NotRecordedError("a round leaves nothing")
    tensors = [f"tensor_{place}" for place in range(number)]
    rows = [f"row_{place}" for place in range(len(left.rows))]
    states = [tensors[place] for place in left.states]
    lines = [
        f"def repeat({', '.join(f'{name}: Tensor' for name in ('count', *tensors, *(f'no_{row}' for row in rows)))}):",
        *(f"    {row}s = [no_{row}]" for row in rows),
        "    for index in range(int(count)):",
        f"        {', '.join((*states, *rows))}, = recorded({', '.join(('torch.tensor(index)', *tensors))})",
        *(f"        {row}s.append({row}.unsqueeze(0))" for row in rows),
        f"    return ({', '.join((*states, *(f'torch.cat({row}s)' for row in rows)))},)",
    ]
    return torch.jit.CompilationUnit("\n".join(lines) + "\n").repeat


@contextlib.contextmanager
def _by_itself() -> Iterator[None]:
    """Within, torch does not trace, so that a trace of its own can be made."""
    state = _TRACER._get_tracing_state()
    _TRACER._set_tracing_state(None)
    try:
        yield
    finally:
        _TRACER._set_tracing_state(state)


def is_tracing() -> bool:
    return _TRACER._get_tracing_state() is not None


def is_none(count: torch.Tensor) -> bool:
    """Whether a number is 0 in the run that is traced; the trace does not hear of it."""
    with _by_itself():
        return int(count) == 0


def used(block: Any) -> set[int]:
    """The numbers of values that a block uses and that are made outside of it."""
    within = {value.unique() for value in block.inputs()}
    numbers = {value.unique() for value in block.outputs()}
    for node in block.nodes():
        numbers.update(value.unique() for value in node.inputs())
        within.update(value.unique() for value in node.outputs())
        for inner in node.blocks():
            numbers |= used(inner)
    return numbers - within


def tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in a nest of lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_within(item)


class Exchange:
    """Values with other tensors in them; what holds tensors is copied, and it is known how it began."""

    def __init__(self, tensors: Mapping[int, torch.Tensor]) -> None:
        self._tensors = tensors  # by the number of what they stand for
        self._copies: dict[int, tuple[Any, Any, list[Any]]] = {}  # of a container: itself, its copy, what that held

    def of(self, value: Any) -> Any:
        """The value with the other tensors. Raises NotRecordedError for an object: what it holds may be shared."""
        if isinstance(value, torch.Tensor):
            return self._tensors[id(value)]
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if isinstance(value, SimpleNamespace):
            raise NotRecordedError("an object is used")
        if not isinstance(value, list | dict):
            return value
        if id(value) not in self._copies:
            copy = [*map(self.of, value)] if isinstance(value, list) else {key: self.of(value[key]) for key in value}
            self._copies[id(value)] = value, copy, _held(copy)
        return self._copies[id(value)][1]

    def grown(self) -> list[tuple[list[Any], torch.Tensor]]:
        """Lists that were empty and whose copies have one tensor now. Raises NotRecordedError for any other change."""
        found = []
        for value, copy, began in self._copies.values():
            now = _held(copy)
            if value == [] and len(now) == 1 and isinstance(now[0], torch.Tensor):
                found.append((value, now[0]))
            elif len(now) != len(began) or any(one is not other for one, other in zip(now, began, strict=True)):
                raise NotRecordedError("a list is changed")
        return found


def _held(container: list[Any] | dict[Any, Any]) -> list[Any]:
    return [*container] if isinstance(container, list) else [*container.keys(), *container.values()]
