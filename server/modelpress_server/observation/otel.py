"""Traces by OpenTelemetry, sent over OTLP.

    modelpress.v1.JobService/CreateJob      a call, below the client's span where it sent one
      queued                                from the creation, or the last end, to the start
      run                                   one attempt of the job
        start_worker, load, search ...      its stages
          candidate, pass                   what the worker did in them, as it told

A trace of a job lasts as long as the job, over restarts of the server: each job knows the `traceparent` of the call
that made it. What else OpenTelemetry reads from the environment holds (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES,
OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS ...).
"""

from __future__ import annotations

import asyncio
import time

from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from modelpress_server.names import parse_name
from modelpress_server.observation.tracer import TRACE_PARENT_KEY, CallTrace, RunTrace, Tracer, trace_parent
from modelpress_server.toolchain import toolchain

# Calls that say how the server is, or that last as long as somebody watches: they would be most of all traces.
UNTRACED = ("/grpc.", "/modelpress.v1.JobService/WatchJob", "/modelpress.v1.JobService/StreamJobLogs")
EXPORT_TIMEOUT_S = 5
# Codes that are the server's fault; the others tell of what a client asked for.
_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
_propagator = TraceContextTextMapPropagator()


class OtelTracer(Tracer):
    """Keeps the traces of one server."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        """`endpoint`: of OTLP over gRPC, http:// without TLS, https:// with it."""
        version = toolchain().get("modelpress", "")
        resource = Resource({SERVICE_NAME: "modelpress-server", SERVICE_VERSION: version})
        resource = resource.merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = exporter or OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("modelpress_server", version)

    def call(self, method: str, parent: str) -> CallTrace:
        if method.startswith(UNTRACED):
            return super().call(method, parent)
        service, _, name = method.strip("/").partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
        span = self._tracer.start_span(
            method.strip("/"), _context(trace_parent(parent)), SpanKind.SERVER, attributes=attributes
        )
        return _OtelCall(span)

    def run(self, job: job_service_pb2.Job) -> RunTrace:
        project, job_id = parse_name(job.name, "jobs")
        attributes: dict[str, str | int] = {
            "modelpress.project": project,
            "modelpress.job": job_id,
            "modelpress.model": job.spec.model.rpartition("/")[2],
            "modelpress.attempt": job.attempt,
        }
        context = _context(job.trace_parent)
        waited_since, started = job.create_time.ToNanoseconds(), job.start_time.ToNanoseconds()
        if job.attempt == 1 and not job.excused_losses:
            queued = self._tracer.start_span("queued", context, attributes=attributes, start_time=waited_since)
            queued.end(max(started, waited_since))
        span = self._tracer.start_span("run", context, attributes=attributes, start_time=started)
        return _OtelRun(self, span)

    def start(self, name: str, parent: Span, time_ns: int, attributes: dict[str, str]) -> Span:
        """A part of another span."""
        return self._tracer.start_span(name, set_span_in_context(parent), start_time=time_ns, attributes=attributes)

    async def close(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)


class _OtelCall(CallTrace):
    def __init__(self, span: Span) -> None:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(span))
        super().__init__(carrier.get(TRACE_PARENT_KEY, ""))
        self._span = span

    def end(self, code: str, project: str) -> None:
        self._span.set_attribute("rpc.grpc.status", code)
        if project:
            self._span.set_attribute("modelpress.project", project)
        if code in _FAULTS:
            self._span.set_status(Status(StatusCode.ERROR, code))
        self._span.end()


class _OtelRun(RunTrace):
    asks = True

    def __init__(self, tracer: OtelTracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        self._stage: Span | None = None
        self._stage_name = ""
        self._stage_ns = time.time_ns()
        self._parts: dict[int, Span] = {}

    def on_event(self, event: worker_pb2.WorkerEvent) -> None:
        if event.HasField("progress") and event.progress.stage != self._stage_name:
            self._end_stage()
            self._stage_name, self._stage_ns = event.progress.stage, time.time_ns()
            self._stage = self._tracer.start(self._stage_name, self._span, self._stage_ns, {})
        elif event.HasField("span"):
            self._on_part(event.span)

    def _on_part(self, part: worker_pb2.Span) -> None:
        # A worker's word: no part began before its stage, or will end.
        time_ns = min(max(part.time_us * 1000, self._stage_ns), time.time_ns())
        if part.ended:
            span = self._parts.pop(part.id, None)
            if span is not None:
                if part.failed:
                    span.set_status(Status(StatusCode.ERROR))
                span.end(time_ns)
        elif part.id not in self._parts:
            parent = self._parts.get(part.parent) or self._stage or self._span
            attributes = {f"modelpress.{part.kind}": part.name} if part.kind in ("pass", "candidate") else {}
            self._parts[part.id] = self._tracer.start(f"{part.kind} {part.name}", parent, time_ns, attributes)

    def _end_stage(self) -> None:
        for part in reversed(self._parts.values()):
            part.end()
        self._parts.clear()
        if self._stage is not None:
            self._stage.end()
            self._stage = None

    def end(self, outcome: str, reason: str = "") -> None:
        self._end_stage()
        self._span.set_attribute("modelpress.outcome", outcome)
        if reason:
            self._span.set_attribute("modelpress.reason", reason)
        if outcome == "FAILED":
            self._span.set_status(Status(StatusCode.ERROR, reason))
        self._span.end()


def _context(parent: str) -> Context:
    return _propagator.extract({TRACE_PARENT_KEY: parent} if parent else {}, Context())
