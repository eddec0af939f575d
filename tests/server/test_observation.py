"""Metrics and probes over real HTTP, from a real server on 127.0.0.1."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from authority import Authority
from modelpress_protos.internal.v1 import worker_pb2
from modelpress_protos.v1 import job_service_pb2
from modelpress_server.app import Server
from modelpress_server.config import Settings, SettingsError
from modelpress_server.executors.base import WorkerUnavailableError
from modelpress_server.observation import http, metrics
from modelpress_server.observation.look import Look
from modelpress_server.observation.meter import Meter
from modelpress_server.observation.stages import StageTimes
from modelpress_server.stores.overview import Queue, StoreFigures
from prometheus_client.parser import text_string_to_metric_families
from scripted_executor import ScriptedExecutor
from server_harness import DEFAULTS, Running, Serve, failing, until

HTTP = {"http_listen": "127.0.0.1:0"}


async def get(running: Running, path: str, token: str = "", context: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Status and body."""

    def fetch() -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        scheme = "https" if context else "http"
        request = urllib.request.Request(f"{scheme}://{running.server.http_address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, context=context) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def scrape(running: Running, token: str = "") -> dict[str, float]:
    """Every sample of /metrics, by its name with its labels in order: `jobs{state=QUEUED}`, without the prefix."""
    status, text = await get(running, "/metrics", token)
    assert status == 200
    return samples_of(text)


def samples_of(text: str) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[sample.name.removeprefix("modelpress_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


async def test_what_one_job_leaves_in_the_metrics(serve: Serve) -> None:
    """Calls, bytes, states, stages, findings, cache hits and the machine: each figure is the one that was caused."""
    async with serve(**HTTP) as running:
        client = running.client
        model = await client.model()
        job = await client.wait(await client.job(model))
        again = await client.job(model)
        assert again.from_cache
        content = await client.read(job.artifacts[0].files[0].digest)
        missing = job_service_pb2.GetJobRequest(name="projects/default/jobs/" + "0" * 26)
        await failing(client.jobs.GetJob(missing))
        found = await scrape(running)
    service = "/modelpress.v1.JobService"
    assert found[f"rpcs_total{{code=OK,method={service}/CreateJob}}"] == 2
    assert found[f"rpcs_total{{code=NOT_FOUND,method={service}/GetJob}}"] == 1
    assert found[f"rpc_duration_seconds_count{{method={service}/CreateJob}}"] == 2
    assert found["upload_bytes_total"] == len(json.dumps({}))
    assert found["download_bytes_total"] == len(content)
    assert found["uploads_completed_total"] == 1
    assert (found["jobs_created_total"], found["jobs_from_cache_total"]) == (2, 1)
    assert (found["jobs{state=SUCCEEDED}"], found["jobs{state=QUEUED}"]) == (2, 0)
    assert found["job_state_changes_total{state=SUCCEEDED}"] == 2
    assert (found["job_wait_seconds_count"], found["job_run_seconds_count"]) == (1, 1)
    assert found["models{state=ACTIVE}"] == found["model_state_changes_total{state=ACTIVE}"] == 1
    for stage in ("load", "quantize"):
        assert found[f"stage_duration_seconds_count{{stage={stage},task=compress}}"] == 1
    assert found["findings_lookups_total{result=miss}"] == 1
    assert found["worker_starts_total{result=ok}"] == 1
    assert found["stored_bytes"] > 0
    assert 0 < found["disk_free_bytes"] < found["disk_size_bytes"]
    assert found["process_resident_memory_bytes"] > 2**20
    assert found["workers_available"] == 1


async def test_the_queue_is_told_by_project(serve: Serve) -> None:
    """Length and age for each project that had a queue; other projects count as one beyond a number."""
    async with serve(**HTTP) as running:
        client = running.client
        await client.job(await client.model(compress="wait"))
        await running.executor.running.wait()
        for _ in range(2):
            await client.job(await client.model("projects/b"), skip_cache=True)
        found = await scrape(running)
        assert found["queued_jobs{project=b}"] == 2
        assert 0 <= found["oldest_queued_job_age_seconds{project=b}"] < 60
        assert found["jobs{state=RUNNING}"] == 1


def test_projects_and_stages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients and workers make up does not grow the metrics; one that has emptied its queue keeps its series."""
    monkeypatch.setattr(metrics, "MAX_PROJECTS", 2)
    meter = metrics.PrometheusMeter()
    for number in range(50):
        meter.stage_ended("compress", f"made-up-{number}", 1.0)
    queues = {name: Queue(jobs, age_s) for name, jobs, age_s in (("a", 1, 9.0), ("b", 2, 8.0), ("c", 3, 7.0))}
    first = samples_of(meter.text(Look(StoreFigures({}, {}, {**queues, "d": Queue(4, 70.0)}, 0))).decode())
    assert first["queued_jobs{project=other}"] == 7
    assert first["oldest_queued_job_age_seconds{project=other}"] == 70
    assert [name for name in first if "stage_duration_seconds_count" in name] == [
        "stage_duration_seconds_count{stage=other,task=compress}"
    ]
    later = samples_of(meter.text(Look(StoreFigures({}, {}, {"c": queues["c"]}, 0))).decode())
    assert (later["queued_jobs{project=a}"], later["queued_jobs{project=other}"]) == (0, 3)
    gone = samples_of(meter.text(Look(None)).decode())
    assert "stored_bytes" not in gone
    assert "disk_free_bytes" in gone


def test_every_stage_of_the_engine_has_a_series() -> None:
    """No stage that the pipeline tells counts as `other`."""
    progress = pytest.importorskip("modelpress_compression.pipeline.progress")
    assert set(progress._WEIGHTS) <= set(metrics.STAGES)


async def test_lost_workers_are_counted_by_reason(serve: Serve) -> None:
    """The reason of the error is the label."""
    async with serve(**HTTP) as running:
        job = await running.client.job(await running.client.model(compress="memory"))
        await running.client.wait(job)
        found = await scrape(running)
        assert found["workers_lost_total{reason=WORKER_OUT_OF_MEMORY}"] == 1


async def test_servers_of_one_process_count_apart(serve: Serve, tmp_path: Path) -> None:
    """Each has a registry of its own."""
    async with serve(**HTTP) as first, serve(**HTTP, data_dir=tmp_path / "second") as second:
        await first.client.model()
        assert (await scrape(first))["uploads_completed_total"] == 1
        assert (await scrape(second))["uploads_completed_total"] == 0


async def test_probes(serve: Serve) -> None:
    """Alive while it runs; ready when store, files and workers are, and not while it shuts down; each check is told."""
    async with serve(**HTTP) as running:
        assert await get(running, "/livez") == (200, "ok\n")
        status, text = await get(running, "/readyz")
        report = json.loads(text)
        assert (status, report["status"]) == (200, "ready")
        assert {name: check["ok"] for name, check in report["checks"].items()} == dict.fromkeys(
            ("store", "blobs", "workers", "accepting"), True
        )
        assert (await get(running, "/elsewhere"))[0] == 404
        running.server._gate.drain()
        status, text = await get(running, "/readyz")
        assert status == 503
        assert json.loads(text)["checks"]["accepting"] == {"ok": False, "detail": "the server is shutting down"}
        assert (await get(running, "/livez"))[0] == 200


async def test_not_ready_without_workers_or_files(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """503, and the check that failed says why, without a path."""
    monkeypatch.setattr("modelpress_server.observation.readiness.INTERVAL_S", 0.0)
    async with serve(**HTTP) as running:
        running.executor.broken = True
        running.executor.raises = [WorkerUnavailableError("No worker.")]
        await running.client.job(await running.client.model())

        async def unready() -> Any:
            status, text = await get(running, "/readyz")
            return json.loads(text)["checks"] if status == 503 else None

        checks = await until(unready)
        assert not checks["workers"]["ok"]
        assert (await scrape(running))["workers_available"] == 0
        blobs = running.settings.data_dir / "blobs"
        blobs.rename(blobs.with_name("away"))
        try:
            text = (await get(running, "/readyz"))[1]
            assert not json.loads(text)["checks"]["blobs"]["ok"]
            assert str(running.settings.data_dir) not in text
        finally:
            blobs.with_name("away").rename(blobs)


async def test_metrics_need_a_token_with_all_projects(serve: Serve, tmp_path: Path) -> None:
    """Where tokens are asked for: none 401, of one project 403, of all 200. Probes have none and need none."""
    tokens = tmp_path / "tokens"
    tokens.write_text("all-of-it\nonly-a a\n")
    async with serve(**HTTP, token_file=tokens) as running:
        assert (await get(running, "/metrics"))[0] == 401
        assert (await get(running, "/metrics", "wrong"))[0] == 401
        assert (await get(running, "/metrics", "only-a"))[0] == 403
        assert "rpcs_total" in (await get(running, "/metrics", "all-of-it"))[1]
        assert (await get(running, "/livez"))[0] == (await get(running, "/readyz"))[0] == 200
        for _ in range(30):
            status, _text = await get(running, "/metrics", "guess")
        assert status == 429


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command makes the certificates")
async def test_tls_beyond_the_loopback_address(serve: Serve, tmp_path: Path) -> None:
    """HTTP is encrypted with the server's certificate on other addresses."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    async with serve(http_listen="0.0.0.0:0", token="secret", tls_cert=cert, tls_key=key) as running:
        running.server._http.address = running.server.http_address.replace("0.0.0.0", "127.0.0.1")  # type: ignore[union-attr]
        context = ssl.create_default_context(cafile=str(authority.file))
        assert await get(running, "/livez", context=context) == (200, "ok\n")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"http_listen": "0.0.0.0:9464"}, "other machines are served only with"),
        ({"http_listen": "0.0.0.0:9464", "token": "t"}, "other machines are served only with"),
        (
            {"http_listen": "0.0.0.0:1", "tls_cert": Path("c"), "tls_key": Path("k"), "tls_client_ca": Path("a")},
            "other machines are served only with",
        ),
        ({"http_listen": "9464"}, "is not HOST:PORT"),
    ],
)
def test_exposure(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """As for gRPC: TLS and tokens, or --insecure, on any other address than the loopback one."""
    with pytest.raises(SettingsError, match=problem):
        Settings(**{**DEFAULTS, "data_dir": tmp_path, **changes})
    if problem.startswith("other"):
        Settings(**{**DEFAULTS, "data_dir": tmp_path, **changes, "insecure": True})


async def test_a_taken_port_is_told(tmp_path: Path) -> None:
    """One sentence that names the setting; the data folder is free again."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        for _ in range(2):
            settings = Settings(**{**DEFAULTS, "data_dir": tmp_path, "http_listen": listen})
            with pytest.raises(SettingsError, match="http_listen: cannot bind"):
                await Server(settings, lambda _: ScriptedExecutor()).start()


async def _end(reader: asyncio.StreamReader) -> None:
    """Returns when the other side has closed."""
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""


async def test_connections_are_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number they are closed, and a silent one is closed after a time; then others are served."""
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(http, "MAX_CONNECTION_S", 2.0)
    async with serve(**HTTP) as running:
        host, port = running.server.http_address.split(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
        ends = [asyncio.create_task(_end(reader)) for reader, _writer in silent]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert done == {ends[2]}
        await asyncio.wait(ends)
        for _reader, writer in silent:
            writer.close()
        assert (await get(running, "/livez"))[0] == 200


def test_stages_are_timed_to_the_end_of_the_task() -> None:
    """Each stage once, the last one too, whatever ends the task."""

    class Heard(Meter):
        stages: list[tuple[str, str]] = []  # noqa: RUF012  # one test

        def stage_ended(self, task: str, stage: str, duration_s: float) -> None:
            assert duration_s >= 0
            self.stages.append((task, stage))

    passed: list[Any] = []
    times = StageTimes(Heard(), "compress", passed.append)

    def run() -> None:
        with times:
            for stage in ("load", "load", "fuse"):
                progress = job_service_pb2.Progress(stage=stage)
                times.on_event(worker_pb2.WorkerEvent(progress=progress))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert Heard.stages == [("compress", "load"), ("compress", "fuse")]
    assert len(passed) == 3


def test_dashboard_and_documentation_name_the_metrics() -> None:
    """Every name in the dashboard is one that a server gives; every metric is in the dashboard and in the manual."""
    meter = metrics.PrometheusMeter()
    families = list(text_string_to_metric_families(meter.text(Look(StoreFigures({}, {}, {}, 0))).decode()))
    kinds = {family.name: family.type for family in families if family.name.startswith("modelpress_")}
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    given = {name + suffix: name for name, kind in kinds.items() for suffix in suffixes.get(kind, ("",))}
    given["modelpress_info"] = given.pop("modelpress", "modelpress_info")
    root = Path(__file__).parents[2]
    dashboard = json.loads((root / "deploy/grafana/modelpress.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    shown = set(re.findall(r"\bmodelpress_\w+", " ".join(expressions)))
    assert shown <= set(given)
    assert {given[name] for name in shown} == set(given.values())
    told = set(re.findall(r"\bmodelpress_\w+", (root / "docs/operations.md").read_text()))
    bases = {name for name, kind in kinds.items() if kind == "histogram"}
    assert told == {name for name, family in given.items() if family not in bases} | bases
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
