"""Traces, as a receiver of OTLP on 127.0.0.1 gets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from modelpress_protos.v1 import job_service_pb2
from modelpress_server.config import Settings, SettingsError
from modelpress_server.observation.tracer import trace_parent
from server_harness import DEFAULTS, PROJECT, Running, Serve

otlp_receiver = pytest.importorskip("otlp_receiver", reason="pip install 'modelpress[traces]'")
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = f"00-{TRACE}-{SPAN}-01"


async def traced_job(running: Running, sent: str = SENT, **script: str) -> Any:
    """A job that a client makes within a trace of its own."""
    model = await running.client.model(**script)
    job = job_service_pb2.Job(spec=job_service_pb2.JobSpec(model=model.name))
    request = job_service_pb2.CreateJobRequest(parent=PROJECT, job=job)
    return await running.client.jobs.CreateJob(request, metadata=(("traceparent", sent),))


async def test_one_job_is_one_trace(serve: Serve) -> None:
    """Client, call, queue, run, stages, and what the worker did in them: each below the one that it is a part of."""
    with otlp_receiver.receiving() as receiver:
        async with serve(otlp_endpoint=receiver.address) as running:
            job = await running.client.wait(await traced_job(running))
    call = receiver.one("modelpress.v1.JobService/CreateJob")
    assert (call.trace, call.parent, call.service) == (TRACE, SPAN, "modelpress-server")
    assert call.attributes["rpc.grpc.status"] == "OK"
    assert job.trace_parent == f"00-{TRACE}-{call.id}-01"
    queued, run = receiver.one("queued"), receiver.one("run")
    assert {queued.parent, run.parent} == {call.id}
    assert run.attributes["modelpress.job"] == job.name.rpartition("/")[2]
    assert (run.attributes["modelpress.outcome"], run.attributes["modelpress.attempt"]) == ("SUCCEEDED", 1)
    assert queued.start_ns == job.create_time.ToNanoseconds()
    assert queued.end_ns == run.start_ns == job.start_time.ToNanoseconds()
    stages = [receiver.one("load"), receiver.one("quantize")]
    assert {stage.parent for stage in stages} == {run.id}
    candidate, made = receiver.one("candidate prune 10%"), receiver.one("pass prune")
    assert (candidate.parent, made.parent) == (stages[0].id, candidate.id)
    assert candidate.attributes == {"modelpress.candidate": "prune 10%"}
    assert (candidate.failed, made.failed) == (False, True)
    of_job = {call.id, queued.id, run.id, candidate.id, made.id, *(stage.id for stage in stages)}
    assert {span.trace for span in receiver.spans if span.id in of_job} == {TRACE}


async def test_a_worker_can_bend_no_time(serve: Serve) -> None:
    """What it says began before its stage begins with it, what it says ends later ends now, what never ends does."""
    with otlp_receiver.receiving() as receiver:
        async with serve(otlp_endpoint=receiver.address) as running:
            await running.client.wait(await traced_job(running))
    stage, run = receiver.one("load"), receiver.one("run")
    for name in ("pass liar", "candidate endless", "candidate prune 10%"):
        span = receiver.one(name)
        assert stage.start_ns <= span.start_ns <= span.end_ns <= run.end_ns
    assert receiver.one("pass liar").parent == stage.id


async def test_failures_and_repeated_runs(serve: Serve) -> None:
    """A run that failed says why; one that is repeated is a run more, in the same trace, also after a restart."""
    with otlp_receiver.receiving() as receiver:
        async with serve(otlp_endpoint=receiver.address) as running:
            await running.client.wait(await traced_job(running, compress="fail"))
            await running.client.wait(await traced_job(running, compress="crash_once"))
            await running.client.wait(await traced_job(running, sent="", compress="memory"))
        async with serve(otlp_endpoint=receiver.address) as running:
            job = await traced_job(running, compress="wait")
            await running.executor.running.wait()
        async with serve(otlp_endpoint=receiver.address) as running:
            running.executor.gate.set()
            await running.client.wait(job)
    runs = [span for span in receiver.spans if span.name == "run"]
    ended = [(span.attributes["modelpress.outcome"], span.attributes.get("modelpress.reason", "")) for span in runs]
    assert ended[0] == ("FAILED", "UNSUPPORTED_FORMAT")
    assert runs[0].failed
    assert ("FAILED", "WORKER_OUT_OF_MEMORY") in ended
    assert ended[-2:] == [("QUEUED", "DRAIN"), ("SUCCEEDED", "")]
    assert runs[-1].parent == runs[-2].parent
    assert [span.trace == TRACE for span in runs].count(False) == 1  # its client sent none: the server began one


async def test_without_an_endpoint_a_clients_trace_is_kept_with_the_job(serve: Serve) -> None:
    """So that a server that keeps traces later goes on with it; what is no traceparent is dropped."""
    async with serve() as running:
        assert (await traced_job(running)).trace_parent == SENT
        assert (await traced_job(running, sent="00-x", compress="ok")).trace_parent == ""
        await running.client.job(await running.client.model())


def test_what_is_a_trace_parent() -> None:
    """W3C Trace Context, section 3.2.2."""
    assert trace_parent(SENT) == SENT
    for wrong in ("", SENT.upper(), SENT[:-1], SENT + "-x", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01"):
        assert trace_parent(wrong) == ""
    assert trace_parent(f"00-{TRACE}-{'0' * 16}-01") == ""


async def test_a_receiver_that_is_away_harms_nobody(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Jobs go on, and the server ends within the time of an export."""
    async with serve(otlp_endpoint="http://127.0.0.1:9") as running:
        job = await running.client.wait(await traced_job(running))
        assert job.state == job_service_pb2.JOB_STATE_SUCCEEDED


