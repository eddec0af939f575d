"""Progress on stderr: bars on a terminal, a plain line every few seconds elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from modelpress_client.cli import units
from modelpress_client.cli.eta import Eta, left_text
from modelpress_client.cli.output import stderr_console, write

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, ProgressColumn, Task, TaskID

    from modelpress_client.resources import JobEvent, Model
    from modelpress_client.transfers import TransferProgress

PLAIN_INTERVAL_S = 3.0
_VERBS = {"hash": "Hashing", "upload": "Uploading", "download": "Downloading"}
_STATES = {"QUEUED": "Queued", "RUNNING": "Preparing", "CANCELLING": "Cancelling"}
START_WORKER = "start_worker"  # the stage in which a job waits for its worker process
_INSPECTION = {"QUEUED": "Queued for inspection", "STARTING_WORKER": "Starting a worker", "RUNNING": "Inspecting"}


class Display(Protocol):
    """What the commands tell."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def transfer(self, progress: TransferProgress) -> None: ...
    def event(self, event: JobEvent) -> None: ...
    def inspection(self, model: Model) -> None: ...
    def warning(self, text: str) -> None: ...


def display(*, quiet: bool) -> Display:
    """The display that fits the terminal."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()


def describe(event: JobEvent) -> str:
    """One line for where a job stands."""
    if event.state == "QUEUED" and event.queue_position:
        return f"Queued, {_ahead(event.queue_position)}"
    if event.state == "RUNNING" and event.stage == START_WORKER:
        return "Starting a worker"
    if event.state == "RUNNING" and event.stage:
        place = f" ({event.stage_index + 1}/{event.stage_count})" if event.stage_count else ""
        return f"{event.stage.replace('_', ' ').capitalize()}{place}"
    return _STATES.get(event.state, event.state.capitalize())


def _is_at_work(event: JobEvent) -> bool:
    return event.state == "RUNNING" and event.stage not in ("", START_WORKER)


def describe_inspection(model: Model) -> str:
    """One line for where the inspection of a model stands."""
    text = _INSPECTION.get(model.inspection_stage, "Inspecting")
    ahead = model.message.inspections_ahead
    return f"{text}, {_ahead(ahead, 'model')}" if ahead else text


def _ahead(count: int, what: str = "job") -> str:
    return f"{count} {what}{'s' if count > 1 else ''} ahead"


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

    def inspection(self, model: Model) -> None:
        """Says nothing."""

    def warning(self, text: str) -> None:
        """Says nothing; the report will."""


class Etas(defaultdict[str, Eta]):
    """The time left of the job and of each file."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(lambda: Eta(clock))

    def of_job(self, event: JobEvent) -> Eta:
        """Counts from the first stage on: neither the queue nor the start of a worker says anything of the pace."""
        if _is_at_work(event):
            self["job"].update(event.fraction)
        return self["job"]

    def of_transfer(self, progress: TransferProgress) -> Eta:
        """By bytes."""
        eta = self[f"{progress.phase} {progress.path}"]
        eta.update(progress.done_bytes / max(progress.total_bytes, 1))
        return eta


