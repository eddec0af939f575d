"""Certificates for tests."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Authority:
    """A certificate authority for 127.0.0.1, made with the openssl command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file, self._key = folder / "authority.pem", folder / "authority.key"
        self._openssl("-subj", "/CN=authority", "-keyout", self._key, "-out", self.file)

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files."""
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        signer = ("-CA", self.file, "-CAkey", self._key, "-addext", "subjectAltName=IP:127.0.0.1")
        leaf = ("-addext", "basicConstraints=critical,CA:FALSE")
        self._openssl("-subj", f"/CN={name}", "-keyout", key, "-out", cert, *signer, *leaf)
        return cert, key

    def _openssl(self, *options: str | Path) -> None:
        new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1")
        subprocess.run(["openssl", *new, *options], check=True, capture_output=True)
