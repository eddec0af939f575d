"""What a task may use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modelpress_server.executors.sandbox import Sandbox
from modelpress_server.worker.events import Events


@dataclass(frozen=True)
class TaskContext:
    """The way to the server, the confinement that was reached, and this worker's private folder."""

    events: Events
    sandbox: Sandbox
    directory: Path
