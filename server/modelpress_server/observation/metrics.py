"""The metrics, in Prometheus' form. docs/operations.md says what each is good for.

Every label has a bounded number of values: what a client or a worker makes up counts as `other`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from modelpress_protos.v1.recipe_pb2 import Step
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from modelpress_server.executors.base import START_WORKER
from modelpress_server.observation.look import Look
from modelpress_server.observation.meter import Meter
from modelpress_server.stores.overview import StateChange
from modelpress_server.toolchain import toolchain

OTHER = "other"
# Projects with series of their own: the first that had a queue. A series that comes and goes would be of no use.
MAX_PROJECTS = 100
STAGES = (
    START_WORKER,
    "load",
    *(field.name for field in Step.DESCRIPTOR.fields),
    "search",
    "build",
    "measure",
    "report",
)
disable_created_metrics()  # type: ignore[no-untyped-call]  # of the whole process: each counter would bring a series that says when it began
RPC_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
TASK_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)


class PrometheusMeter(Meter):
    """Counts into a registry of its own, so that several servers in one process do not share their figures."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._looks = LookCollector(toolchain().get("modelpress", ""))
        registry.register(self._looks)
        self._calls = Counter(
            "modelpress_rpcs", "Calls that have ended, by gRPC status code.", ("method", "code"), registry=registry
        )
        self._call_s = Histogram(
            "modelpress_rpc_duration_seconds",
            "How long calls took; streams (watching, uploads, downloads) to their end.",
            ("method",),
            buckets=RPC_BUCKETS_S,
            registry=registry,
        )
        self._received = Counter("modelpress_upload_bytes", "Bytes that uploads have brought.", registry=registry)
        self._sent = Counter("modelpress_download_bytes", "Bytes that downloads were given.", registry=registry)
        self._completed = Counter("modelpress_uploads_completed", "Files that came as a whole.", registry=registry)
        self._created = Counter("modelpress_jobs_created", "Jobs that were taken.", registry=registry)
        self._cached = Counter(
            "modelpress_jobs_from_cache", "Jobs that were given the result of an identical one.", registry=registry
        )
        self._job_changes = Counter(
            "modelpress_job_state_changes", "How often a job came into a state.", ("state",), registry=registry
        )
        self._model_changes = Counter(
            "modelpress_model_state_changes", "How often a model came into a state.", ("state",), registry=registry
        )
        self._wait_s = Histogram(
            "modelpress_job_wait_seconds",
            "From the creation of a job to its first start.",
            buckets=TASK_BUCKETS_S,
            registry=registry,
        )
        self._run_s = Histogram(
            "modelpress_job_run_seconds",
            "From the last start of a job to its end.",
            buckets=TASK_BUCKETS_S,
            registry=registry,
        )
        self._stage_s = Histogram(
            "modelpress_stage_duration_seconds",
            "How long tasks (compress, inspect) were in a stage; a technique is a stage.",
            ("task", "stage"),
            buckets=TASK_BUCKETS_S,
            registry=registry,
        )
        self._lost = Counter(
            "modelpress_workers_lost", "Workers that ended without a result.", ("reason",), registry=registry
        )
        self._findings = Counter(
            "modelpress_findings_lookups",
            "Jobs that asked for earlier findings on their model and data.",
            ("result",),
            registry=registry,
        )
        self._webhooks = Counter(
            "modelpress_webhook_deliveries",
            "Attempts to bring the end of a job to a place: arrived, failed, gone.",
            ("result",),
            registry=registry,
        )

    def text(self, look: Look) -> bytes:
        """All figures in Prometheus' text form; not from two threads at once."""
        self._looks.look = look
        return generate_latest(self.registry)

    def call_ended(self, method: str, code: str, duration_s: float) -> None:
        """See `Meter`."""
        self._calls.labels(method, code).inc()
        self._call_s.labels(method).observe(duration_s)

    def bytes_received(self, size_bytes: int) -> None:
        """See `Meter`."""
        self._received.inc(size_bytes)

    def bytes_sent(self, size_bytes: int) -> None:
        """See `Meter`."""
        self._sent.inc(size_bytes)

    def upload_completed(self) -> None:
        """See `Meter`."""
        self._completed.inc()

    def state_changed(self, change: StateChange) -> None:
        """See `Meter`."""
        if change.kind == "model":
            self._model_changes.labels(change.state).inc()
            return
        self._job_changes.labels(change.state).inc()
        if change.created:
            self._created.inc()
        if change.from_cache:
            self._cached.inc()
        if change.wait_s is not None:
            self._wait_s.observe(change.wait_s)
        if change.run_s is not None:
            self._run_s.observe(change.run_s)

    def stage_ended(self, task: str, stage: str, duration_s: float) -> None:
        """See `Meter`."""
        self._stage_s.labels(task, stage if stage in STAGES else OTHER).observe(duration_s)

    def worker_lost(self, reason: str) -> None:
        """See `Meter`."""
        self._lost.labels(reason).inc()

    def webhook_sent(self, result: str) -> None:
        """See `Meter`."""
        self._webhooks.labels(result).inc()

    def findings_looked_up(self, found: bool) -> None:
        """See `Meter`."""
        self._findings.labels("hit" if found else "miss").inc()