class Lines(Silent):
    """A line when something begins or ends, and every few seconds between."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_text = ""
        self._last_kind = ""
        self._last_s = 0.0
        self._etas = Etas(clock)

    def transfer(self, progress: TransferProgress) -> None:
        """`Uploading model.onnx: 12 MB of 47.3 MB (25 %), about 20 s left`."""
        if progress.phase == "hash":
            return
        share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
        done = "" if share >= 1 else f"{units.size(progress.done_bytes)} of "
        name = progress.path.name
        text = f"{_VERBS[progress.phase]} {name}: {done}{units.size(progress.total_bytes)} ({units.percent(share)})"
        text = _joined(text, left_text(self._etas.of_transfer(progress).left_s()))
        self._say(text, f"{progress.phase} {name}", at_once=share >= 1)

    def event(self, event: JobEvent) -> None:
        """`Quantize (3/5): 60 %, calibrating, about 20 s left`."""
        if event.is_past:
            return
        text, left = describe(event), left_text(self._etas.of_job(event).left_s())
        if _is_at_work(event):
            text = f"{text}: {_joined(units.percent(event.fraction), event.message, left)}"
        elif event.state == "RUNNING":
            text = _joined(text, event.message)
        self._say(text, f"{event.state} {event.stage}", at_once=False)

    def inspection(self, model: Model) -> None:
        """`Starting a worker`."""
        self._say(describe_inspection(model), model.inspection_stage, at_once=False)

    def warning(self, text: str) -> None:
        """`Warning: The data: all samples are the same`."""
        write(sys.stderr, f"Warning: {text}")

    def _say(self, text: str, kind: str, *, at_once: bool) -> None:
        now = self._clock()
        begins = kind != self._last_kind
        if text != self._last_text and (begins or at_once or now - self._last_s >= PLAIN_INTERVAL_S):
            write(sys.stderr, text)
            self._last_text, self._last_kind, self._last_s = text, kind, now


class Bars:
    """Bars of rich: one for every file, one for the job; stages that are done stay as lines.

    What is being tried stands on a line of its own below, so that it has room on narrow terminals.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        self._clock = clock
        self._note = ""
        self._progress = _noted_progress(
            TextColumn("[bold]{task.description:<20}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=16),
            TaskProgressColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            note=lambda: self._note,
        )
        self._files: dict[str, TaskID] = {}
        self._job: TaskID | None = None
        self._inspection: TaskID | None = None
        self._etas = Etas(clock)
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
        self._note = f"{units.size(progress.done_bytes)} of {units.size(progress.total_bytes)}"
        if key not in self._files:
            description = f"{_VERBS[progress.phase]} {_shortened(progress.path.name)}"
            self._files[key] = self._progress.add_task(description, total=max(progress.total_bytes, 1), eta=None)
        task = self._files[key]
        done = progress.done_bytes or progress.total_bytes == 0
        self._progress.update(task, completed=done, eta=self._etas.of_transfer(progress))
        if progress.done_bytes >= progress.total_bytes and self._progress.tasks[task].visible:
            self._progress.update(task, visible=False)
            self._note = ""
            if progress.phase != "hash":
                verb = "uploaded" if progress.phase == "upload" else "downloaded"
                self._done(f"{verb} {progress.path.name}", units.size(progress.total_bytes))

    def event(self, event: JobEvent) -> None:
        """Moves the bar of the job, and leaves a line for the stage before."""
        if event.is_past:
            return
        if self._job is None:
            self._job = self._progress.add_task("", total=1.0, eta=None)
        stage = event.stage if event.state == "RUNNING" else ""
        if stage != self._stage:
            self._end_stage(succeeded=event.state in ("RUNNING", "SUCCEEDED"))
            self._stage, self._stage_s = stage, self._clock()
        self._note = event.message
        eta = self._etas.of_job(event) if _is_at_work(event) else None
        self._progress.update(self._job, description=describe(event), completed=event.fraction, eta=eta)

    def inspection(self, model: Model) -> None:
        """A bar without an end: nobody knows how long it takes."""
        if self._inspection is None:
            self._inspection = self._progress.add_task("", total=None, eta=None)
        self._progress.update(self._inspection, description=describe_inspection(model))

    def warning(self, text: str) -> None:
        """A line that stays."""
        from rich.markup import escape

        self._progress.console.print(f"[yellow]![/yellow] {escape(text)}")

    def _end_stage(self, *, succeeded: bool) -> None:
        if self._stage and succeeded:
            name = "start a worker" if self._stage == START_WORKER else self._stage.replace("_", " ")
            self._done(name, units.seconds(self._clock() - self._stage_s))
        self._stage = ""

    def _done(self, what: str, note: str) -> None:
        from rich.markup import escape

        self._progress.console.print(f"[green]✓[/green] {escape(what)} [dim]{escape(note)}[/dim]")


def _noted_progress(*columns: ProgressColumn, note: Callable[[], str]) -> Progress:
    """Progress of rich with the time left, as of each refresh, and one more line, cut at the terminal's edge."""
    from rich.progress import Progress, ProgressColumn
    from rich.text import Text

    class TimeLeft(ProgressColumn):
        def render(self, task: Task) -> Text:
            eta: Eta | None = task.fields["eta"]
            return Text(left_text(eta.left_s()) if eta is not None else "", no_wrap=True)

    class Noted(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if text := note():
                yield Text(f"  {text}", style="dim", no_wrap=True, overflow="ellipsis")

    return Noted(*columns, TimeLeft(), console=stderr_console(), transient=True)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _shortened(text: str, limit: int = 24) -> str:
    from rich.markup import escape

    return escape(text if len(text) <= limit else f"{text[: limit - 1]}…")
