"""Connections and descriptors: strangers who connect and say nothing must not use up what jobs need."""

from __future__ import annotations

import logging
import resource

from modelpress_server.config import Settings

logger = logging.getLogger(__name__)

# Beyond this nothing is gained, and some libraries look at every number up to the limit.
MAX_DESCRIPTORS = 65_536


def raise_descriptor_limit() -> None:
    """Lets this process open as many files as it may: the usual soft limit, 1,024, is for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def connection_options(settings: Settings) -> tuple[tuple[str, int], ...]:
    """gRPC's options that bound connections; a connection needs one descriptor."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = settings.max_connections if soft == resource.RLIM_INFINITY else min(settings.max_connections, soft // 2)
    if most < settings.max_connections:
        logger.warning(
            "at most %d connections instead of %d: this process may open %d files only",
            most,
            settings.max_connections,
            soft,
        )
    return (
        ("grpc.max_allowed_incoming_connections", most),
        ("grpc.server_handshake_timeout_ms", round(settings.handshake_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", round(settings.connection_idle_s * 1000)),
    )
