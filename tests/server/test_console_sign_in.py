"""Signing in to the console at an OpenID provider, over real HTTP on both sides."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from manual_clock import ManualClock
from modelpress_server.config import Settings, SettingsError
from modelpress_server.console.oidc import Provider
from modelpress_server.console.sessions import CALLBACK, PENDING_S
from modelpress_server.errors import UnauthenticatedError
from openid_provider import CLIENT, SECRET, OpenIdProvider, new_key
from server_harness import Serve

START = "/console/sign-in/provider"


@pytest.fixture
def provider() -> Iterator[OpenIdProvider]:
    with OpenIdProvider().serving() as serving:
        yield serving


@asynccontextmanager
async def console(
    serve: Serve, provider: OpenIdProvider, tmp_path: Path, public: str = ""
) -> AsyncIterator[httpx.AsyncClient]:
    """A browser at a server's console, which its provider knows as a client."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    public = public or f"http://{address}"
    provider.redirect_uri = f"{public}{CALLBACK}"
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    signed_in: dict[str, Any] = {
        "http_listen": address, "console": True, "console_url": public, "console_client_id": CLIENT,
        "console_client_secret": tmp_path / "secret", "jwt_issuer": provider.issuer, "jwt_audience": "modelpress",
    }  # fmt: skip
    async with serve(**signed_in), httpx.AsyncClient(base_url=f"http://{address}") as client:
        yield client


async def begun(client: httpx.AsyncClient, target: str = "/console") -> str:
    """Goes to the provider; where that sends the browser back to."""
    out = await client.get(START, params={"next": target})
    assert out.status_code == 303
    back = await client.get(out.headers["location"])
    return str(back.headers["location"])


async def test_there_and_back(serve: Serve, provider: OpenIdProvider, tmp_path: Path) -> None:
    """Sign in, see what the token grants and no more, and sign out; cookies are out of a script's reach."""
    async with console(serve, provider, tmp_path) as client:
        page = await client.get((await client.get("/console/projects/a")).headers["location"])
        assert f'href="{START}?next=%2Fconsole%2Fprojects%2Fa"' in page.text
        sent = await client.get(START, params={"next": "/console/projects/a"})
        query = {name: values[0] for name, values in parse_qs(urlsplit(sent.headers["location"]).query).items()}
        assert (query["code_challenge_method"], query["response_type"]) == ("S256", "code")
        assert "HttpOnly" in sent.headers["set-cookie"]
        assert "SameSite=lax" in sent.headers["set-cookie"]
        back = await client.get((await client.get(sent.headers["location"])).headers["location"])
        assert (back.status_code, back.headers["location"]) == (303, "/console/projects/a")
        assert all("HttpOnly" in cookie for cookie in back.headers.get_list("set-cookie"))
        assert list(client.cookies) == ["modelpress-console"]
        home = await client.get("/console")
        assert "jwt:ann" in home.text
        assert (await client.get("/console/projects/a")).status_code == 200
        assert (await client.get("/console/projects/b")).status_code == 404
        kept = client.cookies["modelpress-console"]
        await client.post("/console/sign-out", headers={"Origin": str(client.base_url).rstrip("/")})
        client.cookies.set("modelpress-console", kept)
        assert (await client.get("/console")).status_code == 303


async def test_behind_a_proxy_that_ends_tls(serve: Serve, provider: OpenIdProvider, tmp_path: Path) -> None:
    """What browsers reach over TLS gives them cookies for TLS alone; a request's own host counts for nothing."""
    async with console(serve, provider, tmp_path, "https://compress.example") as client:
        sent = await client.get(START, headers={"Host": "evil.example"})
        assert "redirect_uri=https%3A%2F%2Fcompress.example%2Fconsole%2Fsigned-in&" in sent.headers["location"]
        cookie = sent.headers["set-cookie"]
        assert cookie.startswith("__Host-modelpress-console-begun=")
        assert "Secure" in cookie
        name, _, value = cookie.partition(";")[0].partition("=")
        back = str((await client.get(sent.headers["location"])).headers["location"])
        answer = await client.get(back.removeprefix("https://compress.example"), headers={"Cookie": f"{name}={value}"})
        (session,) = [text for text in answer.headers.get_list("set-cookie") if "console=" in text]
        assert session.startswith("__Host-modelpress-console=")
        assert "Secure" in session


