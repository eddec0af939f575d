"""What many clients at once get from a server, and how many jobs it ends in a minute.

    python benchmarks/service_load.py [--clients 200] [--minutes 10] [--job-minutes 2] [--workers 1 2]

Clients: so many, in four processes, each again and again: uploads a model of its own (about 100 kB), has it compressed
(`lossless`), watches the job, asks for it, for the model and for lists meanwhile, and downloads the result; whoever
waits for longer than about `--patience-s` cancels. They begin one by one within that time, and end so. Told are the
times of unary calls by method as the clients see them, the server's memory and processor time, and refusals by their
reason: a failed call without one is a fault. Beside each question to the server goes one to a bare gRPC server, which
answers with the same message and does nothing: its times are what machine, gRPC and clients cost under the same load.

Jobs: the queue is never empty, and each job has a model that was never seen. Raw is the same compression without a
server, in as many processes as the server has workers, each with one model after the other; the imports are done.

Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import grpc.aio
import psutil
from google.rpc import error_details_pb2, status_pb2
from modelpress_protos.recipe import from_dict
from modelpress_protos.v1 import (
    common_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
    upload_service_pb2,
    upload_service_pb2_grpc,
)
from server_process import running_server

MNIST = Path(__file__).parent.parent / "examples" / "mnist"
PROCESSES = 4
PROJECTS = 8
QUESTION_S = 1.0  # each client asks something so often while it waits
MAX_PAUSE_S = 10.0
BARE = "on a bare server"
ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
_Answer = TypeVar("_Answer")


class Variants:
    """Models that are alike but for one name: each has a digest of its own, and none was seen before."""

    def __init__(self, path: Path) -> None:
        self._content = path.read_bytes()
        self._mark = b"variant-" + b"0" * 32
        if self._mark not in self._content:
            raise SystemExit(f"{path} was not written by this script")

    def next(self) -> bytes:
        return self._content.replace(self._mark, b"variant-" + uuid.uuid4().hex.encode())


def write_model(path: Path) -> None:
    """The example's network as ONNX, with a mark to vary."""
    import onnx
    from modelpress_compression import load

    load(MNIST / "model_scripted.pt", inputs=["x:float32[batch,1,28,28]"]).save(path)
    model = onnx.load(path)
    model.doc_string = "variant-" + "0" * 32
    onnx.save(model, path)


@dataclass
class Figures:
    """What one process of clients saw. `times_s`: of unary calls, by method; `refusals`: by code and reason."""

    times_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refusals: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    downloads: int = 0

    def add(self, other: dict[str, Any]) -> None:
        for method, times_s in other["times_s"].items():
            self.times_s[method] += times_s
        self.refusals.update(other["refusals"])
        self.ends.update(other["ends"])
        self.downloads += other["downloads"]


class RefusedError(Exception):
    """The server refused; `pause_s`: what it asks to wait before the next try."""

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.pause_s = pause_s


