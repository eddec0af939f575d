"""Progress on stderr: bars on a terminal, a plain line every few seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from modelpress_client.cli import units
from modelpress_client.cli.output import stderr_console

if TYPE_CHECKING:
    from rich.progress import TaskID

    from modelpress_client.resources import JobEvent
    from modelpress_client.transfers import TransferProgress

PLAIN_INTERVAL_S = 3.0
_VERBS = {"hash": "Hashing", "upload": "Uploading", "download": "Downloading"}
_STATES = {"QUEUED": "Waiting for a worker", "RUNNING": "Starting", "CANCELLING": "Cancelling"}


class Display(Protocol):
    """What the commands tell."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def transfer(self, progress: TransferProgress) -> None: ...
    def event(self, event: JobEvent) -> None: ...


def display(*, quiet: bool) -> Display:
    """The display that fits the terminal."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()


def describe(event: JobEvent) -> str:
    """One line for where a job stands."""
    if event.state == "QUEUED" and event.queue_position:
        return f"Waiting for a worker, {event.queue_position} ahead"
    if event.state == "RUNNING" and event.stage:
        place = f" ({event.stage_index + 1}/{event.stage_count})" if event.stage_count else ""
        return f"{event.stage.replace('_', ' ').capitalize()}{place}"
    return _STATES.get(event.state, event.state.capitalize())


class Silent:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing to end."""

    def transfer(self, progress: TransferProgress) -> None:
        """Says nothing."""

    def event(self, event: JobEvent) -> None:
        """Says nothing."""


class Lines(Silent):
    """A line when something begins or ends, and every few seconds between."""

    def __init__(self) -> None:
        self._last_text = ""
        self._last_kind = ""
        self._last_s = 0.0

    def transfer(self, progress: TransferProgress) -> None:
        """`Uploading model.onnx: 12 MB of 47.3 MB (25 %)`."""
        if progress.phase == "hash":
            return
        share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
        done = "" if share >= 1 else f"{units.size(progress.done_bytes)} of "
        name = progress.path.name
        text = f"{_VERBS[progress.phase]} {name}: {done}{units.size(progress.total_bytes)} ({units.percent(share)})"
        self._say(text, f"{progress.phase} {name}", at_once=share >= 1)

    def event(self, event: JobEvent) -> None:
        """`Quantize (3/5): 60 %, calibrating`."""
        text = describe(event)
        if event.state == "RUNNING":
            text += f": {units.percent(event.fraction)}" + (f", {event.message}" if event.message else "")
        self._say(text, f"{event.state} {event.stage}", at_once=False)

    def _say(self, text: str, kind: str, *, at_once: bool) -> None:
        now = time.monotonic()
        begins = kind != self._last_kind
        if text != self._last_text and (begins or at_once or now - self._last_s >= PLAIN_INTERVAL_S):
            print(text, file=sys.stderr, flush=True)
            self._last_text, self._last_kind, self._last_s = text, kind, now


class Bars:
    """Bars of rich: one for every file, one for the job; stages that are done stay as lines."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("[bold]{task.description:<24}"),
            BarColumn(bar_width=32),
            TaskProgressColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=stderr_console(),
            transient=True,
        )
        self._files: dict[str, TaskID] = {}
        self._job: TaskID | None = None
        self._stage = ""
        self._stage_s = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_stage(succeeded=error is None)
        self._progress.stop()

    def transfer(self, progress: TransferProgress) -> None:
        """Moves the bar of a file."""
        key = f"{progress.phase} {progress.path}"
        note = f"{units.size(progress.done_bytes)} of {units.size(progress.total_bytes)}"
        if key not in self._files:
            description = f"{_VERBS[progress.phase]} {_shortened(progress.path.name)}"
            self._files[key] = self._progress.add_task(description, total=max(progress.total_bytes, 1), note=note)
        task = self._files[key]
        self._progress.update(task, completed=progress.done_bytes or progress.total_bytes == 0, note=note)
        if progress.done_bytes >= progress.total_bytes and self._progress.tasks[task].visible:
            self._progress.update(task, visible=False)
            if progress.phase != "hash":
                verb = "uploaded" if progress.phase == "upload" else "downloaded"
                self._done(f"{verb} {progress.path.name}", units.size(progress.total_bytes))

    def event(self, event: JobEvent) -> None:
        """Moves the bar of the job, and leaves a line for the stage before."""
        if self._job is None:
            self._job = self._progress.add_task("", total=1.0, note="")
        stage = event.stage if event.state == "RUNNING" else ""
        if stage != self._stage:
            self._end_stage(succeeded=event.state in ("RUNNING", "SUCCEEDED"))
            self._stage, self._stage_s = stage, time.monotonic()
        self._progress.update(
            self._job, description=describe(event), completed=event.fraction, note=_shortened(event.message, 40)
        )

    def _end_stage(self, *, succeeded: bool) -> None:
        if self._stage and succeeded:
            self._done(self._stage, units.seconds(time.monotonic() - self._stage_s))
        self._stage = ""

    def _done(self, what: str, note: str) -> None:
        from rich.markup import escape

        self._progress.console.print(f"[green]✓[/green] {escape(what)} [dim]{escape(note)}[/dim]")


def _shortened(text: str, limit: int = 24) -> str:
    from rich.markup import escape

    return escape(text if len(text) <= limit else f"{text[: limit - 1]}…")
