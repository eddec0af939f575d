"""The console over real HTTP: who sees what, and what strangers' names can do to a page."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from authority import Authority
from modelpress_server.app import Server
from modelpress_server.config import Settings, SettingsError
from modelpress_server.console import live, sessions
from modelpress_server.console.candidates import plot, read_candidates
from modelpress_server.identity.roles import Role
from modelpress_server.identity.tokens import TokenKeeper
from scripted_executor import ScriptedExecutor
from server_harness import DEFAULTS, Running, Serve, until

CONSOLE = {"http_listen": "127.0.0.1:0", "console": True}
TOKENS = "everything\nonly-a a:reader\nnothing c:reader\n"


@asynccontextmanager
async def browser(running: Running, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{running.server.http_address}", **options) as client:
        yield client


async def sign_in(client: httpx.AsyncClient, token: str, target: str = "") -> httpx.Response:
    origin = str(client.base_url).rstrip("/")
    return await client.post(
        "/console/sign-in",
        data={"token": token, "next": target},
        headers={"Origin": origin, "Sec-Fetch-Site": "same-origin"},
    )


def path_of(job: Any) -> str:
    return f"/console/{job.name}"


async def test_the_way_from_projects_to_a_report(serve: Serve) -> None:
    """Each page is linked by the one before; the report is served in an origin of its own, without scripts."""
    async with serve(**CONSOLE) as running, browser(running) as client:
        running.executor.report = "<!doctype html><title>Report</title>"
        job = await running.client.wait(await running.client.job(await running.client.model("projects/a")))
        other = await running.client.wait(
            await running.client.job(await running.client.model("projects/a"), priority=3)
        )
        home = await client.get("/console")
        assert 'href="/console/projects/a"' in home.text
        listed = await client.get("/console/projects/a")
        assert f'href="{path_of(job)}"' in listed.text
        page = await client.get(path_of(job))
        assert (page.status_code, "report.json" in page.text) == (200, True)
        report = await client.get(f"{path_of(job)}/report")
        assert report.text == running.executor.report
        assert report.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        both = await client.get("/console/compare", params={"job": [job.name, other.name]})
        assert "Priority" in both.text
        assert (await client.get("/console/compare", params={"job": job.name})).status_code == 200
        assert (await client.get("/console/queue")).status_code == 200
        assert (await client.get("/console/")).headers["location"] == "/console"


async def test_every_answer_forbids_what_is_not_its_own(serve: Serve, tmp_path: Path) -> None:
    """Pages, failures, redirects and files carry the policy; no page has a script or a style within it."""
    (tmp_path / "tokens").write_text(TOKENS)
    async with serve(**CONSOLE) as running, browser(running) as client:
        job = await running.client.wait(await running.client.job(await running.client.model()))
        answers = [
            await client.get(path)
            for path in (
                "/console",
                "/console/",
                "/console/queue",
                "/console/projects/default",
                path_of(job),
                f"{path_of(job)}/events",
                "/console/projects/none/jobs/none",
                "/console/static/console.css",
                "/console/static/none",
                "/console/sign-in",
            )
        ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<style|<script(?! src=\"/console/static/live.js\" defer)|\son\w+=|\sstyle=", answer.text)
        assert not re.search(r"(?:src|href|action)=\"(?!/console|data:,|\?)", answer.text)


async def test_names_of_strangers_are_text(serve: Serve) -> None:
    """Labels, files and what a worker says are escaped, and marks that turn text around are written out."""
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    async with serve(**CONSOLE) as running, browser(running) as client:
        model = await running.client.model(compress="report")
        running.executor.report_json = {
            "candidates": [
                {
                    "id": "c1",
                    "name": f"{hostile}\u202e\x1b[2J",
                    "size_bytes": 10,
                    "speedup": {"median": 2},
                    "chosen": True,
                },
                {"id": "c2", "name": "b", "size_bytes": "10", "speedup": {"median": 1e400}, "reason": hostile},
                {"id": "c3", "name": "c", "size_bytes": 20, "speedup": {"median": 1}, "pareto": 1},
                "no row",
            ]
        }
        job = await running.client.wait(await running.client.job(model, labels={"a": hostile}))
        pages = [
            (await client.get(path)).text
            for path in (path_of(job), "/console/projects/default", f"/console/compare?job={job.name}&job={job.name}")
        ]
    for page in pages:
        assert "&lt;script&gt;" in page
        assert "<img" not in page
        assert "<script>" not in page
        assert not {"\u202e", "\x1b"} & set(page)
    assert "\\u202e\\x1b[2J" in pages[0]
    assert pages[0].count("<circle") == 2


async def test_what_a_token_may_not_read_does_not_exist(serve: Serve, tmp_path: Path) -> None:
    """As over gRPC: another project's page, job, report and events are 404, and no list names them."""
    (tmp_path / "tokens").write_text(TOKENS)
    async with serve(**CONSOLE) as running:
        jobs = [
            await running.client.wait(await running.client.job(await running.client.model(f"projects/{name}")))
            for name in "ab"
        ]
    async with serve(token_file=tmp_path / "tokens", **CONSOLE) as running, browser(running) as client:
        for path in ("/console", path_of(jobs[0])):
            away = await client.get(path)
            assert (away.status_code, away.headers["location"]) == (
                303,
                f"/console/sign-in?next={path.replace('/', '%2F')}",
            )
        assert (await client.get(f"{path_of(jobs[0])}/events")).status_code == 401
        assert (await sign_in(client, "wrong")).status_code == 401
        entered = await sign_in(client, "only-a", path_of(jobs[0]))
        assert (entered.status_code, entered.headers["location"]) == (303, path_of(jobs[0]))
        assert (await client.get(path_of(jobs[0]))).status_code == 200
        home = (await client.get("/console")).text
        assert "/projects/a" in home
        assert "/projects/b" not in home
        for path in (
            "/console/projects/b",
            path_of(jobs[1]),
            f"{path_of(jobs[1])}/report",
            f"{path_of(jobs[1])}/events",
        ):
            assert (await client.get(path)).status_code == 404
        both = await client.get("/console/compare", params={"job": [job.name for job in jobs]})
        assert both.status_code == 404
        await sign_in(client, "nothing")
        assert (await client.get(path_of(jobs[0]))).status_code == 404
        await sign_in(client, "everything")
        assert (await client.get(path_of(jobs[1]))).status_code == 200