class LookCollector(Collector):
    """What was seen when somebody looked last, as metrics; `look` is set before each reading of the registry."""

    def __init__(self, version: str) -> None:
        self.look = Look()
        self._version = version
        self._projects: dict[str, None] = {}

    def collect(self) -> Iterator[Metric]:
        """All metrics that are read rather than counted."""
        look, figures = self.look, self.look.figures
        yield InfoMetricFamily("modelpress", "The server.", {"version": self._version})
        yield from self._of_queue()
        yield _gauge("modelpress_workers_available", "1: workers can be started here; 0: they cannot.", look.able)
        yield _gauge("modelpress_workers_busy", "Workers that have a task.", len(figures.pids) + figures.elsewhere)
        yield _gauge("modelpress_worker_imports_done", "1: a worker that is started has its imports.", figures.imported)
        yield _gauge("modelpress_worker_memory_bytes", "Memory that workers with a task hold.", look.memory_bytes)
        starts = CounterMetricFamily(
            "modelpress_worker_starts", "Worker processes that were started.", labels=["result"]
        )
        yield _by({"ok": figures.starts, "failed": figures.failed_starts}, starts)
        turns = figures.turns
        yield _gauge("modelpress_measuring_waiting", "Workers that wait for their turn to measure.", turns.waiting)
        yield _counter("modelpress_measuring_turns", "Turns of measuring that were given.", turns.given)
        yield _counter("modelpress_measuring_wait_seconds", "Time that workers waited for turns.", turns.waited_s)
        yield _counter("modelpress_measuring_hold_seconds", "Time that turns of measuring took.", turns.held_s)
        yield _gauge("modelpress_disk_free_bytes", "Free room where the data folder is.", look.disk_free_bytes)
        yield _gauge("modelpress_disk_size_bytes", "Size of the disk of the data folder.", look.disk_size_bytes)

    def _of_queue(self) -> Iterable[Metric]:
        seen = self.look.store
        if seen is None:
            return
        yield _by(seen.jobs, GaugeMetricFamily("modelpress_jobs", "Jobs that are stored.", labels=["state"]))
        yield _by(seen.models, GaugeMetricFamily("modelpress_models", "Models that are stored.", labels=["state"]))
        yield _gauge("modelpress_stored_bytes", "Size of all stored files, each counted once.", seen.stored_bytes)
        lengths: dict[str, float] = {}
        ages: dict[str, float] = {}
        for project, queue in seen.queues.items():
            label = self._label(project)
            lengths[label] = lengths.get(label, 0) + queue.jobs
            ages[label] = max(ages.get(label, 0.0), queue.oldest_age_s)
        for label in self._projects:  # an empty queue has a length as well
            lengths.setdefault(label, 0)
            ages.setdefault(label, 0.0)
        yield _by(lengths, GaugeMetricFamily("modelpress_queued_jobs", "Jobs in the queue.", labels=["project"]))
        oldest = "modelpress_oldest_queued_job_age_seconds"
        yield _by(ages, GaugeMetricFamily(oldest, "Age of the oldest job in the queue.", labels=["project"]))

    def _label(self, project: str) -> str:
        if project not in self._projects:
            if len(self._projects) >= MAX_PROJECTS:
                return OTHER
            self._projects[project] = None
        return project


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)


def _by(values: Mapping[str, float], family: Family) -> Family:
    """A family that was made for one label, with its values."""
    for value, amount in values.items():
        family.add_metric([value], amount)
    return family
