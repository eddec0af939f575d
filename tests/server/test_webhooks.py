"""Webhooks: what a place that listens on 127.0.0.1 is sent by a real server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from modelpress_protos.v1 import job_service_pb2
from modelpress_server.config import SettingsError
from modelpress_server.events import dispatcher
from modelpress_server.events.endpoints import read_endpoints
from modelpress_server.events.message import signature
from modelpress_server.stores.tables import outbox
from server_harness import Client, Serve, until
from sqlalchemy import select
from webhook_receiver import Place, listening

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def named(path: Path, **places: tuple[Place | str, str]) -> Path:
    """The operator's file: name -> place and further lines."""
    tables = [
        f'[{name}]\nurl = "{place if isinstance(place, str) else place.url}/hook"\nsecret = "{SECRET}"\n{more}\n'
        for name, (place, more) in places.items()
    ]
    path.write_text("\n".join(tables))
    return path


async def test_the_end_of_a_job_is_told(serve: Serve, tmp_path: Path) -> None:
    """A CloudEvent with its required attributes, signed; of the projects and states that are asked for alone."""
    with listening() as all_ends, listening() as failures:
        path = named(
            tmp_path / "hooks.toml", all=(all_ends, ""), failed=(failures, 'projects = ["a"]\nstates = ["FAILED"]')
        )
        async with serve(webhooks=path) as running:
            client = running.client
            job = await client.wait(await client.job(await client.model("projects/a"), labels={"team": "x"}))
            await client.wait(await client.job(await client.model("projects/a", compress="fail")))
            await client.wait(await client.job(await client.model("projects/b", compress="fail")))
            await until(lambda: len(all_ends.got) == 3 and len(failures.got) == 1)
    first = next(one for one in all_ends.got if one.event["subject"] == job.name)
    event = first.event
    assert first.headers["Content-Type"].startswith("application/cloudevents+json")
    assert (event["specversion"], event["type"]) == ("1.0", "modelpress.v1.job.succeeded")
    assert event["source"] == "/modelpress/projects/a"
    assert event["time"] == job.end_time.ToJsonString()
    assert event["data"]["labels"] == {"team": "x"}
    assert event["data"]["summary"]["optimizedSizeBytes"] == "5"
    assert not {"recipe", "artifacts", "spec"} & event["data"].keys()
    stamp = first.headers["webhook-timestamp"]
    assert first.headers["webhook-id"] == event["id"]
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = hmac.new(key, f"{event['id']}.{stamp}.".encode() + first.body, hashlib.sha256).digest()
    assert first.headers["webhook-signature"] == f"v1,{base64.b64encode(signed).decode()}"
    (failed,) = failures.got
    assert failed.event["data"]["error"]["message"] == "It is no format that we read."
    assert failed.event["source"] == "/modelpress/projects/a"
    assert len({one.event["id"] for one in all_ends.got}) == 3


async def test_every_end_is_one(serve: Serve, tmp_path: Path) -> None:
    """Succeeded, taken from the cache, cancelled while queued and while running, expired."""
    with listening() as place:
        async with serve(webhooks=named(tmp_path / "hooks.toml", all=(place, ""))) as running:
            client = running.client
            model = await client.model()
            await client.wait(await client.job(model))
            await client.job(model)
            held = await client.job(await client.model(compress="wait"))
            await running.executor.running.wait()
            queued = await client.job(model, skip_cache=True)
            for job in (queued, held):
                await client.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=job.name))
            await until(lambda: len(place.got) == 4)
    assert sorted(place.states()) == ["cancelled", "cancelled", "succeeded", "succeeded"]


