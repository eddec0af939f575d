"""Which trace a call belongs to (W3C Trace Context).

Where the program uses OpenTelemetry, its current span is what the call belongs to, and each unary call is a span of its
own; the environment variable TRACEPARENT names it for programs that do not, such as `compress-client` in a pipeline.
OpenTelemetry is never imported from here first: who does not use it does not pay for it.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

ENVIRONMENT = "TRACEPARENT"
_KEYS = ("traceparent", "tracestate")


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What says to which trace a call belongs; empty: to none."""
    carrier: dict[str, str] = {}
    if _in_use():
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(carrier)
    if not carrier and os.environ.get(ENVIRONMENT):
        carrier = {"traceparent": os.environ[ENVIRONMENT]}
    return tuple((key, carrier[key]) for key in _KEYS if carrier.get(key, "").isascii() and key in carrier)


def call_span(name: str) -> AbstractContextManager[Any]:
    """A span around a call, where OpenTelemetry is in use."""
    if not _in_use():
        return nullcontext()
    from opentelemetry import trace

    span: AbstractContextManager[Any] = trace.get_tracer("modelpress_client").start_as_current_span(
        f"modelpress.v1/{name}", kind=trace.SpanKind.CLIENT, attributes={"rpc.system": "grpc", "rpc.method": name}
    )
    return span


def _in_use() -> bool:
    return "opentelemetry.trace" in sys.modules
