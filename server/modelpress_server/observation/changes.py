"""A line in the log for each change of a state, and the count of it."""

from __future__ import annotations

import logging

from modelpress_server.names import format_name
from modelpress_server.observation.meter import Meter
from modelpress_server.stores.overview import StateChange

logger = logging.getLogger(__name__)
_TOLD = ("reason", "attempt", "from_cache", "wait_s", "run_s")  # where there is something to tell


class ChangeLog:
    """`note` may be called from any thread."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def note(self, change: StateChange) -> None:
        """A job or a model is in another state."""
        self._meter.state_changed(change)
        name = format_name(change.project, "jobs" if change.kind == "job" else "models", change.id)
        fields: dict[str, object] = {"project": change.project, change.kind: change.id, "state": change.state}
        fields |= {known: value for known in _TOLD if (value := getattr(change, known))}
        reason = f" ({change.reason})" if change.reason else ""
        logger.info("%s: %s%s", name, change.state, reason, extra={"fields": fields})
