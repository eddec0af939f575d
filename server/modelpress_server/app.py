"""The server as a whole: builds the parts, starts them in order, and takes them down in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from modelpress_protos.v1 import (
    job_service_pb2_grpc,
    model_service_pb2_grpc,
    server_service_pb2_grpc,
    upload_service_pb2_grpc,
)

from modelpress_server.background_scrub import BackgroundScrub
from modelpress_server.ballast import Ballast
from modelpress_server.clock import Clock
from modelpress_server.config import MAX_MESSAGE_BYTES, TOKENS_NAME, Settings, SettingsError
from modelpress_server.connections import connection_options
from modelpress_server.executors.base import Executor
from modelpress_server.findings import Findings
from modelpress_server.host import Host
from modelpress_server.identity.audit import AuditLog
from modelpress_server.identity.authenticator import Authenticator
from modelpress_server.identity.certificates import server_credentials
from modelpress_server.interceptors import Gate
from modelpress_server.janitor import Janitor, clear_work_folders
from modelpress_server.lock import DataDirLock
from modelpress_server.membership import Membership
from modelpress_server.observation.changes import ChangeLog
from modelpress_server.observation.meter import Meter
from modelpress_server.observation.tracer import Tracer
from modelpress_server.pace import Pace
from modelpress_server.projects import Projects
from modelpress_server.reflection import enable_reflection
from modelpress_server.runs import RunResources
from modelpress_server.scheduler import Scheduler
from modelpress_server.services.job_service import JobService
from modelpress_server.services.model_service import ModelService
from modelpress_server.services.server_service import ServerService, read_once
from modelpress_server.services.upload_service import UploadService
from modelpress_server.sites.base import Site
from modelpress_server.sites.machine import ThisMachine
from modelpress_server.space import Space
from modelpress_server.stores.blobs import BlobStore
from modelpress_server.stores.database import Database
from modelpress_server.stores.filesystem import FileBlobStore
from modelpress_server.stores.news import News
from modelpress_server.stores.overview import StateChange
from modelpress_server.stores.sql_blobs import SqlBlobIndex
from modelpress_server.stores.sql_jobs import SqlJobStore
from modelpress_server.stores.sql_models import SqlModelStore
from modelpress_server.stores.sql_outbox import SqlOutbox
from modelpress_server.stores.sql_overview import SqlOverview
from modelpress_server.stores.sql_servers import SqlServerStore
from modelpress_server.stores.sql_usage import SqlUsage
from modelpress_server.waiting import Notifier

if TYPE_CHECKING:
    from starlette.routing import Route

    from modelpress_server.events.dispatcher import Dispatcher
    from modelpress_server.observation.http import HttpServer
    from modelpress_server.observation.metrics import PrometheusMeter

logger = logging.getLogger(__name__)

SERVICES = (
    "modelpress.v1.UploadService",
    "modelpress.v1.ModelService",
    "modelpress.v1.JobService",
    "modelpress.v1.ServerService",
)
# What the data folder holds besides work/, where workers have their folders.
PRIVATE_NAMES = ("blobs", "uploads", "tmp", "quarantine", "modelpress.db", TOKENS_NAME)
# What is served also while this host can start no workers.
WITHOUT_WORKERS = ("modelpress.v1.UploadService", "modelpress.v1.ServerService")
# How long streams get to store what they have once the server closes them.
CLOSE_GRACE_S = 1.0
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 2 * MAX_MESSAGE_BYTES),
    # A second server on the same port must fail, not share it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 1000),
    # Clients may ping every 10 s, also while nothing is called; by default such pings are answered with GOAWAY.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that vanished without a word is noticed, so that its upload has a writer no longer.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


def local_executor(settings: Settings) -> Executor:
    """The executor that runs each task in a child process of this machine."""
    from modelpress_server.executors.local import LocalExecutor

    return LocalExecutor(
        fork=settings.worker_start == "fork" and settings.workers > 0,
        sandbox=settings.sandbox,
        measure_cores=settings.measure_core_numbers,
        temp_root=settings.data_dir / "work",
        private=private_paths(settings),
        first_uid=settings.worker_uid,
    )


def _ray_cluster(settings: Settings, server_id: str, clock: Clock, meter: Meter) -> Site:
    """The nodes of a cluster. Nothing secret goes there: their keys of the bucket are their own."""
    from modelpress_server.sites.ray_cluster import RayCluster
    from modelpress_server.sites.ray_node import NodeSettings

    nodes = NodeSettings(
        blobs=settings.blobs or "",
        slots=settings.node_workers,
        worker_start=settings.worker_start,
        sandbox=settings.sandbox,
        worker_uid=settings.worker_uid,
        reserve_bytes=settings.reserve_bytes,
        max_blob_bytes=settings.max_blob_bytes,
        folder=settings.node_dir,
    )
    return RayCluster(
        settings.ray_address or "",
        nodes,
        measure_on=settings.measure_on,
        server_id=server_id,
        lease_s=settings.lease_s,
        clock=clock,
        meter=meter,
    )


def private_paths(settings: Settings) -> list[Path]:
    """What no worker may read: the data folder and what lies in it, and the secrets that the settings name."""
    data_dir = settings.data_dir
    named = (settings.token_file, settings.tls_key, settings.webhooks, settings.console_client_secret)
    return [data_dir, *(data_dir / name for name in PRIVATE_NAMES), *(path.absolute() for path in named if path)]


def _blob_store(settings: Settings) -> BlobStore:
    if settings.blobs is None:
        return FileBlobStore(settings.data_dir)
    from modelpress_server.stores.s3 import S3BlobStore

    return S3BlobStore(settings.blobs, settings.data_dir / "tmp")


def _prometheus_meter(settings: Settings) -> PrometheusMeter | None:
    """One that counts, where somebody can ask it."""
    if settings.http_listen is None:
        return None
    try:
        from modelpress_server.observation.metrics import PrometheusMeter
    except ImportError as error:
        raise SettingsError(
            f"http_listen: {error.name} is not installed. Run: pip install 'modelpress[server]'"
        ) from error
    return PrometheusMeter()


def _tracer(settings: Settings) -> Tracer:
    """One that keeps traces, where they are to be sent somewhere."""
    if settings.otlp_endpoint is None:
        return Tracer()
    try:
        from modelpress_server.observation.otel import OtelTracer
    except ImportError as error:
        raise SettingsError(
            f"otlp_endpoint: {error.name} is not installed. Run: pip install 'modelpress[traces]'"
        ) from error
    return OtelTracer(settings.otlp_endpoint)


class Server:
    """A modelpress server; `start`, then `stop` once."""

    def __init__(
        self,
        settings: Settings,
        make_executor: Callable[[Settings], Executor] = local_executor,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._make_executor = make_executor
        self._clock = clock or Clock()
        self._lock = DataDirLock(settings.data_dir)
        # What a stop, or a start that fails, has to close, the last opened first.
        self._opened = AsyncExitStack()
        self._notifier = Notifier()
        self._http: HttpServer | None = None
        self._dispatcher: Dispatcher | None = None
        self.address = ""

    @property
    def http_address(self) -> str:
        """Where metrics and probes are; empty: nowhere."""
        return self._http.address if self._http is not None else ""

    async def start(self) -> None:
        """Opens the data folder, serves, and begins to schedule. Raises SettingsError."""
        settings = self._settings
        self._projects = Projects(settings)
        authenticator, credentials = Authenticator(settings, self._clock), server_credentials(settings)
        self._lock.acquire()
        self._opened.callback(self._lock.release)
        try:
            self._audit = AuditLog(settings.audit_log)
            self._opened.callback(self._audit.close)
            await self._open_stores()
            await asyncio.to_thread(read_once)
            self._build(authenticator)
            self._bind(credentials)
            # Closed before what serves HTTP: so long, probes are told that the server ends.
            self._opened.push_async_callback(self._site.close)
            await self._site.start()
            await self._set_serving(True)
            await self._membership.join()
            if self._news is not None:
                self._news.start()
            await self._scheduler.start(machine_restarted=self._lock.machine_restarted)
            self._lock.note_boot()
            await self._grpc.start()
            if self._http is not None:
                await self._http.start()
        except BaseException:
            await self._opened.aclose()
            raise
        if self._dispatcher is not None:
            self._dispatcher.start()
        self._janitor.start()
        if self._scrub is not None:
            self._scrub.start()
        self._lock.announce(self.address)

    async def stop(self) -> None:
        """Refuses new work, lets running jobs finish within the grace or queues them again, then closes everything."""
        self._gate.drain()
        await self._health.enter_graceful_shutdown()
        await self._scheduler.drain(self._settings.drain_grace_s)
        if self._news is not None:
            await self._news.close()
        await self._membership.leave()
        # Ends watch streams with DRAINING: their clients come back to the next server.
        self._notifier.close()
        await self._grpc.stop(CLOSE_GRACE_S)
        await self._uploads.sessions.close()
        await self._janitor.close()
        if self._scrub is not None:
            await self._scrub.close()
        await self._opened.aclose()

    async def _open_stores(self) -> None:
        settings, data_dir = self._settings, self._settings.data_dir
        await asyncio.to_thread(clear_work_folders, data_dir / "work")
        self._blobs = _blob_store(settings)
        self._opened.push_async_callback(self._blobs.close)
        await self._blobs.open()
        self._ballast = Ballast(data_dir / "ballast")
        self._ballast.ease()
        if settings.database is None:
            self._database = await asyncio.to_thread(Database.open, data_dir / "modelpress.db", self._ballast)
        else:
            self._database = await asyncio.to_thread(Database.connect, settings.database)
        self._opened.push_async_callback(self._database.close)
        await asyncio.to_thread(self._ballast.take_on)

    def _build(self, authenticator: Authenticator) -> None:
        settings, database = self._settings, self._database
        models, index, usage = SqlModelStore(database), SqlBlobIndex(database), SqlUsage(database)
        prometheus = _prometheus_meter(settings)
        meter, self._tracer = prometheus or Meter(), _tracer(settings)
        self._opened.push_async_callback(self._tracer.close)
        pace = Pace(settings.workers)
        self._note_changes(pace, meter)
        space = Space(settings.data_dir, settings.reserve_bytes, None if self._blobs.shared else index)
        findings = Findings(settings.data_dir / "findings", self._projects, self._blobs, space)
        self._membership = Membership(
            SqlServerStore(database), settings.data_dir, settings.lease_s, self._clock, shared=database.shared
        )
        self._site = self._make_site(space, findings, meter)
        jobs = SqlJobStore(database, self._site.kinds)
        host = Host(self._site, self._clock, self._set_serving)
        resources = RunResources(settings, self._site, usage, meter, self._tracer)
        self._scheduler = Scheduler(
            resources, self._projects, models, jobs, self._notifier, host, self._clock, self._membership.server_id
        )
        self._membership.on_beat = self._scheduler.beat
        self._news = News(settings.database, self._scheduler.hear) if settings.database is not None else None
        self._gate = Gate(authenticator, self._projects, self._audit, meter, self._clock, self._tracer)
        self._uploads = UploadService(settings, self._projects, self._blobs, index, space, self._clock, meter)
        self._build_upkeep(index, usage, findings)
        space.on_short = self._janitor.hurry
        model_service = ModelService(settings, self._projects, models, self._scheduler, findings)
        job_service = JobService(
            settings,
            self._projects,
            jobs,
            models,
            index,
            self._blobs,
            self._scheduler,
            self._notifier,
            self._clock,
            pace,
        )
        server_service = ServerService(settings, self._projects, jobs, usage, findings, self._site)
        self._build_grpc(job_service, model_service, server_service)
        if prometheus is not None:
            self._build_http(authenticator, prometheus, host, job_service, model_service, server_service)

    def _note_changes(self, pace: Pace, meter: Meter) -> None:
        """Has log, metrics, pace and webhooks told of each change of a state."""
        log = ChangeLog(meter)

        def changed(change: StateChange) -> None:
            log.note(change)
            pace.note(change)

        self._database.on_change = changed
        if self._settings.webhooks is not None:
            self._build_webhooks(self._settings.webhooks, meter)

    def _make_site(self, space: Space, findings: Findings, meter: Meter) -> Site:
        settings = self._settings
        if settings.ray_address is not None:
            return _ray_cluster(settings, self._membership.server_id, self._clock, meter)
        return ThisMachine(
            self._make_executor(settings),
            self._blobs,
            space,
            settings.data_dir / "work",
            findings=findings,
            meter=meter,
            max_blob_bytes=settings.max_blob_bytes,
        )

    def _build_upkeep(self, index: SqlBlobIndex, usage: SqlUsage, findings: Findings) -> None:
        """What sweeps, and what reads stored files again."""
        self._janitor = Janitor(
            self._settings,
            self._projects,
            self._blobs,
            index,
            usage,
            self._uploads.sessions,
            findings,
            self._ballast,
            self._clock,
            leads=partial(self._database.leads, "janitor"),
        )
        # A bucket looks after its objects itself; what is read of it is verified on its way.
        files = self._blobs if isinstance(self._blobs, FileBlobStore) else None
        self._scrub = BackgroundScrub(self._settings, files, self._clock) if files is not None else None

    def _build_grpc(self, jobs: JobService, models: ModelService, server: ServerService) -> None:
        options = (*OPTIONS, *connection_options(self._settings))
        self._grpc = grpc.aio.server(interceptors=[self._gate], options=options)
        upload_service_pb2_grpc.add_UploadServiceServicer_to_server(self._uploads, self._grpc)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(models, self._grpc)
        job_service_pb2_grpc.add_JobServiceServicer_to_server(jobs, self._grpc)
        server_service_pb2_grpc.add_ServerServiceServicer_to_server(server, self._grpc)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # the stubs know the synchronous one
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        enable_reflection((*SERVICES, health.SERVICE_NAME), self._grpc)

    def _build_webhooks(self, path: Path, meter: Meter) -> None:
        from modelpress_server.events.dispatcher import Dispatcher
        from modelpress_server.events.endpoints import Endpoints

        endpoints, database, log = Endpoints(path), self._database, self._database.on_change
        self._dispatcher = dispatcher = Dispatcher(endpoints, SqlOutbox(database), meter, self._clock)
        self._opened.push_async_callback(dispatcher.close)

        def noted(change: StateChange) -> None:
            log(change)
            dispatcher.note(change)

        database.subscribers, database.on_change = endpoints.wanting, noted

    def _build_http(
        self,
        authenticator: Authenticator,
        meter: PrometheusMeter,
        host: Host,
        jobs: JobService,
        models: ModelService,
        server: ServerService,
    ) -> None:
        settings, clock, overview = self._settings, self._clock, SqlOverview(self._database)
        from modelpress_server.observation.http import HttpServer
        from modelpress_server.observation.look import Lookout
        from modelpress_server.observation.readiness import Readiness

        lookout = Lookout(settings.data_dir, overview, self._site, host, clock)
        readiness = Readiness(overview, self._blobs, self._site, host, self._gate, clock)
        pages: list[Route] = []
        if settings.console:
            from modelpress_server.console.app import Console
            from modelpress_server.console.visitor import Services

            services = Services(self._gate, jobs, models, self._uploads, server, overview)
            pages = Console(settings, authenticator, services, clock).routes()
        self._http = HttpServer(settings, authenticator, meter, lookout, readiness, pages)
        self._opened.push_async_callback(self._gate.left)
        self._opened.push_async_callback(self._http.close)

    def _bind(self, credentials: grpc.ServerCredentials | None) -> None:
        listen, host = self._settings.listen, self._settings.listen.rpartition(":")[0]
        try:
            if credentials is None:
                port = self._grpc.add_insecure_port(listen)
            else:
                port = self._grpc.add_secure_port(listen, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise SettingsError(f"listen: cannot bind {listen}; is the port taken? Choose another, or port 0.")
        self.address = f"{host}:{port}"
        if self._http is not None:
            self._http.bind()

    async def _set_serving(self, able: bool) -> None:
        """`able`: whether workers can be started; uploads and downloads are served without them."""
        status = health_pb2.HealthCheckResponse
        for service in ("", *SERVICES):
            serves = able or service in WITHOUT_WORKERS
            await self._health.set(service, status.SERVING if serves else status.NOT_SERVING)
