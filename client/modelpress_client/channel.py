"""The gRPC channel: target, TLS, token, keepalive, load balancing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import grpc

from modelpress_client.errors import UsageError
from modelpress_client.settings import Settings

KEEPALIVE_TIME_MS = 30_000  # servers answer more frequent pings with GOAWAY
KEEPALIVE_TIMEOUT_MS = 10_000
MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # 16 MiB: pages of jobs; blobs come in chunks of 1 MiB
MIN_RECONNECT_BACKOFF_MS = 200
MAX_RECONNECT_BACKOFF_MS = 5_000

_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def open_channel(settings: Settings) -> grpc.aio.Channel:
    """A channel that connects on first use. Raises UsageError for a bad address or unreadable PEM files."""
    options: list[tuple[str, str | int]] = [
        ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", MIN_RECONNECT_BACKOFF_MS),
        ("grpc.min_reconnect_backoff_ms", int(settings.retry.connect_timeout_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
        ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
        # Asking the DNS for a service config costs seconds where TXT queries are filtered.
        ("grpc.service_config_disable_resolution", 1),
        # Two clients in one process must not share a broken connection or a token's channel.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if settings.is_loopback:
        options.append(("grpc.enable_http_proxy", 0))
    target = _target(settings)
    if settings.uses_tls:
        return grpc.aio.secure_channel(target, _credentials(settings), options=options)
    return grpc.aio.insecure_channel(target, options=options)


def call_metadata(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Metadata of every call."""
    return (("authorization", f"Bearer {settings.token}"),) if settings.token else ()


def _target(settings: Settings) -> str:
    address = settings.address
    match = _HOST_AND_PORT.fullmatch(address)
    if match is not None and 0 < int(match[2]) < 65536:
        return f"dns:///{address}"
    if re.match(r"(dns|unix|unix-abstract|ipv4|ipv6|xds|vsock):.", address):
        return address
    raise UsageError(f"'{settings.server}' is not a server address; write HOST:PORT, for example localhost:50051")


def _credentials(settings: Settings) -> grpc.ChannelCredentials:
    if (settings.cert is None) != (settings.key is None):
        raise UsageError("A client certificate needs both --cert and --key.")
    return grpc.ssl_channel_credentials(
        root_certificates=_pem(settings.ca), private_key=_pem(settings.key), certificate_chain=_pem(settings.cert)
    )


def _pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    if b"-----BEGIN " not in content:
        raise UsageError(f"{path} is not a PEM file.")
    return content
