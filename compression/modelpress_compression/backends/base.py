"""What a runtime must offer to measure models in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from modelpress_compression.inputs import Array, InputData


class Runner(Protocol):
    """A model that is open in a runtime. `note`: a sentence for the report on how it must be opened there; empty: as it
    is."""

    @property
    def note(self) -> str: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name; feeds that the model does not take are left out. May be called from several threads at
        once. Raises ModelNotRunnableError."""
        ...

    def prepared(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """A call that runs the model once on these feeds and does next to nothing besides. With one thread the model
        runs on the thread that calls, whose CPU time is read."""
        ...


class Backend(Protocol):
    """A runtime, with what a target says of it.

    `label`: the report's `execution_provider`. `remark`: a sentence, without its full stop, on how it computes here,
    for the job's log; empty: as the model says. `elsewhere`: whether it computes outside of this CPU, whose clock then
    tells nothing of its time.
    """

    @property
    def label(self) -> str: ...

    @property
    def remark(self) -> str: ...

    @property
    def elsewhere(self) -> bool: ...

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> Runner:
        """The model in the file. `comparable`: random operators draw the same numbers in every run.

        Raises ModelNotRunnableError, UnsupportedOperatorError, which say what this runtime does not run.
        """
        ...


@dataclass(frozen=True)
class BuildRequest:
    """What is built for a target that runs no ONNX files.

    `path`: the model after the recipe's steps. `data`: representative inputs. `max_drop`: largest permitted fall of the
    metric, or without one of the agreement with the original; None: the target's own default. `drop_of`: by how much
    the metric falls with a file of plain ONNX; None: there is no metric. `folder`: an empty one to work in.
    `time_left_s`: until the job's time is up; None: no limit. `check_time`: raises TimeLimitError when it is.
    """

    path: Path
    data: InputData
    folder: Path
    max_drop: float | None
    drop_of: Callable[[Path], float] | None
    time_left_s: Callable[[], float | None]
    check_time: Callable[[], None]
    progress: Callable[[float, str], None]
    log: Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What came of it.

    `model`: a file of plain ONNX that answers as the target does, which is compared with the original. `section`: the
    report's `target`, JSON types only. `project`: a zip archive of all that was made. `headline`: a few words on how
    fast it is. `latency_ms`: of one sample; None: not known. `details`, `notes`, `warnings`: as a pass has them.
    """

    model: Path
    project: Path
    changes: Mapping[str, int | float]
    section: Mapping[str, Any]
    headline: str
    latency_ms: float | None = None
    details: tuple[Mapping[str, str | int | float], ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@runtime_checkable
class Builder(Protocol):
    """A backend whose target runs what is built from a model. Nothing is timed on this machine then: the builder says
    what there is to say."""

    def build(self, request: BuildRequest) -> Built:
        """Raises UnsupportedOperatorError where the model cannot be built, and what says so of other faults."""
        ...