class LoadClient:
    """One client of the server at the end of `channel`."""

    def __init__(self, channel: grpc.aio.Channel, bare: grpc.aio.Channel, project: str, figures: Figures) -> None:
        self._uploads = upload_service_pb2_grpc.UploadServiceStub(channel)
        self._models = model_service_pb2_grpc.ModelServiceStub(channel)
        self._jobs = job_service_pb2_grpc.JobServiceStub(channel)
        self._info = server_service_pb2_grpc.ServerServiceStub(channel)
        self._bare = job_service_pb2_grpc.JobServiceStub(bare)
        self._parent = f"projects/{project}"
        self._figures = figures

    async def call(self, method: str, answer: Awaitable[_Answer]) -> _Answer:
        """Waits for a unary call and notes its time, or how it was refused. Raises RefusedError."""
        began_s = time.perf_counter()
        with self.noted(method):
            found = await answer
            self._figures.times_s[method].append(time.perf_counter() - began_s)
            return found

    @contextlib.contextmanager
    def noted(self, method: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            reason, pause_s = reason_of(error)
            self._figures.refusals[f"{method}: {error.code().name} {reason}"] += 1
            raise RefusedError(pause_s) from error

    async def upload(self, content: bytes) -> common_pb2.Digest:
        digest = common_pb2.Digest(sha256=hashlib.sha256(content).digest(), size_bytes=len(content))
        find = upload_service_pb2.FindMissingBlobsRequest(parent=self._parent, digests=[digest])
        await self.call("FindMissingBlobs", self._uploads.FindMissingBlobs(find))
        create = upload_service_pb2.CreateUploadRequest(parent=self._parent, digest=digest)
        upload = await self.call("CreateUpload", self._uploads.CreateUpload(create))
        with self.noted("WriteUpload"):
            stream = self._uploads.WriteUpload()
            await stream.write(upload_service_pb2.WriteUploadRequest(
                name=upload.name, data=content, crc32c=google_crc32c.value(content), finish_write=True
            ))  # fmt: skip
            await stream.done_writing()
            async for _ in stream:
                pass
        return digest

    async def model(self, content: bytes) -> Any:
        digest = await self.upload(content)
        model = model_service_pb2.Model(files=[common_pb2.FileEntry(path="model.onnx", digest=digest)])
        request = model_service_pb2.CreateModelRequest(parent=self._parent, model=model)
        return await self.call("CreateModel", self._models.CreateModel(request))

    async def job(self, model: Any, recipe: Any) -> Any:
        job = job_service_pb2.Job(spec=job_service_pb2.JobSpec(model=model.name, recipe=recipe))
        request = job_service_pb2.CreateJobRequest(parent=self._parent, job=job, request_id=str(uuid.uuid4()))
        return await self.call("CreateJob", self._jobs.CreateJob(request))

    async def ended(self, job: Any) -> Any:
        """The job once its watch says that it has ended."""
        with self.noted("WatchJob"):
            async for _ in self._jobs.WatchJob(job_service_pb2.WatchJobRequest(name=job.name)):
                pass
        return await self.call("GetJob", self._jobs.GetJob(job_service_pb2.GetJobRequest(name=job.name)))

    async def download(self, job: Any) -> None:
        digest = job.artifacts[0].files[0].digest
        with self.noted("ReadBlob"):
            request = upload_service_pb2.ReadBlobRequest(parent=self._parent, digest=digest)
            size_bytes = sum([len(answer.data) async for answer in self._uploads.ReadBlob(request)])
        if size_bytes != digest.size_bytes:
            raise SystemExit(f"a download of {size_bytes} bytes instead of {digest.size_bytes}")
        self._figures.downloads += 1

    async def questions(self, model: Any, job: Any, chance: random.Random) -> None:
        """One after the other, until it is cancelled."""
        asked = (
            ("GetJob", lambda: self._jobs.GetJob(job_service_pb2.GetJobRequest(name=job.name))),
            ("GetModel", lambda: self._models.GetModel(model_service_pb2.GetModelRequest(name=model.name))),
            ("ListJobs", lambda: self._jobs.ListJobs(
                job_service_pb2.ListJobsRequest(parent=self._parent, page_size=20))),
            ("GetServerInfo", lambda: self._info.GetServerInfo(server_service_pb2.GetServerInfoRequest())),
        )  # fmt: skip
        while True:
            for method, ask in asked:
                await asyncio.sleep(QUESTION_S * chance.uniform(0.5, 1.5))
                with contextlib.suppress(RefusedError):
                    await self.call(method, ask())
                await self.call(BARE, self._bare.GetJob(job_service_pb2.GetJobRequest(name=job.name)))

    async def round(self, content: bytes, recipe: Any, patience_s: float, chance: random.Random) -> None:
        """Upload, compress, watch, download. Raises RefusedError."""
        model = await self.model(content)
        job = await self.job(model, recipe)
        questions = asyncio.create_task(self.questions(model, job, chance))
        try:
            async with asyncio.timeout(patience_s):
                job = await self.ended(job)
        except TimeoutError:
            cancel = job_service_pb2.CancelJobRequest(name=job.name)
            job = await self.call("CancelJob", self._jobs.CancelJob(cancel))
        finally:
            questions.cancel()
            await asyncio.wait([questions])
        state = job_service_pb2.JobState.Name(job.state).removeprefix("JOB_STATE_")
        self._figures.ends[state] += 1
        if state == "SUCCEEDED":
            await self.download(job)

    async def repeat(self, variants: Variants, recipe: Any, patience_s: float, until_s: float) -> None:
        chance = random.Random()
        begins_s = chance.uniform(0, patience_s)
        await asyncio.sleep(begins_s)
        until_s -= patience_s - begins_s  # they end one by one as well
        while (left_s := until_s - time.monotonic()) > 0:
            try:
                await self.round(
                    variants.next(), recipe, min(patience_s * chance.uniform(0.5, 1.5), max(left_s, 1.0)), chance
                )
            except RefusedError as refused:
                await asyncio.sleep(min(refused.pause_s, MAX_PAUSE_S) * chance.uniform(1.0, 1.5))


def reason_of(error: grpc.aio.AioRpcError) -> tuple[str, float]:
    """The reason of a typed error, and the pause that it asks for."""
    reason, pause_s = "WITHOUT A REASON", 1.0
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for packed in status_pb2.Status.FromString(value).details:
                info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                if packed.Unpack(info):
                    reason = info.reason
                if packed.Unpack(retry):
                    pause_s = retry.retry_delay.ToMilliseconds() / 1000
    return reason, pause_s


def preset(name: str) -> Any:
    from modelpress_compression import Recipe

    return from_dict(Recipe.preset(name).to_dict())


async def be_clients(options: argparse.Namespace) -> None:
    """One process of them: prints what it saw, as JSON."""
    figures, recipe = Figures(), preset("lossless")
    variants, until_s = Variants(options.model), time.monotonic() + 60 * options.minutes
    async with contextlib.AsyncExitStack() as stack:
        repeats = []
        for number in range(options.clients):
            # As many clients have a connection each.
            ends = [grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
                    for address in (options.address, options.bare)]  # fmt: skip
            channel, bare = [await stack.enter_async_context(end) for end in ends]
            client = LoadClient(channel, bare, f"load-{number % PROJECTS}", figures)
            repeats.append(client.repeat(variants, recipe, options.patience_s, until_s))
        await asyncio.gather(*repeats)
    print(json.dumps({**vars(figures), "times_s": figures.times_s}))


class BareJobs(job_service_pb2_grpc.JobServiceServicer):
    """Answers, and does nothing."""

    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return job_service_pb2.Job(name=request.name)


async def be_bare() -> None:
    """Serves until stdin ends."""
    server = grpc.aio.server()
    job_service_pb2_grpc.add_JobServiceServicer_to_server(BareJobs(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def itself(*arguments: str) -> list[str]:
    return [sys.executable, __file__, *arguments]


def load_phase(options: argparse.Namespace, model: Path, folder: Path, workers: int) -> None:
    """Prints the table of calls."""
    figures = Figures()
    with (
        running_server(folder / "load", "--workers", str(workers), *options.server_option) as server,
        subprocess.Popen(itself("--role", "bare"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare,
    ):
        server.wait_for_warm_worker()
        assert bare.stdout is not None
        before_mib = rss_mib(server.process.pid, "VmRSS")
        before_s = sum(psutil.Process(server.process.pid).cpu_times()[:2])
        arguments = ["--role", "clients", "--model", str(model), "--address", server.address, "--minutes",
                     str(options.minutes), "--patience-s", str(options.patience_s), "--bare",
                     bare.stdout.readline().strip()]  # fmt: skip
        shares = [len(range(number, options.clients, PROCESSES)) for number in range(PROCESSES)]
        clients = [
            subprocess.Popen(itself(*arguments, "--clients", str(share)), stdout=subprocess.PIPE, text=True)
            for share in shares if share
        ]  # fmt: skip
        for process in clients:
            output, _ = process.communicate()
            figures.add(json.loads(output))
        peak_mib = rss_mib(server.process.pid, "VmHWM")
        used_s = sum(psutil.Process(server.process.pid).cpu_times()[:2]) - before_s
        bare.communicate()
    print(f"\n{options.clients} clients for {options.minutes:g} min, {workers} worker(s)\n")
    print("| call | number | p50 ms | p99 ms |\n|---|---:|---:|---:|")
    everything = [time_s for method, times_s in figures.times_s.items() if method != BARE for time_s in times_s]
    for method, times_s in (*sorted(figures.times_s.items()), ("all but the bare ones", everything)):
        print(f"| {method} | {len(times_s)} | {percentile(times_s, 50):.1f} | {percentile(times_s, 99):.1f} |")
    refused = ", ".join(f"{number} x {what}" for what, number in sorted(figures.refusals.items())) or "none"
    print(f"\nRefusals: {refused}")
    print(f"Jobs: {dict(figures.ends)}; downloads: {figures.downloads}")
    print(f"Processor time of the server: {used_s:.1f} s, {1000 * used_s / len(everything):.1f} ms a unary call")
    print(f"Memory of the server: {before_mib:.0f} MiB before, {peak_mib:.0f} MiB at most (RSS)", flush=True)


def rss_mib(pid: int, name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text("ascii"))
    return int(found[1]) / 1024 if found else 0.0


def percentile(times_s: Iterable[float], share: int) -> float:
    """Of times in seconds, in milliseconds."""
    ordered = sorted(times_s)
    return 1000 * ordered[min(len(ordered) * share // 100, len(ordered) - 1)] if ordered else float("nan")


async def feed(address: str, variants: Variants, recipe: Any, at_once: int, minutes: float) -> tuple[int, list[float]]:
    """Jobs that ended well within the time, and how long each ran, in seconds."""
    figures = Figures()
    async with grpc.aio.insecure_channel(address) as channel:
        client = LoadClient(channel, channel, "jobs", figures)
        ends: list[tuple[float, float]] = []
        begun = asyncio.Event()

        async def one() -> None:
            while True:
                job = await client.ended(await client.job(await client.model(variants.next()), recipe))
                if job.state != job_service_pb2.JOB_STATE_SUCCEEDED:
                    raise SystemExit(f"a job did not succeed: {job}")
                ran_s = (job.end_time.ToMicroseconds() - job.start_time.ToMicroseconds()) / 1e6
                ends.append((time.monotonic(), ran_s))
                begun.set()

        feeding = [asyncio.create_task(one()) for _ in range(at_once)]
        first = asyncio.create_task(begun.wait())
        await asyncio.wait([first, *feeding], return_when=asyncio.FIRST_COMPLETED)
        began_s = time.monotonic()  # the first has ended: from here on the workers are always busy
        await asyncio.wait(feeding, timeout=60 * minutes, return_when=asyncio.FIRST_EXCEPTION)
        for task in feeding:
            task.cancel()
        results = await asyncio.gather(*feeding, return_exceptions=True)
        for result in results:
            if isinstance(result, (Exception, SystemExit)):
                raise result
    within = [ran_s for at_s, ran_s in ends if at_s > began_s]
    return len(within), within


def be_raw(options: argparse.Namespace) -> None:
    """Compresses one model after the other: prints how many in the time, after the first."""
    from modelpress_compression import Recipe, compress, load
    from modelpress_server.worker import tasks

    tasks.preload()
    variants, recipe = Variants(options.model), Recipe.preset(options.preset)
    until_s, count = None, 0
    while until_s is None or time.monotonic() < until_s:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "model.onnx"
            path.write_bytes(variants.next())
            result = compress(load(path), recipe, work_directory=Path(name))
            (Path(name) / "output").mkdir()
            result.write(Path(name) / "output")
        if until_s is None:
            until_s = time.monotonic() + 60 * options.minutes
        else:
            count += 1
    print(count)


def jobs_phase(options: argparse.Namespace, model: Path, folder: Path, name: str, workers: int) -> None:
    """Prints a row."""
    minutes = options.job_minutes
    raw_arguments = ("--role", "raw", "--model", str(model), "--minutes", str(minutes), "--preset", name)
    processes = [subprocess.Popen(itself(*raw_arguments), stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    raw = sum(int(process.communicate()[0]) for process in processes) / minutes
    with running_server(folder / f"{name}-{workers}", "--workers", str(workers), *options.server_option) as server:
        server.wait_for_warm_worker()
        feeding = feed(server.address, Variants(model), preset(name), workers + 2, minutes)
        count, ran_s = asyncio.run(feeding)
    middle_s = statistics.median(ran_s) if ran_s else float("nan")
    share = count / minutes / raw if raw else float("nan")
    print(f"| {name} | {workers} | {count / minutes:.1f} | {raw:.1f} | {share:.0%} | {middle_s:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Many clients of one server, and its jobs a minute.")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10.0, help="for which the clients call; 0: leave them out")
    parser.add_argument("--patience-s", type=float, default=30.0, help="after which a client cancels its job")
    parser.add_argument("--job-minutes", type=float, default=2.0, help="for each row of jobs; 0: leave them out")
    parser.add_argument("--presets", nargs="*", default=["lossless", "default"])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--server-option", nargs="*", default=[], help="further words for the server's command line")
    parser.add_argument("--role", choices=("all", "clients", "bare", "raw"), default="all", help=argparse.SUPPRESS)
    for name in ("--address", "--bare", "--preset"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "clients":
        asyncio.run(be_clients(options))
    elif options.role == "bare":
        asyncio.run(be_bare())
    elif options.role == "raw":
        be_raw(options)
    else:
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """All phases."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model.onnx"
        write_model(model)
        print(f"The model has {model.stat().st_size / 1000:.0f} kB.")
        if options.job_minutes:
            print(
                "\n| preset | workers | jobs a minute | raw | share | a job runs, s |\n|---|---:|---:|---:|---:|---:|"
            )
            for preset_name in options.presets:
                for workers in options.workers:
                    jobs_phase(options, model, folder, preset_name, workers)
        if options.minutes:
            load_phase(options, model, folder, max(options.workers))


if __name__ == "__main__":
    main()
