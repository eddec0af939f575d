"""The contract of a pass: `Model -> PassResult(model, changes, skipped)`.

A pass keeps nothing between calls and never changes the model that it is given: it works on `model.clone()`. Its frozen
configuration is the `config` of its folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

from modelpress_compression.errors import InvalidDataError, TimeLimitError
from modelpress_compression.graph.read import is_op
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.target import Target


@dataclass(frozen=True)
class Skip:
    """Why something was left as it was: the node (or weight) and one sentence."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """The result of a pass. `changes`: how often each rewrite fired. `warnings` go into the report.

    `details`: figures of single layers, for passes that have some. `notes`: sentences about the result as a
    whole.
    """

    model: Model
    changes: Mapping[str, int | float] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()
    warnings: tuple[str, ...] = ()
    details: tuple[Mapping[str, str | int | float], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        return any(self.changes.values())


def _silent(message: str) -> None:
    """No one listens."""


SpanFactory = Callable[[str, str], AbstractContextManager[None]]


def _unmarked(kind: str, name: str) -> AbstractContextManager[None]:
    """No one keeps traces."""
    return nullcontext()


@dataclass(frozen=True)
class Context:
    """All that a pass may use besides the model.

    `data`: representative inputs; `data.provided` is False where they are synthetic.
    `work_directory`: a private folder for temporary files.
    `deadline`: what `clock` shows when the job's time is up; None: no limit.
    `target`: what the result will run on.
    `original`: the model as it was uploaded, which passes that train take as their teacher; None: not known.
    `alone`: within it nothing else of ours runs on this machine, for measuring latency.
    `span`: around a part of the work, of a kind ("pass", "candidate") and with a name, for whoever keeps traces.
    `log`: one line for the job's log; `progress`: share of this pass done, 0 to 1, and one line for people.
    """

    data: InputData
    work_directory: Path
    deadline: float | None = None
    clock: Callable[[], float] = time.monotonic
    alone: Callable[[], AbstractContextManager[None]] = nullcontext
    target: Target = field(default_factory=Target)
    log: Callable[[str], None] = _silent
    progress: Callable[[float, str], None] = lambda fraction, message: None
    original: Model | None = None
    span: SpanFactory = _unmarked

    @property
    def time_left_s(self) -> float | None:
        """Until the job's time is up; None: no limit."""
        return None if self.deadline is None else self.deadline - self.clock()

    def check_time(self) -> None:
        """Raises TimeLimitError when the job's time is up; passes call it in their outer loops."""
        if self.time_left_s is not None and self.time_left_s < 0:
            raise TimeLimitError("The job's time limit ran out; give it more time, or leave out the slowest step.")


def require_data(technique: str, option: str, value: str, context: Context) -> None:
    """Refuses an option that asks by name for what data decides, where none is given. Raises InvalidDataError."""
    if not context.data.provided:
        raise InvalidDataError(
            f"{technique} with {option} {value!r} needs representative inputs; give some, or choose another {option}."
        )


class Pass(Protocol):
    """One configured technique."""

    def __call__(self, model: Model, context: Context) -> PassResult:
        """Works on a clone of `model`; raises CompressionError for what the user can mend."""
        ...


def is_excluded(name: str | None, patterns: tuple[str, ...]) -> bool:
    """Whether a node's or weight's name matches one of the globs."""
    return name is not None and any(fnmatchcase(name, pattern) for pattern in patterns)


def unmatched_excludes(model: Model, exclude: tuple[str, ...]) -> list[str]:
    """A warning for each pattern of `exclude` that no node and no weight has a name for."""
    names = [node.name for node in model.nodes() if node.name]
    names += [
        output.name for node in model.nodes() if is_op(node, "Constant") for output in node.outputs if output.name
    ]
    names += [name for graph in model.graphs() for name in graph.initializers]
    return [
        f"The exclude pattern {pattern!r} matches no node and no weight."
        for pattern in exclude
        if not any(is_excluded(name, (pattern,)) for name in names)
    ]
