"""Random faults over a stream of uploads and jobs, and what must hold for all that.

    python tests/faults/campaign.py --kills 1000 [--seed 1] [--folder DIR] [--shared]

Kills (SIGKILL) a server, its workers and its clients at random moments, while the disk fills up and empties, blobs rot,
the clock is set by days and back, and workers cannot start. Then it takes all faults away and checks:

- every model and job that was acknowledged is there; every job has SUCCEEDED with the right result, once
- nothing failed, except jobs whose model rotted, which succeed when the file has been uploaded again, and jobs that
  were killed at each of their ten attempts, which are counted
- the database and all blobs are sound, besides those that were made to rot; no process and no folder is left

With --shared two servers are killed, on one PostgreSQL and one S3 bucket; there nothing rots.

Root may give the data folder a small file system of its own; without, disks do not fill up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))
sys.path.insert(0, str(Path(__file__).parent))
from fault_client import MAX_ATTEMPTS, content_of
from fault_tasks import BROKEN, result_of
from google.rpc import error_details_pb2
from modelpress_client import AsyncClient
from modelpress_client.errors import ModelpressError
from modelpress_protos.v1 import common_pb2, job_service_pb2, model_service_pb2, upload_service_pb2
from modelpress_protos.v1.job_service_pb2_grpc import JobServiceStub
from modelpress_protos.v1.model_service_pb2_grpc import ModelServiceStub
from modelpress_protos.v1.upload_service_pb2_grpc import UploadServiceStub
from modelpress_server.scrub import Scrub
from postgres_server import postgres_server
from s3_server import BUCKET, environment, s3_server
from shared_stores import new_database

HERE = Path(__file__).parent
DISK_BYTES = 128 * 1024**2
CLIENTS = 3
DAY_S = 24 * 3600
# What has ended is deleted when it is so old: then its blobs may go at once.
DELETE_AFTER_S = 65.0
PATIENCE_S = 600.0
# A worker lives for so long, and so long one is waited for.
TASK_S = 0.2
WORKER_PATIENCE_S = 2.0
NO_ENVIRONMENT: Mapping[str, str] = {}

S = job_service_pb2
M = model_service_pb2


@dataclass
class Job:
    """A job that was acknowledged."""

    seed: int
    model: str
    name: str
    since_s: float
    verified: bool = False


@dataclass
class Outcome:
    """What was done and what was seen; `violations` must be empty."""

    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return sum(count for name, count in self.faults.items() if name.startswith("kill"))

    def __str__(self) -> str:
        lines = [f"kills: {self.kills}", f"faults: {dict(self.faults)}", f"seen: {dict(self.seen)}"]
        return "\n".join([*lines, f"violations: {len(self.violations)}", *self.violations[:20]])


class Process:
    """A child process that is started again and again."""

    def __init__(self, command: Callable[[], list[str]], log: Path, environment: Mapping[str, str]) -> None:
        self._command = command
        self._environment = {**os.environ, **environment}
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> asyncio.StreamReader:
        """Starts it; what it prints."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(), stdout=asyncio.subprocess.PIPE, stderr=log, env=self._environment
            )
        assert self._process.stdout is not None
        return self._process.stdout

    async def kill(self) -> None:
        """SIGKILL, and its end."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def terminate(self) -> int:
        """SIGTERM; its exit status."""
        assert self._process is not None
        self._process.terminate()
        return await self._process.wait()


class Campaign:
    """One campaign in `folder`; `own_disk`: the data folder has a small file system of its own.

    `shared`: the environment of servers that share their stores; empty: there is one server, with a data folder.
    """

    def __init__(
        self, folder: Path, *, seed: int, own_disk: bool, pause_s: float, shared: Mapping[str, str] = NO_ENVIRONMENT
    ) -> None:
        self._shared = bool(shared)
        self._random = random.Random(seed)
        self._folder = folder
        self._data_dir = folder / "disk" / "data"
        self._data_dir.mkdir(parents=True, mode=0o700)
        (folder / "files").mkdir()
        self._clock_file = folder / "clock"
        self._own_disk = own_disk
        self._pause_s = pause_s
        self._address = _free_address()
        self._server = Process(self._server_command, folder / "server.log", shared)
        # One that nobody calls: it runs jobs of the first one, and sweeps at times.
        self._other = Process(self._other_command, folder / "other.log", shared)
        self._clients = [Process(self._client_command, folder / "client.log", {}) for _ in range(CLIENTS)]
        self._next_seed = seed * 1_000_000
        self._models: dict[str, int] = {}
        self._jobs: dict[str, Job] = {}
        self._rotten: set[str] = set()
        self._readers: set[asyncio.Task[None]] = set()
        self.outcome = Outcome()

    async def run(self, kills: int) -> Outcome:
        """Runs until so many processes were killed, then lets all come to rest and checks."""
        try:
            return await self._run(kills)
        finally:
            for process in (self._server, self._other, *self._clients):
                await process.kill()

    async def _run(self, kills: int) -> Outcome:
        await self._start_server(self._server)
        if self._shared:
            await self._start_server(self._other)
        for client in self._clients:
            await self._start_client(client)
        async with grpc.aio.insecure_channel(self._address) as channel:
            self._stubs = (JobServiceStub(channel), ModelServiceStub(channel), UploadServiceStub(channel))
            verifying = asyncio.create_task(self._verify_regularly())
            while self.outcome.kills < kills:
                await asyncio.sleep(self._random.random() * self._pause_s)
                before = self.outcome.kills
                await self._fault()
                if self.outcome.kills // 50 > before // 50:
                    print(f"{time.strftime('%H:%M:%S')} {self.outcome}", file=sys.stderr, flush=True)
            self._undo()
            for client in self._clients:
                await client.kill()
            await asyncio.gather(*self._readers)
            verifying.cancel()
            await asyncio.wait([verifying])
            try:
                await asyncio.wait_for(self._verify_all(), PATIENCE_S)
            except TimeoutError:
                left = [job.name for job in self._jobs.values() if not job.verified]
                self._violated(f"{len(left)} jobs did not end within {PATIENCE_S:g} s, the first is {left[:1]}")
            await self._heal()
        for server in (self._server, self._other) if self._shared else (self._server,):
            status = await server.terminate()
            if status != 0:
                self._violated(f"the server ended with {status} at SIGTERM")
        self._check_what_is_left()
        return self.outcome

    # Faults

    async def _fault(self) -> None:
        faults: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (25, self._kill_server),
            (15 if self._shared else 0, self._kill_other),
            (25, self._kill_worker),
            (10, self._kill_zygote),
            (25, self._kill_client),
            (0 if self._shared else 4, self._rot_a_blob),
            (4, self._set_the_clock),
            (3, self._break_workers),
            (4 if self._own_disk else 0, self._fill_the_disk),
        ]
        (fault,) = self._random.choices([fault for _, fault in faults], [weight for weight, _ in faults])
        await fault()

    async def _kill_server(self) -> None:
        await self._server.kill()
        self.outcome.faults["kill server"] += 1
        await self._start_server(self._server)

    async def _kill_other(self) -> None:
        await self._other.kill()
        self.outcome.faults["kill other server"] += 1
        await self._start_server(self._other)

    async def _kill_worker(self) -> None:
        """One that was forked, at some moment of its task."""
        deadline_s = time.monotonic() + WORKER_PATIENCE_S
        while time.monotonic() < deadline_s:
            workers = [worker for zygote in self._zygotes() for worker in _children(zygote)]
            if workers:
                await asyncio.sleep(self._random.random() * TASK_S)
                self._kill_one_of(workers, "kill worker")
                return
            await asyncio.sleep(0.02)

    async def _kill_zygote(self) -> None:
        """The process that workers are forked from, with what it has forked."""
        self._kill_one_of(self._zygotes(), "kill zygote")

    def _zygotes(self) -> list[psutil.Process]:
        servers = (self._server, self._other) if self._shared else (self._server,)
        return [child for server in servers for child in _children(server.pid) if _is_zygote(child)]

    def _kill_one_of(self, processes: list[psutil.Process], fault: str) -> None:
        if processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._random.choice(processes).kill()
                self.outcome.faults[fault] += 1

    async def _kill_client(self) -> None:
        client = self._random.choice(self._clients)
        await client.kill()
        self.outcome.faults["kill client"] += 1
        await self._start_client(client)

    async def _rot_a_blob(self) -> None:
        blobs = [path for path in (self._data_dir / "blobs").glob("??/*") if path.name not in self._rotten]
        if not blobs:
            return
        path = self._random.choice(blobs)
        with contextlib.suppress(OSError):
            path.chmod(0o600)
            with path.open("r+b") as file:
                byte = file.read(1)
                file.seek(0)
                self._rotten.add(path.name)
                file.write(bytes([byte[0] ^ 1]))
            path.chmod(0o444)
            self.outcome.faults["rot"] += 1

    async def _set_the_clock(self) -> None:
        self._clock_file.write_text(str(self._random.choice([-2, 2, 30]) * DAY_S), "ascii")
        self.outcome.faults["clock"] += 1
        self._later(self._random.uniform(0.5, 4.0), self._clock_file)

    async def _break_workers(self) -> None:
        with contextlib.suppress(OSError):
            (self._data_dir / BROKEN).touch()
            self.outcome.faults["workers cannot start"] += 1
            self._later(self._random.uniform(0.5, 3.0), self._data_dir / BROKEN)

    async def _fill_the_disk(self) -> None:
        filler = self._folder / "disk" / "filler"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(64 * 1024)):
                pass
        self.outcome.faults["disk full"] += 1
        self._later(self._random.uniform(0.5, 3.0), filler)

    def _later(self, delay_s: float, path: Path) -> None:
        asyncio.get_running_loop().call_later(delay_s, lambda: path.unlink(missing_ok=True))

    def _undo(self) -> None:
        for path in (self._clock_file, self._data_dir / BROKEN, self._folder / "disk" / "filler"):
            path.unlink(missing_ok=True)

    # Processes

    def _server_command(self) -> list[str]:
        return self._serve(self._address, self._data_dir)

    def _other_command(self) -> list[str]:
        return self._serve("127.0.0.1:0", self._data_dir.with_name("other"))

    def _serve(self, address: str, data_dir: Path) -> list[str]:
        return [sys.executable, str(HERE / "fault_server.py"), address, str(data_dir), str(self._clock_file)]

    def _client_command(self) -> list[str]:
        self._next_seed += 1000
        files = str(self._folder / "files")
        return [sys.executable, str(HERE / "fault_client.py"), self._address, files, str(self._next_seed)]

    async def _start_server(self, server: Process) -> None:
        while True:
            output = await server.start()
            if (await output.readline()).startswith(b"listening"):
                return
            # The port of the dead server may be taken for a moment still.
            self.outcome.seen["server did not start"] += 1
            await asyncio.sleep(0.2)

    async def _start_client(self, client: Process) -> None:
        task = asyncio.create_task(self._read(await client.start()))
        self._readers.add(task)
        task.add_done_callback(self._readers.discard)

    async def _read(self, output: asyncio.StreamReader) -> None:
        while (line := await output.readline()).endswith(b"\n"):
            said = json.loads(line)
            if "error" in said:
                self.outcome.seen[f"client told {said['error'].split(':')[0]}"] += 1
            elif "job" in said:
                self._jobs[said["job"]] = Job(said["seed"], said["model"], said["job"], time.monotonic())
            else:
                self._models[said["model"]] = said["seed"]

    # What must hold

    def _violated(self, what: str) -> None:
        self.outcome.violations.append(what)

    async def _call(self, method: Any, request: Any) -> Any:
        """The answer, however long the server is away or short of something. Raises AioRpcError for other errors."""
        while True:
            try:
                return await method(request, timeout=30.0)
            except grpc.aio.AioRpcError as error:
                codes = grpc.StatusCode
                if error.code() not in (codes.UNAVAILABLE, codes.DEADLINE_EXCEEDED, codes.RESOURCE_EXHAUSTED):
                    raise
                await asyncio.sleep(0.1)

    async def _verify_regularly(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            for job in list(self._jobs.values()):
                if not job.verified and time.monotonic() - job.since_s > DELETE_AFTER_S:
                    await self._verify(job, delete=True)

    async def _verify_all(self) -> None:
        while left := [job for job in self._jobs.values() if not job.verified]:
            for job in left:
                await self._verify(job, delete=False)
            await asyncio.sleep(0.5)
        jobs, models, _ = self._stubs
        for name in self._models:
            if not any(job.model == name for job in self._jobs.values()):
                try:
                    await self._call(models.GetModel, M.GetModelRequest(name=name))
                    self.outcome.seen["models without a job"] += 1
                except grpc.aio.AioRpcError as error:
                    self._violated(f"{name} was acknowledged and is lost: {error.details()}")
        labels = Counter[str]()
        token = ""
        while True:
            request = S.ListJobsRequest(parent="projects/default", page_size=500, page_token=token)
            page = await self._call(jobs.ListJobs, request)
            labels.update(job.labels["seed"] for job in page.jobs)
            token = page.next_page_token
            if not token:
                break
        for seed, count in labels.items():
            if count > 1:
                self._violated(f"the job of seed {seed} is there {count} times")

    async def _verify(self, job: Job, *, delete: bool) -> None:
        jobs, models, _ = self._stubs
        try:
            found = await self._call(jobs.GetJob, S.GetJobRequest(name=job.name))
        except grpc.aio.AioRpcError as error:
            self._violated(f"{job.name} was acknowledged and is lost: {error.details()}")
            job.verified = True
            return
        if not found.HasField("end_time"):
            return
        await self._judge(job, found)
        job.verified = True
        if delete and found.state == S.JOB_STATE_SUCCEEDED:
            with contextlib.suppress(grpc.aio.AioRpcError):  # deleted, and the answer was lost
                await self._call(jobs.DeleteJob, S.DeleteJobRequest(name=job.name))
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self._call(models.DeleteModel, M.DeleteModelRequest(name=job.model))
            self.outcome.seen["deleted"] += 1

    async def _judge(self, job: Job, found: S.Job) -> None:
        state = S.JobState.Name(found.state).removeprefix("JOB_STATE_")
        self.outcome.seen[state] += 1
        self.outcome.seen[f"attempts {found.attempt}"] += 1
        model_sha256 = hashlib.sha256(content_of(job.seed)).hexdigest()
        if found.state != S.JOB_STATE_SUCCEEDED:
            if found.attempt >= MAX_ATTEMPTS and _was_killed(found):
                self.outcome.seen["killed at every attempt"] += 1
            elif model_sha256 not in self._rotten:
                self._violated(f"{job.name} is {state}: {found.error.message}")
            return
        results = [item for item in found.artifacts if item.kind == S.Artifact.KIND_OPTIMIZED_MODEL]
        reports = [item for item in found.artifacts if item.kind == S.Artifact.KIND_REPORT_JSON]
        if (len(results), len(reports)) != (1, 1):
            self._violated(f"{job.name} has {len(results)} results and {len(reports)} reports")
            return
        await self._compare(job.name, results[0].files[0].digest, result_of(content_of(job.seed)))

    async def _compare(self, name: str, digest: common_pb2.Digest, expected: bytes) -> None:
        if digest.sha256 != hashlib.sha256(expected).digest():
            self._violated(f"{name} has a wrong result")
            return
        if digest.sha256.hex() in self._rotten:
            self.outcome.seen["rotten results"] += 1
            return
        try:
            if await self._call(self._download, digest) != expected:
                self._violated(f"the result of {name} is not what its digest says")
        except grpc.aio.AioRpcError as error:
            if digest.sha256.hex() not in self._rotten:  # it may have rotted just now
                self._violated(f"the result of {name} is lost: {error.details()}")

    async def _download(self, digest: common_pb2.Digest, timeout: float) -> bytes:  # noqa: ASYNC109  # as a stub
        request = upload_service_pb2.ReadBlobRequest(parent="projects/default", digest=digest)
        stream = self._stubs[2].ReadBlob(request, timeout=timeout)
        return b"".join([response.data async for response in stream])

    async def _heal(self) -> None:
        """What rotted works again once its file was uploaded again."""
        seeds = {hashlib.sha256(content_of(job.seed)).hexdigest(): job.seed for job in self._jobs.values()}
        async with AsyncClient(self._address) as client:
            for name in sorted(self._rotten & seeds.keys())[:20]:
                path = self._folder / "healed.onnx"
                path.write_bytes(content_of(seeds[name]))
                Scrub(self._data_dir).run(set_aside=True, on_progress=lambda _: None)
                try:
                    job = await client.compress(await client.upload(path), labels={"seed": f"{seeds[name]}-again"})
                    done = Job(seeds[name], "", job.name, 0.0)
                    while not done.verified:
                        await self._verify(done, delete=False)
                        await asyncio.sleep(0.2)
                    self.outcome.seen["healed"] += 1
                except ModelpressError as error:
                    self._violated(f"the rotten model of seed {seeds[name]} does not heal: {error}")

    def _check_what_is_left(self) -> None:
        if not self._shared:
            found = Scrub(self._data_dir).run(set_aside=False, on_progress=lambda _: None)
            self.outcome.seen["blobs"] = found.blobs
            self.outcome.violations += [f"damaged: {name}" for name in found.damaged if name not in self._rotten]
            self.outcome.violations += [f"missing: {name}" for name in found.missing if name not in self._rotten]
            self.outcome.violations += [*found.database, *found.uploads]
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self._data_dir.parent) in part for part in process.info["cmdline"] or ()):
                self._violated(f"process {process.pid} is left: {process.info['cmdline'][:3]}")
        left = list(self._data_dir.parent.glob("*/work/*"))
        if left:
            held = sorted(path.name for path in left[0].glob("*"))
            self._violated(f"{len(left)} working folders are left, the first is {left[0]} with {held}")


def _was_killed(job: S.Job) -> bool:
    info = error_details_pb2.ErrorInfo()
    return any(detail.Unpack(info) and info.reason == "WORKER_CRASHED" for detail in job.error.details)


def _children(process: int | psutil.Process) -> list[psutil.Process]:
    try:
        return (psutil.Process(process) if isinstance(process, int) else process).children()
    except psutil.NoSuchProcess:
        return []


def _is_zygote(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "modelpress_server.worker.zygote" in process.cmdline()
    return False


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Gives `folder`/disk a file system of DISK_BYTES; whether this user may."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def run_campaign(folder: Path, *, kills: int, seed: int, pause_s: float, shared: bool = False) -> Outcome:
    """A whole campaign in an empty folder. `shared`: on servers that share their stores. Raises NotHereError."""
    with small_disk(folder) as own_disk, shared_servers(shared) as given:
        campaign = Campaign(folder, seed=seed, own_disk=own_disk, pause_s=pause_s, shared=given)
        return asyncio.run(campaign.run(kills))


@contextlib.contextmanager
def shared_servers(wanted: bool) -> Iterator[Mapping[str, str]]:
    """A PostgreSQL and a bucket, and the environment of a server that uses them; an empty one if not wanted."""
    if not wanted:
        yield {}
        return
    with postgres_server() as server, s3_server() as endpoint:
        stores = {"COMPRESS_SERVER_DATABASE": new_database(server), "COMPRESS_SERVER_BLOBS": f"s3://{BUCKET}/faults"}
        yield {**stores, **environment(endpoint)}


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def main() -> None:
    """Prints what was done and seen; exits with 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause", type=float, default=1.0, help="longest pause between two faults, in seconds")
    parser.add_argument("--folder", type=Path, help="an empty folder; by default a temporary one")
    parser.add_argument("--shared", action="store_true", help="two servers on one PostgreSQL and one bucket")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    outcome = run_campaign(
        folder, kills=arguments.kills, seed=arguments.seed, pause_s=arguments.pause, shared=arguments.shared
    )
    print(outcome)
    sys.exit(1 if outcome.violations else 0)


if __name__ == "__main__":
    main()
