"""Web tokens: what is taken, what is refused, and keys that change."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from manual_clock import ManualClock
from modelpress_protos.v1 import job_service_pb2, upload_service_pb2
from modelpress_server.config import Settings, SettingsError
from modelpress_server.identity import jwt as jwt_module
from modelpress_server.identity.jwt import KEYS_FRESH_S, REFETCH_S, JwtVerifier, KeySource
from modelpress_server.identity.roles import Role
from modelpress_server.interceptors import RECHECK_S
from server_harness import PROJECT, Client, Serve, chunks, digest_of, failing, until

ISSUER, AUDIENCE = "https://id.example", "modelpress"


class Provider:
    """An OpenID provider's keys, and tokens that it signs."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}

    def rotate(self, key_id: str) -> None:
        self.keys[key_id] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def document(self, *key_ids: str) -> str:
        algorithm = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256)
        keys = [
            {**json.loads(algorithm.to_jwk(self.keys[key_id].public_key())), "kid": key_id, "use": "sig"}
            for key_id in key_ids
        ]
        return json.dumps({"keys": keys})

    def token(self, key_id: str, **changes: Any) -> str:
        now = time.time()
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": now + 600, "modelpress": {"default": "reader"}}
        claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
        return jwt.encode(claims, self.keys[key_id], "RS256", headers={"kid": key_id})


@pytest.fixture(scope="module")
def provider() -> Provider:
    made = Provider()
    made.rotate("one")
    made.rotate("two")
    return made


