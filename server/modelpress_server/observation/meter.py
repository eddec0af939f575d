"""What the parts of the server tell of what happens."""

from __future__ import annotations

from modelpress_server.stores.overview import StateChange


class Meter:
    """Takes note of nothing: a server without `--http-listen` pays nothing for its metrics.

    All methods are quick, raise nothing, and may be called from any thread.
    """

    def call_ended(self, method: str, code: str, duration_s: float) -> None:
        """A call has its answer; `code`: the name of a gRPC status code."""

    def bytes_received(self, size_bytes: int) -> None:
        """An upload has brought so much."""

    def bytes_sent(self, size_bytes: int) -> None:
        """A download was given so much."""

    def upload_completed(self) -> None:
        """A file is there as a whole."""

    def state_changed(self, change: StateChange) -> None:
        """A job or a model is in another state; the change is stored."""

    def stage_ended(self, task: str, stage: str, duration_s: float) -> None:
        """A task (compress or inspect) was so long in a stage. The name of the stage is a worker's word."""

    def worker_lost(self, reason: str) -> None:
        """A worker ended without a result; `reason`: as of `WorkerLostError`."""

    def webhook_sent(self, result: str) -> None:
        """An attempt to bring an event to its place; `result`: arrived, failed, gone."""

    def findings_looked_up(self, found: bool) -> None:
        """A job has asked for earlier findings on its model and data."""