async def test_what_does_not_arrive_is_sent_again(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same event, with the same id and a new signature; redirects lead nowhere, and 410 ends it."""
    monkeypatch.setattr(dispatcher, "FIRST_RETRY_S", 0.01)
    with listening() as place, listening() as other:
        place.answers = [(500, {}), (302, {"Location": f"{other.url}/stolen"}), (503, {"Retry-After": "0"}), (200, {})]
        async with serve(webhooks=named(tmp_path / "hooks.toml", all=(place, ""))) as running:
            await running.client.wait(await running.client.job(await running.client.model()))
            await until(lambda: len(place.got) == 4)
            assert len({one.event["id"] for one in place.got}) == 1
            assert other.got == []
            place.answers = [(410, {})]
            await running.client.wait(await running.client.job(await running.client.model(compress="fail")))
            store = running.server._dispatcher._store

            async def nothing_left() -> bool:
                return len(place.got) == 5 and await store.next_event_us("all") is None

            await until(nothing_left)


async def test_a_place_that_is_away_holds_up_no_other(serve: Serve, tmp_path: Path) -> None:
    """The others are told; what could not be brought is kept, and brought by the next server."""
    path = tmp_path / "hooks.toml"
    with listening() as place:
        named(path, away=("http://127.0.0.1:9", ""), here=(place, ""))
        async with serve(webhooks=path) as running:
            await running.client.wait(await running.client.job(await running.client.model()))
            await until(lambda: place.got)
            store = running.server._dispatcher._store
            # Not before the attempt has failed: the event was lent until then.
            await until(lambda: _attempts(store, "away"))
            await store.postpone_event("away", place.got[0].event["id"], 0)
    with listening() as back:
        named(path, away=(back, ""))
        async with serve(webhooks=path):
            await until(lambda: back.got)
    assert back.got[0].body == place.got[0].body


async def _attempts(store: Any, name: str) -> int:
    found = select(outbox.c.attempts).where(outbox.c.endpoint == name)
    return int(await store._database.read(lambda connection: connection.execute(found).scalar()) or 0)


async def test_what_is_too_old_is_given_up(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After three days, with a line in the log."""
    path = named(tmp_path / "hooks.toml", away=("http://127.0.0.1:9", ""))
    async with serve(webhooks=path) as running:
        await running.client.wait(await running.client.job(await running.client.model()))
    monkeypatch.setattr(dispatcher, "MAX_AGE_S", -1.0)
    async with serve(webhooks=path) as running:
        await until(lambda: "1 event(s) could not be brought" in caplog.text)


async def test_a_killed_server_loses_none(serve: Serve, tmp_path: Path) -> None:
    """kill -9 after the end of a job and before its event has arrived: the next server brings it."""
    path = named(tmp_path / "hooks.toml", all=("http://127.0.0.1:9", ""))
    launch = [sys.executable, str(Path(__file__).with_name("serve_scripted.py")), str(tmp_path / "data"), str(path)]
    server = await asyncio.create_subprocess_exec(*launch, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        address = (await server.stdout.readline()).decode().strip()
        async with grpc.aio.insecure_channel(address) as channel:
            client = Client(channel)
            job = await client.wait(await client.job(await client.model()))
    finally:
        server.kill()
        await server.communicate()
    with listening() as place:
        named(path, all=(place, ""))
        async with serve(webhooks=path) as running:
            store = running.server._dispatcher._store
            (event,) = await store.lend_events("all", 2**62, 0, 10)  # whenever it would be due
            await store.postpone_event("all", event.id, 0)
            running.server._dispatcher._wake()
            await until(lambda: place.got)
    assert place.got[0].event["subject"] == job.name


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The example of its reference implementation."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "is not a table"),
        ('[a]\nurl = "https://x/"', "is not a table with url and secret"),
        (f'[a]\nurl = "http://ci.example/"\nsecret = "{SECRET}"', "over https only"),
        (f'[a]\nurl = "file:///etc/passwd"\nsecret = "{SECRET}"', "is not https://HOST"),
        (f'[a]\nurl = "https://u:p@ci.example/"\nsecret = "{SECRET}"', "without a user"),
        (f'[a]\nurl = "https://ci.example/\\r\\nX: y"\nsecret = "{SECRET}"', "is not https://HOST"),
        ('[a]\nurl = "https://ci.example/"\nsecret = "short"', "24 to 64 bytes"),
        (f'[a]\nurl = "https://ci.example/"\nsecret = "{SECRET}"\nstates = ["RUNNING"]', "is no end of a job"),
        (f'[a]\nurl = "https://ci.example/"\nsecret = "{SECRET}"\nprojects = "a"', "not a list"),
        (f'[a]\nurl = "https://ci.example/"\nsecret = "{SECRET}"\nretries = 3', "no setting retries"),
        ("[a", "cannot read"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, text: str, expected: str) -> None:
    """What is wrong and where; never the secret."""
    path = tmp_path / "hooks.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_endpoints(path)
    assert expected in str(caught.value)
    assert SECRET not in str(caught.value)


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    """Neither the key nor the address, which may hold one."""
    path = named(tmp_path / "hooks.toml", a=("https://hooks.example/T0/secret", ""))
    shown = repr(read_endpoints(path))
    assert "secret" not in shown.replace("secret=", "")
    assert "MfKQ" not in shown