def signed_with_a_secret(claims: dict[str, Any], secret: bytes) -> str:
    """By hand: the library would not sign with what looks like a public key."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "kid": "one"}, claims)]
    text = b".".join(jwt.utils.base64url_encode(part) for part in parts)
    signature = hmac.digest(secret, text, "sha256")
    return (text + b"." + jwt.utils.base64url_encode(signature)).decode()


def settings(keys: str | None) -> Settings:
    return Settings(jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_keys=keys)


@pytest.fixture
def verifier(provider: Provider, tmp_path: Path) -> JwtVerifier:
    file = tmp_path / "jwks.json"
    file.write_text(provider.document("one"))
    return JwtVerifier(settings(str(file)), KeySource(str(file), ISSUER, ManualClock()))


async def test_a_good_one(verifier: JwtVerifier, provider: Provider) -> None:
    """The subject is who calls; the claim grants roles, as a table or a list; without it no project exists."""
    caller = await verifier.verify(provider.token("one"))
    assert caller is not None
    assert (caller.name, caller.role("default"), caller.role("b")) == ("jwt:ann", Role.READER, None)
    caller = await verifier.verify(provider.token("one", modelpress=["b:submitter", "*:reader"]))
    assert caller is not None
    assert (caller.role("b"), caller.role("c")) == (Role.SUBMITTER, Role.READER)
    caller = await verifier.verify(provider.token("one", modelpress=None))
    assert caller is not None
    assert caller.role("default") is None


async def test_bad_ones(verifier: JwtVerifier, provider: Provider) -> None:
    """Another issuer or audience, outside its time, without claims, a claim that is no grant, unknown or other keys."""
    now = time.time()
    changes: list[dict[str, Any]] = [
        {"iss": "https://evil.example"}, {"aud": "other"}, {"exp": now - 60}, {"nbf": now + 600}, {"exp": None},
        {"sub": None}, {"aud": None}, {"iss": None}, {"modelpress": {"default": "boss"}}, {"modelpress": "*:admin"},
        {"modelpress": {"../a": "admin"}}, {"modelpress": 5}, {"sub": 5},
    ]  # fmt: skip
    for change in changes:
        assert await verifier.verify(provider.token("one", **change)) is None, change
    assert await verifier.verify(provider.token("two")) is None
    for text in ("", "a.b.c", "..", "é.é.é", provider.token("one")[:-4] + "AAAA", "x" * 100_000):
        assert await verifier.verify(text) is None


async def test_signatures_that_anybody_can_make(verifier: JwtVerifier, provider: Provider, tmp_path: Path) -> None:
    """No signature, one with the public key as a secret, one of another kind of key with a known id."""
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": time.time() + 600, "modelpress": {"*": "admin"}}
    assert await verifier.verify(jwt.encode(claims, None, "none", headers={"kid": "one"})) is None
    secret = provider.document("one").encode()
    assert await verifier.verify(signed_with_a_secret(claims, secret)) is None
    other = ec.generate_private_key(ec.SECP256R1())
    assert await verifier.verify(jwt.encode(claims, other, "ES256", headers={"kid": "one"})) is None
    file = tmp_path / "shared.json"
    file.write_text(
        json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0" * 8, "kid": "one"}, *json.loads(secret)["keys"]]})
    )
    shared = JwtVerifier(settings(str(file)), KeySource(str(file), ISSUER, ManualClock()))
    known = jwt.utils.base64url_decode("c2VjcmV0" * 8)
    assert await shared.verify(signed_with_a_secret(claims, known)) is None


async def test_a_verified_one_is_remembered_for_a_while(verifier: JwtVerifier, provider: Provider) -> None:
    """So that it is answered without work; no longer than its time, and than keys are kept without a look."""
    token = provider.token("one")
    assert verifier.remembered(token, time.time()) is None
    assert await verifier.verify(token) is not None
    assert verifier.remembered(token, time.time()) is not None
    assert verifier.remembered(token, time.time() + KEYS_FRESH_S + 1) is None
    assert verifier.knows(token)
    short = provider.token("one", exp=time.time() + 10)
    assert await verifier.verify(short) is not None
    assert verifier.remembered(short, time.time() + 11) is None


async def test_keys_in_a_file_change(provider: Provider, tmp_path: Path) -> None:
    """A key that the file names from now on is known, one that it names no longer is not."""
    file = tmp_path / "jwks.json"
    file.write_text(provider.document("one"))
    verifier = JwtVerifier(settings(str(file)), KeySource(str(file), ISSUER, ManualClock()))
    file.write_text(provider.document("two"))
    assert await verifier.verify(provider.token("two")) is not None
    assert await verifier.verify(provider.token("one")) is None
    (tmp_path / "wrong").write_text("[]")
    with pytest.raises(SettingsError, match="no set of keys"):
        KeySource(str(tmp_path / "wrong"), ISSUER, ManualClock())
    with pytest.raises(SettingsError, match="over https only"):
        KeySource("http://id.example/keys", ISSUER, ManualClock())


class KeyServer:
    """Serves a document of keys on 127.0.0.1 and counts how often it was asked."""

    def __init__(self) -> None:
        self.document, self.asked = "", 0
        self.documents: dict[str, str] = {}  # by path; others are `document`
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                document = outer.documents.get(self.path, outer.document)
                self.send_response(200 if document else 500)
                self.end_headers()
                self.wfile.write(document.encode())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/keys"
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def key_server() -> Iterator[KeyServer]:
    made = KeyServer()
    yield made
    made.server.shutdown()
    made.server.server_close()


async def test_keys_of_an_url_rotate(provider: Provider, key_server: KeyServer, clock: ManualClock) -> None:
    """An unknown key is looked up, but not for every token; a provider that is away leaves the known keys valid."""
    key_server.document = provider.document("one")
    verifier = JwtVerifier(settings(key_server.url), KeySource(key_server.url, ISSUER, clock))
    assert await verifier.verify(provider.token("one")) is not None
    for _ in range(5):
        assert await verifier.verify(provider.token("two")) is None
    assert key_server.asked == 1
    key_server.document = provider.document("one", "two")
    clock.advance(REFETCH_S + 1)
    assert await verifier.verify(provider.token("two")) is not None
    assert key_server.asked == 2
    key_server.document = ""
    clock.advance(1000.0)
    assert await verifier.verify(provider.token("one")) is not None
    assert key_server.asked == 3


async def test_keys_are_found_where_the_provider_says(
    provider: Provider, key_server: KeyServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The document of the issuer names the keys; one that describes another issuer, or no keys, is not used."""
    issuer = key_server.url.removesuffix("/keys")

    def described(**changes: Any) -> KeySource:
        key_server.documents = {
            "/.well-known/openid-configuration": json.dumps({"issuer": issuer, "jwks_uri": key_server.url, **changes}),
            "/keys": provider.document("one"),
        }
        return KeySource(None, issuer, clock)

    assert await described().key("one") is not None
    for wrong, said in (
        ({"issuer": "https://evil.example"}, "describes 'https://evil.example'"),
        ({"jwks_uri": "http://id.example/keys"}, "over https only"),
        ({"jwks_uri": "file:///etc/passwd"}, "over https only"),
        ({"jwks_uri": f"{issuer}/nowhere"}, "cannot be read"),
    ):
        caplog.clear()
        assert await described(**wrong).key("one") is None
        assert said in caplog.text
    with pytest.raises(SettingsError, match="over https only"):
        KeySource(None, "http://id.example", clock)


