"""An OpenID provider on 127.0.0.1: discovery, keys, the authorization code flow with PKCE. Everybody is signed in."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

CLIENT, SECRET = "console", "s3cret/+&"


def new_key() -> rsa.RSAPrivateKey:
    """One that signs."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class OpenIdProvider:
    """`changes`: of the claims of the next ID tokens; None leaves one out. `requests`: what the token endpoint got."""

    def __init__(self) -> None:
        self.redirect_uri = ""
        self.changes: dict[str, Any] = {}
        self.requests: list[dict[str, str]] = []
        self.key = new_key()
        self._codes: dict[str, dict[str, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.issuer = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def serving(self) -> Iterator[OpenIdProvider]:
        """Until the block ends."""
        thread = Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    def authorize(self, query: dict[str, str]) -> str:
        """Where the browser goes. Raises ValueError for what no provider takes."""
        asked = (query["response_type"], query["client_id"], query["redirect_uri"], query["code_challenge_method"])
        if asked != ("code", CLIENT, self.redirect_uri, "S256") or "openid" not in query["scope"].split():
            raise ValueError(asked)
        code = f"code-{len(self._codes)}"
        self._codes[code] = query
        return f"{self.redirect_uri}?{urlencode({'code': code, 'state': query['state'], 'iss': self.issuer})}"

    def exchange(self, form: dict[str, str], authorization: str) -> dict[str, Any]:
        """The answer of the token endpoint. Raises KeyError, ValueError."""
        self.requests.append(form)
        asked = self._codes.pop(form["code"])
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form["code_verifier"].encode()).digest()).rstrip(b"=")
        client, _, secret = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        given = dict(parse_qsl(f"s={secret}"))["s"]
        sent = (client, given, form["grant_type"], form["redirect_uri"], challenge.decode())
        if sent != (CLIENT, SECRET, "authorization_code", self.redirect_uri, asked["code_challenge"]):
            raise ValueError(sent)
        return {"access_token": "opaque", "token_type": "Bearer", "id_token": self.token(nonce=asked["nonce"])}

    def token(self, **claims: Any) -> str:
        """An ID token."""
        now = time.time()
        given = {"iss": self.issuer, "aud": CLIENT, "sub": "ann", "iat": now, "exp": now + 600,
                 "modelpress": {"a": "reader"}, **claims, **self.changes}  # fmt: skip
        kept = {name: value for name, value in given.items() if value is not None}
        return jwt.encode(kept, self.key, "RS256", headers={"kid": "one"})

    def document(self, path: str) -> dict[str, Any] | None:
        """What a path says; None: nothing is there."""
        if path == "/.well-known/openid-configuration":
            names = {"authorization_endpoint": "/authorize", "token_endpoint": "/token", "jwks_uri": "/keys"}
            return {"issuer": self.issuer, **{name: self.issuer + where for name, where in names.items()}}
        if path == "/keys":
            algorithm = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256)
            return {"keys": [{**json.loads(algorithm.to_jwk(self.key.public_key())), "kid": "one", "use": "sig"}]}
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                if url.path == "/authorize":
                    query = {name: values[0] for name, values in parse_qs(url.query).items()}
                    self.send_response(302)
                    self.send_header("Location", provider.authorize(query))
                    self.end_headers()
                    return
                self._answer(provider.document(url.path))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                form = {name: values[0] for name, values in parse_qs(body).items()}
                try:
                    self._answer(provider.exchange(form, self.headers.get("Authorization", "")))
                except (KeyError, ValueError):
                    self._answer({"error": "invalid_grant"}, 400)

            def _answer(self, document: dict[str, Any] | None, status: int = 200) -> None:
                content = json.dumps(document).encode()
                self.send_response(404 if document is None else status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
