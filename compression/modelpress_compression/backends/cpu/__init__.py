"""onnxruntime on the CPU, in float32: what every model is compared in, whatever its target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnxruntime as ort

from modelpress_compression.inputs import Array
from modelpress_compression.runtime import EXECUTION_PROVIDER, open_comparable, open_session, run
from modelpress_compression.target import Target


@dataclass(frozen=True)
class OnnxRuntimeRunner:
    """A session."""

    session: ort.InferenceSession
    note: str = ""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return run(self.session, feeds)

    def prepared(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        taken = {value.name for value in self.session.get_inputs()}
        return partial(self.session.run, None, {name: array for name, array in feeds.items() if name in taken})


@dataclass(frozen=True)
class OnnxRuntime:
    """See `base.Backend`."""

    label: str = EXECUTION_PROVIDER
    remark: str = ""
    elsewhere: bool = False

    @classmethod
    def of(cls, target: Target) -> OnnxRuntime:
        """The same for every target."""
        del target
        return cls()

    def open(self, path: Path, *, threads: int = 1, comparable: bool = False) -> OnnxRuntimeRunner:
        if comparable and threads == 1:
            return OnnxRuntimeRunner(open_comparable(path))
        return OnnxRuntimeRunner(open_session(path, threads=threads))


CPU = OnnxRuntime()
