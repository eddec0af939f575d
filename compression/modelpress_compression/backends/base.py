"""What a runtime must offer to measure models in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from modelpress_compression.inputs import Array


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
    for the job's log; empty: as the model says.
    """

    @property
    def label(self) -> str: ...

    @property
    def remark(self) -> str: ...

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> Runner:
        """The model in the file. `comparable`: random operators draw the same numbers in every run.

        Raises ModelNotRunnableError, UnsupportedOperatorError, which say what this runtime does not run.
        """
        ...