async def test_a_session_ends(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By signing out, with its token, and after a time; the cookie is out of reach of scripts and of other sites."""
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS)
    async with serve(token_file=tokens, **CONSOLE) as running, browser(running) as client:
        entered = await sign_in(client, "everything")
        cookie = entered.headers["set-cookie"]
        assert "everything" not in cookie
        assert all(part in cookie for part in ("HttpOnly", "SameSite=strict", "Path=/"))
        assert (await client.get("/console")).status_code == 200
        await client.post("/console/sign-out")
        assert not client.cookies
        again = await client.get("/console", headers={"Cookie": cookie.partition(";")[0]})
        assert again.status_code == 303
        await sign_in(client, "only-a")
        tokens.write_text("everything\n")
        assert (await until_status(client, "/console", 303)).headers["location"].startswith("/console/sign-in")
        client.cookies.clear()
        await sign_in(client, "everything")
        monkeypatch.setattr(sessions, "IDLE_S", -1.0)
        assert (await client.get("/console")).status_code == 303
        assert (await client.get("/console", headers={"Authorization": "Bearer everything"})).status_code == 200


async def until_status(client: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    async def answer() -> httpx.Response | None:
        found = await client.get(path)
        return found if found.status_code == status else None

    found: httpx.Response = await until(answer)
    return found


async def test_only_our_own_form_signs_in_and_leads_to_our_own_pages(serve: Serve, tmp_path: Path) -> None:
    """Another site's page signs nobody in or out, and no address after signing in leads elsewhere."""
    (tmp_path / "tokens").write_text(TOKENS)
    async with serve(token_file=tmp_path / "tokens", **CONSOLE) as running, browser(running) as client:
        for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
            for path in ("/console/sign-in", "/console/sign-out"):
                answer = await client.post(path, data={"token": "everything"}, headers=headers)
                assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
        for target in (
            "//evil.example",
            "https://evil.example",
            "/console//evil",
            "/console\\evil",
            "/metrics",
            "/console/../x",
        ):
            assert (await sign_in(client, "everything", target)).headers["location"] == "/console"
        assert (await sign_in(client, "x" * 100_000)).status_code == 400
        assert (await client.post("/console/sign-in", content=b"\xff=\xff&token")).status_code == 401


async def test_without_tokens_only_this_machine_names_it(serve: Serve) -> None:
    """A name of another site that points here (DNS rebinding) is refused."""
    async with serve(**CONSOLE) as running, browser(running) as client:
        assert (await client.get("/console", headers={"Host": "evil.example"})).status_code == 403
        assert (await client.get("/console", headers={"Host": "localhost:80"})).status_code == 200
        assert (await client.get("/console", headers={"Host": "[::1]:80"})).status_code == 200


async def test_certificates_alone_open_no_page(tmp_path: Path) -> None:
    """A server that knows its callers by certificates, which no browser is asked for here, asks for tokens."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    settings = Settings(
        **{
            **DEFAULTS,
            "data_dir": tmp_path / "data",
            "tls_cert": cert,
            "tls_key": key,
            "tls_client_ca": authority.file,
        },
        **CONSOLE,
    )
    server = Server(settings, lambda _: ScriptedExecutor())
    await server.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{server.http_address}") as client:
            assert (await client.get("/console")).status_code == 403
            TokenKeeper(settings.data_dir).add("somebody", {"*": Role.READER}, 0.0)
            assert (await client.get("/console")).status_code == 303
    finally:
        await server.stop()


async def test_paths_lead_nowhere_else(serve: Serve) -> None:
    """What is no name of ours is 400 or 404, whatever it is made of."""
    async with serve(**CONSOLE) as running, browser(running) as client:
        for path in (
            "/console/static/..%2f..%2fapp.py",
            "/console/static/../app.py",
            "/console/static/%2e%2e/app.py",
            "/console/projects/..%2f..%2fetc",
            "/console/projects/%00",
            "/console/projects/a'--",
            "/console/projects/-",
            "/console/projects/default/jobs/..%2f..",
            "/console/projects/default/jobs/" + "x" * 5000,
            "/console/projects/default?page=x",
            "/console/compare?job=x&job=y",
        ):
            assert (await client.get(path)).status_code in (400, 404), path


async def test_progress_is_streamed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Server-sent events, each the whole of what is shown, up to the end; beyond a number of streams 503."""
    monkeypatch.setattr(live, "MAX_STREAMS", 1)
    async with serve(**CONSOLE) as running, browser(running) as client:
        job = await running.client.job(await running.client.model(compress="wait"))
        await running.executor.running.wait()
        shown: list[dict[str, Any]] = []

        async def follow() -> None:
            async with client.stream("GET", f"{path_of(job)}/events") as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        shown.append(json.loads(line.removeprefix("data: ")))

        following = asyncio.create_task(follow())
        await until(lambda: shown and shown[-1]["stage"] == "quantize")
        assert shown[-1] | {"left": ""} == {
            "state": "RUNNING",
            "fraction": 0.5,
            "percent": "50 %",
            "stage": "quantize",
            "message": "",
            "left": "",
            "ended": False,
        }
        assert (await client.get(f"{path_of(job)}/events")).status_code == 503
        running.executor.gate.set()
        await following
        assert (shown[-1]["state"], shown[-1]["ended"]) == ("SUCCEEDED", True)


async def test_who_leaves_a_stream_makes_room(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A closed page takes none of the streams, and its end is no error; neither is the end of the server."""
    monkeypatch.setattr(live, "MAX_STREAMS", 1)
    async with serve(**CONSOLE) as running, browser(running) as client:
        job = await running.client.job(await running.client.model(compress="wait"))
        await running.executor.running.wait()
        for _ in range(3):
            async with browser(running) as other, other.stream("GET", f"{path_of(job)}/events") as answer:
                assert (await anext(answer.aiter_lines())).startswith("retry")

            async def free() -> bool:
                async with client.stream("GET", f"{path_of(job)}/events") as answer:
                    return answer.status_code == 200

            await until(free)
        last = browser(running)
        async with last as other, other.stream("GET", f"{path_of(job)}/events") as answer:
            await anext(answer.aiter_lines())
            await running.server.stop()
            monkeypatch.setattr(running.server, "stop", nothing)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def nothing() -> None:
    """In the place of the second stop."""


async def test_a_stream_ends_with_its_token(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the time of a look at the tokens, as over gRPC."""
    monkeypatch.setattr("modelpress_server.interceptors.RECHECK_S", 0.05)
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKENS)
    async with serve(**CONSOLE) as running:
        job = await running.client.job(await running.client.model("projects/a", compress="wait"))
        await running.executor.running.wait()
    async with serve(token_file=tokens, **CONSOLE) as running, browser(running) as client:
        await sign_in(client, "only-a")
        async with client.stream("GET", f"{path_of(job)}/events") as answer:
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("retry")
            tokens.write_text("everything\n")
            async for _ in lines:
                pass
        running.executor.gate.set()


async def test_it_is_off_unless_asked_for(serve: Serve) -> None:
    """--http-listen alone serves no console; --console without it is refused."""
    async with serve(http_listen="127.0.0.1:0") as running, browser(running) as client:
        assert (await client.get("/console")).status_code == 404
    with pytest.raises(SettingsError, match="--http-listen"):
        Settings(**{**DEFAULTS, "console": True})


async def test_looking_is_audited_as_over_grpc(serve: Serve, tmp_path: Path) -> None:
    """Reading a file is noted with the caller, and so is what was refused; looking at lists is not."""
    (tmp_path / "tokens").write_text(TOKENS)
    audit = tmp_path / "audit"
    async with serve(**CONSOLE) as running:
        running.executor.report = "<p>"
        job = await running.client.wait(await running.client.job(await running.client.model("projects/a")))
    async with serve(token_file=tmp_path / "tokens", audit_log=audit, **CONSOLE) as running, browser(running) as client:
        await sign_in(client, "only-a")
        await client.get("/console/projects/a")
        assert audit.read_text() == ""
        await client.get(f"{path_of(job)}/report")
    (entry,) = [json.loads(line) for line in audit.read_text().splitlines()]
    assert (entry["caller"], entry["method"], entry["project"], entry["outcome"]) == (
        "token:line 2",
        "ReadBlob",
        "a",
        "OK",
    )


def test_reports_that_lie() -> None:
    """Whatever a report holds, the plot has numbers or is not drawn."""
    assert read_candidates(b"[" * 100_000) == []
    assert read_candidates(b"\xff") == []
    assert read_candidates(b'{"candidates": 7}') == []
    rows = [{"name": "a", "size_bytes": size, "speedup": {"median": speed}} for size, speed in ((1, 1), (1, 1))]
    assert plot(read_candidates(json.dumps({"candidates": rows}).encode())) is not None
    for sizes in ((0, 5e-324), (1e17, 1e17 + 16), (-1e17, 1e17), (True, False), (1e-310, 2e-310), (10**400, 1)):
        rows = [{"size_bytes": size, "speedup": {"median": size}} for size in sizes]
        drawn = plot(read_candidates(json.dumps({"candidates": rows}).encode()))
        for point in drawn.points if drawn is not None else ():
            assert 0 <= point.x <= drawn.width
            assert 0 <= point.y <= drawn.height
    one = [{"name": "a", "size_bytes": 1, "agreement": 0.5}, {"name": "b", "size_bytes": 2, "agreement": 0.75}]
    drawn = plot(read_candidates(json.dumps({"candidates": one}).encode()))
    assert drawn is not None
    assert drawn.y_title == "agreement with the original"
