"""The site that is a Ray cluster: each task is handed to a node with a free slot, and followed until it ends there.

Actors are found by their names, so that all servers share those of a node (`ray_node`). They belong to no server: one
that has lost its connection to the cluster comes back to its tasks. A node that is gone, or silent for too long, costs
its tasks a try that is excused, as a worker that others brought down.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from modelpress_protos.internal.v1 import site_pb2, worker_pb2
from modelpress_protos.v1 import job_service_pb2

from modelpress_server.clock import Clock
from modelpress_server.config import SettingsError
from modelpress_server.executors.base import START_WORKER, Figures, WorkerLostError, WorkerUnavailableError
from modelpress_server.executors.lost import CRASHED
from modelpress_server.names import new_id
from modelpress_server.observation.meter import Meter
from modelpress_server.sites.base import OnEvent
from modelpress_server.sites.endings import result_of
from modelpress_server.sites.ray_node import Node, NodeSettings
from modelpress_server.toolchain import made_by
from modelpress_server.waiting import uninterrupted

logger = logging.getLogger(__name__)

NAMESPACE = "modelpress"
CONNECT_TIMEOUT_S = 120.0
OPEN_TIMEOUT_S = 180.0
OPEN_TRIES = 3
TELL_TIMEOUT_S = 10.0
BEATS_PER_LEASE = 4
# A node and a server that do not hear of each other for so many leases give each other up: a connection that was cut is
# made anew before. What is dead, Ray tells sooner.
PATIENCE_LEASES = 4
# Ray's client tries so long by itself to go on with a connection.
RAY_GRACE_S = "10"
RETRY_S = 0.3
WAITS_FOR_NODE = "waits for a place on a node of the cluster"

Result = TypeVar("Result")


class NodeGoneError(Exception):
    """A node ended, or was silent for too long."""


@dataclass
class _Member:
    """A node that is known. `actor`: None: it is not ready, or the connection is to be made anew."""

    node_id: str
    address: str
    labels: dict[str, str]
    heard_s: float
    actor: Any = None
    info: site_pb2.NodeInfo | None = None
    tasks: int = 0  # of this server
    opening: asyncio.Task[None] | None = None


class RayCluster:
    """Site on the nodes of a Ray cluster.

    `address`: as `ray.init` takes it. `measure_on`: KEY or KEY=VALUE: jobs run on nodes with this label alone, since
    each measures. `server_id`: whose tasks they are. `lease_s`: that of the server.
    """

    def __init__(
        self,
        address: str,
        settings: NodeSettings,
        *,
        measure_on: str | None,
        server_id: str,
        lease_s: float,
        clock: Clock,
        meter: Meter,
    ) -> None:
        self._address = address
        self._settings = settings
        self._measure_on = (measure_on or "").partition("=")
        self._server_id = server_id
        self._lease_s = lease_s
        self._patience_s = PATIENCE_LEASES * lease_s
        self._clock = clock
        self._meter = meter
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="ray")  # Ray's own calls block
        self._members: dict[str, _Member] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._begun = 0
        self._followed: set[str] = set()  # ids of tasks, from before they are begun until they are forgotten

    @property
    def sandbox_level(self) -> int:
        """The lowest of the nodes; before any is there, 0."""
        return min((item.info.sandbox_level for item in self._ready()), default=0)

    @property
    def separate_users(self) -> bool:
        ready = self._ready()
        return bool(ready) and all(item.info.separate_users for item in ready)

    def figures(self) -> Figures:
        busy = sum(item.tasks for item in self._members.values())
        return Figures(starts=self._begun, elsewhere=busy)

    def kinds(self) -> Collection[bytes]:
        return {item.info.made_by for item in self._ready() if self._measures(item)}

    async def start(self) -> None:
        """Connects to the cluster. Raises SettingsError."""
        os.environ.setdefault("RAY_CLIENT_RECONNECT_GRACE_PERIOD", RAY_GRACE_S)
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise SettingsError("ray_address: ray is not installed. Run: pip install 'modelpress[ray]'") from error
        tries_until_s = self._clock.now_s() + CONNECT_TIMEOUT_S
        while True:
            try:
                await self._in_thread(self._connect)
                await self._look()
                break
            except Exception as error:
                await self._in_thread(self._disconnect)
                if self._clock.now_s() < tries_until_s:  # a busy head starts its processes slowly
                    await self._clock.sleep(RETRY_S)
                    continue
                raise SettingsError(
                    f"ray_address: the cluster at {self._address} does not answer: {_shown(error)} Is it started, with "
                    "the same versions of Python and ray as here?"
                ) from error
        await self._wait_for_nodes()
        self._keeper = asyncio.create_task(self._keep())

    async def _wait_for_nodes(self) -> None:
        """Until those that are there are open, or one is after more than one try; none may be there, and come later."""
        for _ in range(OPEN_TRIES):
            if opening := [item.opening for item in self._members.values() if item.opening is not None]:
                await asyncio.wait(opening, timeout=OPEN_TIMEOUT_S)
            if self._ready() or not self._members:
                return
            await self._clock.sleep(RETRY_S)
            await self._look()

    async def try_start(self) -> None:
        if not any(map(self._measures, self._ready())):
            label = f" and has the label {''.join(self._measure_on)}" if self._measure_on[0] else ""
            raise WorkerUnavailableError(f"No node of the cluster is ready{label}; the server's log says more.")

    async def close(self) -> None:
        """Leaves the cluster; the actors end when no server is left that speaks to them."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        opening = [item.opening for item in self._members.values() if item.opening is not None]
        for task in opening:
            task.cancel()
        if opening:
            await asyncio.wait(opening)
        await self._tell(self._ready(), "leave", self._server_id)
        await self._in_thread(self._disconnect)
        self._threads.shutdown(wait=False)

    async def compress(self, task: site_pb2.Assignment, on_event: OnEvent) -> site_pb2.Compressed:
        done = await self._perform(task, on_event)
        if not isinstance(done, site_pb2.Compressed):
            raise WorkerLostError(CRASHED, "The worker ended without a result.")
        return done

    async def inspect(self, task: site_pb2.Assignment, on_event: OnEvent) -> worker_pb2.InspectResult:
        done = await self._perform(task, on_event)
        if not isinstance(done, worker_pb2.InspectResult):
            raise WorkerLostError(CRASHED, "The worker ended without a result.")
        return done

    async def _perform(
        self, task: site_pb2.Assignment, on_event: OnEvent
    ) -> site_pb2.Compressed | worker_pb2.InspectResult:
        task_id = new_id()
        self._followed.add(task_id)  # a node stops what is not in here
        try:
            return await self._perform_as(task_id, task, on_event)
        finally:
            self._followed.discard(task_id)

    async def _perform_as(
        self, task_id: str, task: site_pb2.Assignment, on_event: OnEvent
    ) -> site_pb2.Compressed | worker_pb2.InspectResult:
        member = await self._begin(task_id, task, on_event)
        self._begun += 1
        member.tasks += 1
        logger.info("runs on node %s", member.address)
        if member.info is not None:
            where = worker_pb2.LogLine(severity="INFO", text=f"It runs on a node with {member.info.processor}.")
            on_event(worker_pb2.WorkerEvent(log=where))
        try:
            return result_of(await self._follow(member, task_id, on_event))
        except NodeGoneError as error:
            logger.warning("task %s: %s", task_id, error)
            raise WorkerLostError(CRASHED, str(error), own=False) from error
        except WorkerLostError as error:
            self._meter.worker_lost(error.reason)
            raise
        finally:
            member.tasks -= 1
            await uninterrupted(self._forget(task_id, [member]))

    async def _begin(self, task_id: str, task: site_pb2.Assignment, on_event: OnEvent) -> _Member:
        """Waits for a free slot. Raises WorkerUnavailableError where there is no node at all."""
        assignment = task.SerializeToString()
        asked: dict[str, _Member] = {}
        while True:
            await self.try_start()
            told = bool(asked)
            for member in self._order(measures=task.HasField("job")):
                asked[member.node_id] = member
                try:
                    began = await self._call(member, "begin", self._server_id, task_id, assignment)
                except asyncio.CancelledError:
                    await uninterrupted(self._forget(task_id, asked.values()))
                    raise
                except NodeGoneError:
                    continue
                if began:
                    await self._forget(task_id, [other for other in asked.values() if other is not member])
                    return member
            if not told:
                waits = job_service_pb2.Progress(stage=START_WORKER, message=WAITS_FOR_NODE)
                on_event(worker_pb2.WorkerEvent(progress=waits))
            await self._clock.sleep(RETRY_S)

    async def _follow(self, member: _Member, task_id: str, on_event: OnEvent) -> site_pb2.Ending:
        """Passes events on until the end. Raises NodeGoneError."""
        seen = 0
        while True:
            answer = await self._call(member, "news", task_id, seen)
            if answer is None:
                raise NodeGoneError(f"The node {member.address} knows nothing of the task any more.")
            news = site_pb2.News.FromString(answer)
            for event in news.events:
                on_event(event)
            seen += len(news.events)
            if news.HasField("ending"):
                return news.ending

    async def _forget(self, task_id: str, members: Iterable[_Member]) -> None:
        """These nodes need not wait for it: who does not hear of it learns so from what this server follows."""
        await self._tell(members, "forget", task_id)

    async def _tell(self, members: Iterable[_Member], method: str, name: str) -> None:
        """Tells nodes of something that they find out in any case, later."""

        async def tell(member: _Member) -> None:
            try:
                async with asyncio.timeout(TELL_TIMEOUT_S):
                    await self._ask(member.actor, method, name)
            except Exception as error:  # noqa: BLE001  # as the docstring says
                logger.debug("%s %s: %s was not told: %s", method, name, member.address, error)

        await asyncio.gather(*(tell(member) for member in members if member.actor is not None))

    def _order(self, *, measures: bool) -> list[_Member]:
        """The nodes that a task may run on, the best first; a look at a model leaves those that measure to jobs."""
        ready = [item for item in self._ready() if not measures or self._measures(item)]
        return sorted(ready, key=lambda item: (not measures and self._measures(item), item.tasks))

    def _ready(self) -> list[Any]:
        return [item for item in self._members.values() if item.actor is not None and item.info is not None]

    def _measures(self, member: _Member) -> bool:
        key, separator, value = self._measure_on
        if not key:
            return True
        return key in member.labels and (not separator or member.labels[key] == value)

    async def _call(self, member: _Member, method: str, *arguments: Any) -> Any:
        """Asks a node, again after a connection was lost. Raises NodeGoneError."""
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        while True:
            if self._members.get(member.node_id) is not member:
                raise NodeGoneError(f"The node {member.address} was lost.")
            actor = member.actor
            try:
                if actor is not None:
                    return await self._ask(actor, method, *arguments)
            except ActorUnavailableError:
                pass  # for the moment
            except RayActorError as error:
                self._drop(member)
                raise NodeGoneError(f"The node {member.address} was lost.") from error
            except RayTaskError:
                raise
            except Exception as error:  # noqa: BLE001  # the connection; the keeper makes it anew
                logger.debug("%s of %s: %s", method, member.address, error)
            await self._clock.sleep(RETRY_S)

    async def _ask(self, actor: Any, method: str, *arguments: Any) -> Any:
        reference = await self._in_thread(lambda: getattr(actor, method).remote(*arguments))
        answer = asyncio.wrap_future(reference.future())
        answer.add_done_callback(_seen)
        return await asyncio.shield(answer)  # Ray's client fails on an answer to what was cancelled

    async def _in_thread(self, function: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def _keep(self) -> None:
        """Knows the nodes, tells them that this server lives, and makes the connection anew when it was lost."""
        while True:
            await self._clock.sleep(self._lease_s / BEATS_PER_LEASE)
            try:
                async with asyncio.timeout(self._lease_s):
                    await self._look()
            except Exception as error:  # noqa: BLE001  # a cluster that is away comes back
                logger.warning("the cluster at %s does not answer: %s", self._address, _shown(error))
                for member in self._members.values():
                    member.actor = None
                await self._reconnect()
            now_s = self._clock.now_s()
            for member in list(self._members.values()):
                if now_s - member.heard_s > self._patience_s and member.opening is None:
                    logger.warning("node %s was not heard of for %g s", member.address, self._patience_s)
                    self._drop(member)

    async def _reconnect(self) -> None:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._in_thread(self._disconnect)
                await self._in_thread(self._connect)
        except Exception as error:  # noqa: BLE001  # tried again
            logger.debug("no connection: %s", error)

    async def _look(self) -> None:
        import ray

        found = {node["NodeID"]: node for node in await self._in_thread(ray.nodes) if node["Alive"]}
        for node_id, member in list(self._members.items()):
            if node_id not in found:
                self._drop(member)
        for node_id, node in found.items():
            if node["Resources"].get("CPU", 0) < self._settings.slots:
                continue  # the head of a cluster mostly runs nothing
            if node_id not in self._members:
                address = f"{node['NodeManagerHostname']} ({node_id[:8]})"
                self._members[node_id] = _Member(node_id, address, dict(node["Labels"]), self._clock.now_s())
            member = self._members[node_id]
            if member.actor is None and member.opening is None:
                member.opening = asyncio.create_task(self._open(member))
        await asyncio.gather(*(self._beat(member) for member in self._ready()))

    async def _beat(self, member: _Member) -> None:
        from ray.exceptions import ActorUnavailableError, RayActorError

        try:
            async with asyncio.timeout(self._lease_s / BEATS_PER_LEASE):
                await self._ask(member.actor, "beat", self._server_id, self._patience_s, list(self._followed))
            member.heard_s = self._clock.now_s()
        except ActorUnavailableError as error:  # for the moment, or its node was lost: Ray finds out
            logger.info("node %s: %s", member.address, _shown(error))
        except RayActorError as error:
            logger.warning("node %s: %s", member.address, _shown(error))
            self._drop(member)
        except TimeoutError:
            logger.debug("node %s is slow to answer", member.address)

    def _drop(self, member: _Member) -> None:
        """Its tasks end with NodeGoneError; if the node is still there it is opened anew."""
        if self._members.get(member.node_id) is member:
            del self._members[member.node_id]
            if member.opening is not None:
                member.opening.cancel()

    async def _open(self, member: _Member) -> None:
        """Finds or makes the node's actor."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                actor = await self._in_thread(lambda: self._actor_on(member.node_id))
                answer = await self._ask(actor, "open", self._server_id, self._patience_s)
            first = member.info is None
            member.info = site_pb2.NodeInfo.FromString(answer)
            member.heard_s, member.actor = self._clock.now_s(), actor
            if first:
                info = member.info
                logger.info("node %s: %s, sandbox level %d", member.address, info.processor, info.sandbox_level)
        except Exception as error:  # noqa: BLE001  # tried again
            logger.warning("node %s could not be opened: %s", member.address, _shown(error))
        finally:
            member.opening = None

    def _actor_on(self, node_id: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Servers of another version, or with other settings, have actors of their own.
        kind = hashlib.sha256(made_by() + repr(self._settings).encode()).hexdigest()[:16]
        return (
            ray.remote(Node)
            .options(
                name=f"{node_id}-{kind}",
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=self._settings.slots,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            )
            .remote(self._settings, node_id)
        )

    def _connect(self) -> None:
        import ray

        ray.init(self._address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)

    def _disconnect(self) -> None:
        import ray

        ray.shutdown()


def _seen(answer: asyncio.Future[Any]) -> None:
    """Nobody may have waited for it to its end."""
    if not answer.cancelled():
        answer.exception()


def _shown(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
