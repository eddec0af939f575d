"""Who is told when jobs end: a TOML file of the operator's, read again when it changes.

    [ci]
    url = "https://ci.example/hooks/modelpress"
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"     # openssl rand -base64 24
    projects = ["team-a", "team-b"]                         # not given: all
    states = ["SUCCEEDED", "FAILED"]                        # not given: all ends

Only the operator names addresses: a server that asks whatever address a client names could be sent into the operator's
own network.
"""

from __future__ import annotations

import base64
import binascii
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from modelpress_server.config import LOOPBACK_HOSTS, SettingsError
from modelpress_server.names import is_project
from modelpress_server.stores.jobs import ENDED_STATES
from modelpress_server.stores.records import job_state_name
from modelpress_server.watched_file import WatchedFile

MAX_ENDPOINTS = 32
STATES = frozenset(map(job_state_name, ENDED_STATES))
_PREFIX = "whsec_"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
_KEYS = ("url", "secret", "projects", "states")


@dataclass(frozen=True)
class Endpoint:
    """One place. `projects`: empty for all; `secret`: the key of its signatures."""

    name: str
    url: str = field(repr=False)  # it may hold a secret too
    secret: bytes = field(repr=False)
    projects: frozenset[str] = frozenset()
    states: frozenset[str] = STATES

    def wants(self, project: str, state: str) -> bool:
        """Whether it is told that a job of a project ended so."""
        return state in self.states and (not self.projects or project in self.projects)


class Endpoints:
    """All places that are told."""

    def __init__(self, path: Path | None) -> None:
        """None: there are none. Raises SettingsError."""
        self._file = WatchedFile(path, read_endpoints, "webhooks") if path is not None else None

    def all(self) -> Mapping[str, Endpoint]:
        """By name."""
        return self._file.get() if self._file is not None else {}

    def wanting(self, project: str, state: str) -> list[str]:
        """The names of those that are told that a job of a project ended so."""
        return [name for name, endpoint in self.all().items() if endpoint.wants(project, state)]


def read_endpoints(path: Path) -> Mapping[str, Endpoint]:
    """Raises SettingsError, OSError."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SettingsError(f"webhooks: cannot read {path}: {error}") from error
    if len(document) > MAX_ENDPOINTS:
        raise SettingsError(f"webhooks: {path} names {len(document)} places; at most {MAX_ENDPOINTS} are allowed.")
    return {name: _endpoint(f"webhooks: {path}, [{name}]", name, table) for name, table in document.items()}


def _endpoint(where: str, name: str, table: Any) -> Endpoint:
    if not _NAME.fullmatch(name) or not isinstance(table, dict) or not {"url", "secret"} <= table.keys():
        raise SettingsError(f"{where}: is not a table with url and secret; write [NAME], then one setting a line.")
    if unknown := sorted(table.keys() - set(_KEYS)):
        raise SettingsError(f"{where}: there is no setting {unknown[0]}; there are {', '.join(_KEYS)}.")
    projects, states = (_texts(where, key, table.get(key, [])) for key in ("projects", "states"))
    if wrong := sorted(project for project in projects if not is_project(project)):
        raise SettingsError(f"{where}: {wrong[0]!r} is no project's name.")
    if wrong := sorted(states - STATES):
        raise SettingsError(f"{where}: {wrong[0]!r} is no end of a job; there are {', '.join(sorted(STATES))}.")
    return Endpoint(name, _url(where, table["url"]), _secret(where, table["secret"]), projects, states or STATES)


def _texts(where: str, key: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SettingsError(f"{where}: {key} is not a list of texts.")
    return frozenset(value)


def _url(where: str, value: Any) -> str:
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    printable = isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value
    if not printable or not host or "@" in parts.netloc or parts.scheme not in ("http", "https"):
        raise SettingsError(f"{where}: url is not https://HOST/PATH, without a user and a password.")
    if parts.scheme == "http" and host not in LOOPBACK_HOSTS:
        raise SettingsError(f"{where}: url: other machines are told over https only.")
    return str(value)


def _secret(where: str, value: Any) -> bytes:
    try:
        secret = base64.b64decode(str(value).removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if not 24 <= len(secret) <= 64:
        raise SettingsError(
            f"{where}: secret is not 24 to 64 bytes in base64, with or without whsec_ before it. Make one: "
            "openssl rand -base64 32"
        )
    return secret