async def test_in_a_real_server(serve: Serve, provider: Provider, tmp_path: Path) -> None:
    """Beside a static token; a role that is too small is refused."""
    file = tmp_path / "jwks.json"
    file.write_text(provider.document("one"))
    options = {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_keys": str(file), "token": "static"}
    listing = job_service_pb2.ListJobsRequest(parent=PROJECT)
    cancel = job_service_pb2.CancelJobRequest(name=f"{PROJECT}/jobs/{'0' * 26}")
    async with serve(**options) as running:
        jobs = running.client.jobs

        def bearer(token: str) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {token}"),)

        await jobs.ListJobs(listing, metadata=bearer("static"))
        await jobs.ListJobs(listing, metadata=bearer(provider.token("one")))
        failure = await failing(jobs.CancelJob(cancel, metadata=bearer(provider.token("one"))))
        assert failure.reason == "PERMISSION_DENIED"
        failure = await failing(jobs.ListJobs(listing, metadata=bearer(provider.token("one", iss="other"))))
        assert failure.reason == "UNAUTHENTICATED"


async def test_an_expired_one_ends_what_it_began(
    serve: Serve, clock: ManualClock, provider: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream goes on while its token is valid, and ends within RECHECK_S after that."""
    monkeypatch.setattr(jwt_module, "LEEWAY_S", 0.0)
    file = tmp_path / "jwks.json"
    file.write_text(provider.document("one"))
    async with serve(clock, jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_keys=str(file), token="static") as running:
        client = Client(running.client.channel)
        static = (("authorization", "Bearer static"),)
        digest = digest_of(b"{}")
        upload = upload_service_pb2.CreateUploadRequest(parent=PROJECT, digest=digest)
        made = await client.uploads.CreateUpload(upload, metadata=static)
        call = client.uploads.WriteUpload(metadata=(("authorization", f"Bearer {expiring(provider)}"),))
        await call.write(chunks(made.name, b"{", finish=False)[0])
        await running.received(made, 1)
        clock.advance(RECHECK_S)
        await asyncio.sleep(1.1)
        reading = asyncio.ensure_future(call.read())
        await until(lambda: clock.advance(RECHECK_S / 2) or reading.done())
        assert (await failing(reading)).reason == "UNAUTHENTICATED"


def expiring(provider: Provider) -> str:
    """A token for a second."""
    return provider.token("one", exp=time.time() + 1.0, modelpress={"default": "submitter"})


def test_settings_go_together() -> None:
    """An issuer without an audience, or keys without an issuer, are a mistake."""
    with pytest.raises(SettingsError, match="jwt_keys goes with"):
        Settings(jwt_keys="keys.json")
    with pytest.raises(SettingsError, match="go together"):
        Settings(jwt_issuer=ISSUER)
