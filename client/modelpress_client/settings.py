"""How to reach a server, and how patient to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_SERVER = "localhost:50051"
DEFAULT_PROJECT = "default"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1", "ip6-localhost")


@dataclass(frozen=True)
class RetryPolicy:
    """Times in seconds. `give_up_s` counts from the last progress, so a long transfer may survive many cuts."""

    connect_timeout_s: float = 5.0
    starting_s: float = 1.0  # an address that refuses to connect may be that of a server that is starting
    call_timeout_s: float = 60.0  # one attempt of one unary call
    idle_timeout_s: float = 60.0  # a transfer on which no byte moves
    watch_idle_timeout_s: float = 90.0  # a watch without even a heartbeat
    give_up_s: float = 120.0
    initial_backoff_s: float = 0.2
    max_backoff_s: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be greater than 0")


@dataclass(frozen=True)
class Settings:
    """Where the server is and who calls.

    server: `HOST:PORT`, `https://HOST:PORT` (TLS with the system's authorities), or any gRPC target (`unix:/path`).
    token: bearer token. ca, cert, key: PEM files; any of them turns TLS on.
    """

    server: str = DEFAULT_SERVER
    project: str = DEFAULT_PROJECT
    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    retry: RetryPolicy = RetryPolicy()

    @property
    def parent(self) -> str:
        """Resource name of the project."""
        return f"projects/{self.project}"

    @property
    def uses_tls(self) -> bool:
        """Whether the channel is encrypted."""
        return self.server.startswith("https://") or any((self.ca, self.cert, self.key))

    @property
    def address(self) -> str:
        """The server without a URL scheme."""
        return self.server.removeprefix("https://").removeprefix("http://").rstrip("/")

    @property
    def is_loopback(self) -> bool:
        """Whether nothing leaves this machine."""
        return self.address.startswith("unix:") or self.address.rsplit(":", 1)[0] in LOOPBACK