async def test_what_a_stranger_sends(serve: Serve, provider: OpenIdProvider, tmp_path: Path) -> None:
    """Another state, another browser, an answer for the second time, of another provider, or without a code: nobody
    is signed in, and the code goes nowhere."""
    async with console(serve, provider, tmp_path) as client:
        for change in ({"state": "x"}, {"state": ""}, {"state": "é"}, {"iss": "https://evil.example"}, {"code": ""}):
            url = httpx.URL(await begun(client)).copy_merge_params(change)
            assert (await client.get(url)).status_code == 401, change
        back = await begun(client)
        async with httpx.AsyncClient() as other:
            assert (await other.get(back)).status_code == 401
        assert provider.requests == []
        assert (await client.get(back)).status_code == 303
        assert (await client.get(back)).status_code == 401
        assert len(provider.requests) == 1


async def test_no_other_page_is_gone_to(serve: Serve, provider: OpenIdProvider, tmp_path: Path) -> None:
    """Whatever is asked for as the next page, it is one of the console's."""
    async with console(serve, provider, tmp_path) as client:
        for target in ("https://evil.example", "//evil.example", "/console/../x", "/\\evil.example", "javascript:1"):
            assert (await client.get(await begun(client, target))).headers["location"] == "/console", target


async def test_tokens_that_do_not_hold(serve: Serve, provider: OpenIdProvider, tmp_path: Path) -> None:
    """Of another sign-in, audience, party or issuer, expired, or signed with another key."""
    changes: list[dict[str, Any]] = [
        {"nonce": "another"}, {"nonce": None}, {"nonce": 5}, {"aud": "modelpress"}, {"aud": None}, {"azp": "other"},
        {"iss": "https://evil.example"}, {"exp": time.time() - 60},
    ]  # fmt: skip
    async with console(serve, provider, tmp_path) as client:
        for change in changes:
            provider.changes = change
            assert (await client.get(await begun(client))).status_code == 401, change
        provider.changes = {}
        back = await begun(client)
        assert (await client.get(back)).status_code == 303  # its keys are known now
        back, right, provider.key = await begun(client), provider.key, new_key()
        assert (await client.get(back)).status_code == 401
        provider.key = right


async def test_a_sign_in_expires(provider: OpenIdProvider) -> None:
    """Who comes back too late begins again."""
    clock = ManualClock()
    settings = Settings(
        console=True, http_listen="127.0.0.1:0", jwt_issuer=provider.issuer, jwt_audience="modelpress",
        console_client_id=CLIENT, console_url="https://compress.example",
    )  # fmt: skip
    at_provider = Provider(settings, clock)
    url, key = await at_provider.begin("/console")
    state = parse_qs(urlsplit(url).query)["state"][0]
    clock.advance(PENDING_S + 1)
    with pytest.raises(UnauthenticatedError, match="too long ago"):
        await at_provider.finish(key, {"state": state, "code": "code-0"})
    assert provider.requests == []


def test_what_cannot_be_set() -> None:
    """An address that somebody between could change, one with a path, and parts without the others."""
    good: dict[str, Any] = {
        "console": True, "http_listen": "127.0.0.1:0", "jwt_issuer": "https://id.example", "jwt_audience": "m",
        "console_client_id": CLIENT, "console_url": "https://compress.example",
    }  # fmt: skip
    Settings(**good)
    Settings(**{**good, "console_url": "http://localhost:9464/"})
    for change in (
        {"console_url": "http://compress.example"}, {"console_url": "https://compress.example/x"},
        {"console_url": "https://"}, {"console_url": None}, {"console": False}, {"console_client_id": None},
        {"jwt_issuer": None, "jwt_audience": None}, {"console_url": "https://u@compress.example"},
    ):  # fmt: skip
        with pytest.raises(SettingsError, match="console_"):
            Settings(**{**good, **change})
