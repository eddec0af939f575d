"""Settings of the server: one frozen dataclass, from which the command line and the TOML file are made."""

# ruff: noqa: RUF009  -- `_setting` returns what `dataclasses.field` does

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
TOKENS_NAME = "tokens.json"  # in the data folder; kept by `compress-server token`
WORKER_STARTS = ("fork", "exec")
SANDBOX_MODES = ("auto", "require", "off")
# One gRPC message must hold a chunk and its frame; above this, gRPC answers RESOURCE_EXHAUSTED by itself.
MAX_MESSAGE_BYTES = 4 * MIB


class SettingsError(ValueError):
    """A setting that the server cannot start with; the message names it and says what to do."""


def default_data_dir() -> Path:
    """Where a user's own server keeps its data; `compress-client --local` looks in the same place."""
    return platformdirs.user_data_path("modelpress") / "server"


def default_worker_memory_bytes() -> int:
    """Four fifths of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 4 // 5


def _cores(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise SettingsError(f"measure_cores: {text!r} is not a list of processors, such as 2,3 or 2-3.")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def _host_of(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and int(port) < 65536


def _is_url(text: str) -> bool:
    scheme, separator, rest = text.partition("://")
    return bool(separator) and scheme in ("http", "https") and _is_address(rest.rstrip("/"))


def _setting(default: Any, text: str, *, kind: str = "", choices: tuple[str, ...] = (), secret: bool = False) -> Any:
    """A field with what the command line needs to know of it; `kind` is bytes, seconds, count, path or flag.

    `secret`: it may hold one, and is not shown.
    """
    metadata = {"help": text, "kind": kind, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. Units stand in the names; a limit of 0 means "none" only where the help says so."""

    listen: str = _setting("127.0.0.1:50051", "HOST:PORT to serve on; port 0: any free one.")
    http_listen: str | None = _setting(
        None,
        "HOST:PORT for metrics (/metrics, Prometheus) and probes (/livez, /readyz) over HTTP; port 0: any free one; "
        "not set: none.",
    )
    console: bool = _setting(
        False, "Serve the read-only console (/console) on --http-listen: projects, queue, jobs, reports.", kind="flag"
    )
    console_url: str | None = _setting(
        None, "Where browsers find the console, such as https://compress.example: to come back from the provider."
    )
    console_client_id: str | None = _setting(
        None, "The console's client id at --jwt-issuer: people sign in there. Its tokens are taken as callers' as well."
    )
    console_client_secret: Path | None = _setting(
        None, "File with the secret of --console-client-id; not set: the provider asks for none (PKCE).", kind="path"
    )
    otlp_endpoint: str | None = _setting(
        None,
        "Send traces there (OTLP over gRPC), such as http://127.0.0.1:4317; https:// with TLS; not set: none are kept.",
    )
    data_dir: Path = _setting(default_data_dir, "Folder for blobs, jobs and models; one server at a time.", kind="path")
    database: str | None = _setting(
        None,
        "postgresql://USER@HOST/DATABASE that servers share; not set: a file in the data folder. Passwords are better "
        "in the environment (PGPASSWORD, PGPASSFILE).",
        secret=True,
    )
    blobs: str | None = _setting(
        None,
        "s3://BUCKET/PREFIX that servers share; not set: the data folder. Keys are taken from the environment "
        "(AWS_ACCESS_KEY_ID and so on) or the machine's role; AWS_ENDPOINT_URL names a service other than AWS.",
    )
    lease_s: float = _setting(
        20.0,
        "With --database: the jobs of a server that was not heard of for so long are given to others.",
        kind="seconds",
    )
    workers: int = _setting(
        1,
        "Jobs that run at the same time. Each measures latency: more than one disturb each other. 0, with --database: "
        "none, and models are not looked at either; others do that (`compress-server work`).",
    )
    worker_start: str = _setting(
        "fork",
        "fork: workers come from a process that has done their imports, which keeps some 400 MB; exec: each does its "
        "own, in seconds.",
        choices=WORKER_STARTS,
    )
    measure_cores: str | None = _setting(
        None, "Processors that latency is measured on, as 2,3 or 2-3; best ones that nothing else is given."
    )

    ray_address: str | None = _setting(
        None,
        "Run jobs on the nodes of a Ray cluster, such as ray://HOST:10001; needs --blobs. Not set: on this machine.",
    )
    node_workers: int = _setting(1, "With --ray-address: tasks at a time on each node, which must have as many CPUs.")
    node_dir: Path | None = _setting(
        None,
        "With --ray-address: folder on each node for working folders; not set: one in its folder for temporary files.",
        kind="path",
    )
    measure_on: str | None = _setting(
        None,
        "With --ray-address: label of the nodes that measure, KEY or KEY=VALUE; jobs run on these alone. Not set: on "
        "all.",
    )

    tls_cert: Path | None = _setting(
        None, "Certificate chain of the server (PEM); with --tls-key, turns TLS on.", kind="path"
    )
    tls_key: Path | None = _setting(None, "Private key of the server (PEM).", kind="path")
    tls_client_ca: Path | None = _setting(
        None, "CA certificates (PEM): only clients with a certificate of theirs.", kind="path"
    )
    token: str | None = _setting(
        None, "Token that clients must send. Better in the environment or in --token-file.", secret=True
    )
    token_file: Path | None = _setting(
        None,
        "File of tokens, one a line: TOKEN [PROJECT[:ROLE] ...], or sha256:HEX as TOKEN; without projects for all.",
        kind="path",
    )
    jwt_issuer: str | None = _setting(
        None, "Take web tokens (OpenID Connect) of this issuer, as their claim iss spells it; needs --jwt-audience."
    )
    jwt_audience: str | None = _setting(None, "What the web tokens' claim aud must hold.")
    jwt_keys: str | None = _setting(
        None, "The issuer's public keys (JWKS): a file, or an https URL; not set: where the issuer says (discovery)."
    )
    jwt_claim: str = _setting("modelpress", "Claim of the web tokens that grants roles: {PROJECT: ROLE}.")
    webhooks: Path | None = _setting(
        None,
        "TOML file with a table for each place that is told when jobs end; read again when it changes.",
        kind="path",
    )
    audit_log: Path | None = _setting(
        None, "File for a line of JSON on each call that changes something; not set: the log.", kind="path"
    )
    insecure: bool = _setting(False, "Serve other machines without TLS and authentication.", kind="flag")

    sandbox: str = _setting(
        "auto", "How workers are confined; require: refuse to start with less than level 2.", choices=SANDBOX_MODES
    )
    worker_uid: int = _setting(
        60_600,
        "First of 500 user ids that workers run as, one each, where the server is root and may change users; 0: as "
        "the server's own.",
    )
    worker_memory_bytes: int = _setting(
        default_worker_memory_bytes, "Memory limit of one worker; 0: none. Default: 4/5 of the machine.", kind="bytes"
    )
    run_time_limit_s: float = _setting(3600.0, "Longest run of one attempt of a job.", kind="seconds")
    inspect_time_limit_s: float = _setting(300.0, "Longest inspection of a model.", kind="seconds")

    max_blob_bytes: int = _setting(16 * GIB, "Largest file that can be uploaded, and largest artifact.", kind="bytes")
    projects_file: Path | None = _setting(
        None,
        "TOML file with a table for each project that has other limits or another weight; read again when it changes.",
        kind="path",
    )
    max_queued_jobs: int = _setting(100, "Most queued jobs of one project.")
    max_running_jobs: int = _setting(0, "Most jobs of one project that run at the same time; 0: no limit.")
    max_models: int = _setting(10_000, "Most models of one project; 0: no limit.")
    max_pending_models: int = _setting(100, "Most models of one project that wait for inspection; 0: no limit.")
    findings_bytes: int = _setting(
        GIB,
        "Most that is kept of what a project's jobs have found out, so that another question about the same model and "
        "data is answered soon; 0: nothing.",
        kind="bytes",
    )
    requests_per_s: float = _setting(
        0.0, "Most requests of one project a second, on average over ten seconds; 0: no limit."
    )
    max_open_uploads: int = _setting(32, "Most unfinished uploads of one project.")
    max_stored_bytes: int = _setting(
        0, "Most bytes that one project has stored, unfinished uploads included; 0: no limit.", kind="bytes"
    )
    max_chunk_bytes: int = _setting(2 * MIB, "Largest chunk of an upload.", kind="bytes")
    ack_interval_bytes: int = _setting(
        16 * MIB, "Uploaded bytes are made durable and acknowledged so often.", kind="bytes"
    )
    reserve_bytes: int = _setting(256 * MIB, "Disk space that uploads leave free.", kind="bytes")

    max_connections: int = _setting(
        1000, "Most connections at a time; at most half of the descriptors that the process may have."
    )
    handshake_timeout_s: float = _setting(
        10.0, "A connection that has not said what it wants within so long is closed.", kind="seconds"
    )
    connection_idle_s: float = _setting(
        600.0, "A connection without a call for so long is closed; clients connect again by themselves.", kind="seconds"
    )

    upload_idle_timeout_s: float = _setting(
        60.0, "An upload stream without bytes for so long is closed.", kind="seconds"
    )
    upload_takeover_s: float = _setting(
        10.0, "A writer that was silent for so long gives way to a new one.", kind="seconds"
    )
    upload_ttl_s: float = _setting(
        24 * 3600.0, "An unfinished upload is dropped so long after its last byte.", kind="seconds"
    )
    blob_ttl_s: float = _setting(
        24 * 3600.0, "A blob that no model or job uses is removed after so long.", kind="seconds"
    )
    job_ttl_s: float = _setting(
        0.0, "An ended job without the label pin is deleted so long after its end; 0: never.", kind="seconds"
    )
    model_ttl_s: float = _setting(
        0.0,
        "A model without the label pin is deleted so long after its last change or its last job; 0: never.",
        kind="seconds",
    )
    event_ttl_s: float = _setting(
        30 * 24 * 3600.0, "Events of a job are dropped so long after its end; its log stays.", kind="seconds"
    )
    janitor_interval_s: float = _setting(300.0, "How often the server cleans up.", kind="seconds")
    scrub_interval_s: float = _setting(
        7 * 24 * 3600.0, "How often each stored file is read again, to find damage.", kind="seconds"
    )
    scrub_bytes_per_s: int = _setting(4 * MIB, "At how many bytes a second at most; 0: never.", kind="bytes")

    heartbeat_s: float = _setting(15.0, "An idle watch stream carries a heartbeat so often.", kind="seconds")
    drain_grace_s: float = _setting(
        5.0, "SIGTERM: running jobs may finish for so long, then are queued again.", kind="seconds"
    )
    log_level: str = _setting("info", "How much is logged to stderr.", choices=("debug", "info", "warning", "error"))
    log_format: str = _setting(
        "console", "How a line of the log looks: for people, or as JSON for programs.", choices=("console", "json")
    )

    def __post_init__(self) -> None:
        self._require(0 <= self.worker_uid < 2**31, "worker_uid", "a user id or 0")
        self._require(self.workers >= 0, "workers", "at least 0")
        if self.workers == 0 and self.database is None:
            raise SettingsError("workers: with none here others must share the jobs: set --database as well.")
        for name in ("max_connections", "max_queued_jobs", "max_open_uploads"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_blob_bytes", "ack_interval_bytes"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in (
            "max_running_jobs",
            "max_models",
            "max_pending_models",
            "max_stored_bytes",
            "requests_per_s",
            "scrub_bytes_per_s",
            "findings_bytes",
        ):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("job_ttl_s", "model_ttl_s"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("worker_memory_bytes", "reserve_bytes", "drain_grace_s", "upload_takeover_s"):
            self._require(getattr(self, name) >= 0, name, "at least 0")
        for name in ("run_time_limit_s", "inspect_time_limit_s", "upload_idle_timeout_s", "upload_ttl_s", "blob_ttl_s"):
            self._require(getattr(self, name) > 0, name, "more than 0")
        for name in ("handshake_timeout_s", "connection_idle_s", "lease_s"):
            self._require(getattr(self, name) > 0, name, "more than 0")
        for name in ("event_ttl_s", "janitor_interval_s", "scrub_interval_s", "heartbeat_s"):
            self._require(getattr(self, name) > 0, name, "more than 0")
        self._require(
            1024 <= self.max_chunk_bytes <= MAX_MESSAGE_BYTES - 64 * KIB, "max_chunk_bytes", "1 KiB to 3.9 MiB"
        )
        self._require(self.sandbox in SANDBOX_MODES, "sandbox", " or ".join(SANDBOX_MODES))
        self._require(self.worker_start in WORKER_STARTS, "worker_start", " or ".join(WORKER_STARTS))
        if unusable := sorted(set(self.measure_core_numbers) - os.sched_getaffinity(0)):
            may = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            raise SettingsError(f"measure_cores: the server may not run on {unusable[0]}; it may on {may}.")
        if self.database is not None and self.blobs is None:
            raise SettingsError(
                "database: servers that share a database share their files as well: set --blobs s3://BUCKET/PREFIX."
            )
        self._check_cluster()
        # Workers have a current folder of their own: a relative path would be another one there.
        object.__setattr__(self, "data_dir", self.data_dir.expanduser().absolute())
        self._check_exposure()

    @property
    def measure_core_numbers(self) -> tuple[int, ...]:
        """The processors of `measure_cores`; empty: any. Raises SettingsError."""
        return () if self.measure_cores is None else _cores(self.measure_cores)

    @property
    def host(self) -> str:
        """Host of `listen`, without the brackets of an IPv6 address."""
        return _host_of(self.listen)

    @property
    def port(self) -> int:
        """Port of `listen`."""
        return _port_of(self.listen)

    @property
    def http_host(self) -> str:
        """Host of `http_listen`, without the brackets of an IPv6 address; empty: it is not set."""
        return _host_of(self.http_listen or "")

    @property
    def http_port(self) -> int:
        """Port of `http_listen`, which is set."""
        return _port_of(self.http_listen or "")

    @property
    def tls(self) -> bool:
        """Whether the server speaks TLS."""
        return self.tls_cert is not None

    @property
    def authenticates(self) -> bool:
        """Whether a client must prove who it is."""
        return self.tls_client_ca is not None or self.asks_for_tokens

    @property
    def asks_for_tokens(self) -> bool:
        """Whether a client must send a token, whatever its certificate."""
        given = (self.token, self.token_file, self.jwt_issuer)
        return any(value is not None for value in given) or (self.data_dir / TOKENS_NAME).exists()

    def _check_cluster(self) -> None:
        self._require(self.node_workers >= 1, "node_workers", "at least 1")
        if self.ray_address is not None and self.blobs is None:
            raise SettingsError("ray_address: nodes take files from a bucket: set --blobs s3://BUCKET/PREFIX.")
        for name in ("node_dir", "measure_on"):
            if getattr(self, name) is not None and self.ray_address is None:
                raise SettingsError(f"{name} is for the nodes of a cluster: set --ray-address as well.")
        if self.measure_on is not None:
            self._require(bool(self.measure_on.partition("=")[0]), "measure_on", "KEY or KEY=VALUE")
        if self.node_dir is not None and not self.node_dir.is_absolute():
            raise SettingsError(f"node_dir: {self.node_dir} is not absolute, as a folder on other machines must be.")

    def _check_exposure(self) -> None:
        self._require(_is_address(self.listen), "listen", "HOST:PORT")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("tls_cert and tls_key go together; set both or none.")
        if (self.jwt_issuer is None) != (self.jwt_audience is None):
            raise SettingsError("jwt_issuer and jwt_audience go together; set both or none.")
        if self.jwt_keys is not None and self.jwt_issuer is None:
            raise SettingsError("jwt_keys goes with jwt_issuer and jwt_audience; set all or none.")
        if self.tls_client_ca is not None and not self.tls:
            raise SettingsError("tls_client_ca needs tls_cert and tls_key.")
        protected = self.tls and self.authenticates
        if self.host not in LOOPBACK_HOSTS and not protected and not self.insecure:
            raise SettingsError(
                f"listen {self.listen}: other machines are served only with TLS (--tls-cert, --tls-key) and "
                "authentication (`compress-server token add`, --token-file, --jwt-issuer or --tls-client-ca). Set "
                "them, listen on 127.0.0.1, or say --insecure."
            )
        self._check_http_exposure()
        self._check_sign_in()
        if self.otlp_endpoint is not None and not _is_url(self.otlp_endpoint):
            raise SettingsError(f"otlp_endpoint: {self.otlp_endpoint} is not http://HOST:PORT or https://HOST:PORT.")

    def _check_http_exposure(self) -> None:
        if self.http_listen is None:
            if self.console:
                raise SettingsError("console: it is served over HTTP; say where with --http-listen HOST:PORT.")
            return
        self._require(_is_address(self.http_listen), "http_listen", "HOST:PORT")
        # Certificates of clients are asked for by gRPC alone: probes have none.
        protected = self.tls and self.asks_for_tokens
        if self.http_host not in LOOPBACK_HOSTS and not protected and not self.insecure:
            raise SettingsError(
                f"http_listen {self.http_listen}: other machines are served only with TLS (--tls-cert, --tls-key) and "
                "tokens (`compress-server token add`, --token-file or --jwt-issuer). Set them, listen on 127.0.0.1, or "
                "say --insecure."
            )

    def _check_sign_in(self) -> None:
        if self.console_client_id is None:
            if self.console_url is not None or self.console_client_secret is not None:
                raise SettingsError("console_url and console_client_secret go with console_client_id.")
            return
        if not self.console or self.jwt_issuer is None or self.console_url is None:
            raise SettingsError("console_client_id needs --console, --console-url and --jwt-issuer.")
        url = urlsplit(self.console_url)
        plain = url.scheme == "http" and url.hostname in LOOPBACK_HOSTS
        bare = bool(url.hostname) and url.path in ("", "/") and not (url.query or url.fragment or url.username)
        self._require(bare and (url.scheme == "https" or plain), "console_url", "https://HOST[:PORT]")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise SettingsError(f"{name}: {getattr(self, name)} is not {expected}.")
