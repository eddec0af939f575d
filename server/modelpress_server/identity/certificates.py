"""TLS of the server; certificates that were renewed are taken for the next connection, without a restart."""

from __future__ import annotations

import logging
from pathlib import Path

import grpc

from modelpress_server.config import Settings, SettingsError
from modelpress_server.watched_file import signature

logger = logging.getLogger(__name__)


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """None: without TLS. Raises SettingsError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    files = _Files(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        files.read(),
        files.renewed,  # type: ignore[arg-type]  # None is "nothing has changed"; the stubs leave it out
        require_client_authentication=settings.tls_client_ca is not None,
    )
    return credentials


class _Files:
    """Chain, key, and the CA of clients."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._named = {"tls_cert": cert, "tls_key": key, "tls_client_ca": client_ca}
        self._seen = self._signatures()

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises SettingsError."""
        contents = {name: _read(name, path) for name, path in self._named.items() if path is not None}
        pair = (contents["tls_key"], contents["tls_cert"])
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=contents.get("tls_client_ca"))

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC for each connection, from a thread of its own; None: nothing has changed."""
        seen = self._signatures()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            found = self.read()
        except SettingsError as error:
            logger.error("%s The certificate that was read last is used.", error)
            return None
        logger.info("tls_cert: the certificate was read again")
        return found

    def _signatures(self) -> list[object]:
        return [signature(path) for path in self._named.values() if path is not None]


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}: cannot read {path}: {error.strerror}.") from error