def test_the_endpoint_is_checked() -> None:
    """A name without a scheme, or without a port, is told at the start."""
    for wrong in ("localhost:4317", "http://localhost", "ftp://x:1", "http://x:port"):
        with pytest.raises(SettingsError, match="otlp_endpoint"):
            Settings(**{**DEFAULTS, "otlp_endpoint": wrong})


def test_the_client_imports_nothing_for_it() -> None:
    """Calls of a program without OpenTelemetry do not load it; TRACEPARENT is sent; a span of the program is."""
    code = (
        "import os, sys; from modelpress_client import AsyncClient; from modelpress_client.tracing import *;"
        "assert trace_metadata() == (); call_span('X').__enter__();"
        f"os.environ['TRACEPARENT'] = {SENT!r}; assert trace_metadata() == (('traceparent', {SENT!r}),);"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules);"
        "from opentelemetry.sdk.trace import TracerProvider; from opentelemetry import trace;"
        "trace.set_tracer_provider(TracerProvider());\n"
        "with call_span('CreateJob') as span:\n"
        "    (key, sent), = trace_metadata(); assert format(span.context.span_id, '016x') in sent\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_real_processes(tmp_path: Path) -> None:
    """`compress-client` within a trace, `compress-server`, a confined worker: passes and candidates in that trace."""
    output = tmp_path / "output"
    output.mkdir()
    example = Path(__file__).resolve().parents[2] / "examples" / "mnist"
    with otlp_receiver.receiving() as receiver:
        environment = {"OTEL_SERVICE_NAME": "press"}
        command = [
            sys.executable,
            "-m",
            "modelpress_server",
            "--listen",
            "127.0.0.1:0",
            "--data-dir",
            str(tmp_path / "d"),
        ]

        server = subprocess.Popen(
            [*command, "--otlp-endpoint", receiver.address],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            assert server.stdout is not None
            address = server.stdout.readline().removeprefix("listening on ").strip()
            client = [sys.executable, "-m", "modelpress_client", "upload", str(example / "model.onnx")]
            subprocess.run(
                [*client, "--server", address, "--goal", "smallest", "--data", str(example / "samples.npz"), "--json"],
                cwd=output,
                env={**os.environ, "TRACEPARENT": SENT},
                check=True,
                capture_output=True,
            )
        finally:
            server.terminate()
            server.wait()
            assert server.stdout is not None
            server.stdout.close()
    call, run, search = (receiver.one(name) for name in ("modelpress.v1.JobService/CreateJob", "run", "search"))
    assert (call.parent, run.parent, search.parent) == (SPAN, call.id, run.id)
    assert call.service == "press"
    candidates = [span for span in receiver.spans if span.name.startswith("candidate ")]
    assert len(candidates) >= 3
    assert {span.parent for span in candidates} == {search.id}
    assert any(span.name == "pass fuse" and span.parent == search.id for span in receiver.spans)
    assert {span.trace for span in (run, search, *candidates)} == {TRACE}
    for stage in ("load", "measure", "report"):
        assert receiver.one(stage).parent == run.id
