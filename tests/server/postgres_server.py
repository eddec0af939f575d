"""A PostgreSQL server of its own in a temporary folder, listening on a socket there and on 127.0.0.1."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0
USER = "tester"


class NotHereError(Exception):
    """There is no PostgreSQL; the message says what is missing."""


def programs() -> Path:
    """The folder of `postgres` and `initdb`, Debian's or on the path. Raises NotHereError."""
    found = shutil.which("postgres")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if all((folder / name).is_file() for name in ("postgres", "initdb", "pg_isready")):
            return folder
    raise NotHereError("no PostgreSQL server: apt-get install postgresql")


@contextmanager
def postgres_server() -> Iterator[str]:
    """Runs a server while it lasts; the URL of its database `postgres`. Raises NotHereError."""
    bin_folder, as_user = programs(), _unprivileged()
    # Not below pytest's folder, which other users may not enter.
    with tempfile.TemporaryDirectory(prefix="modelpress-postgres-", ignore_cleanup_errors=True) as folder:
        yield from _serve(Path(folder), bin_folder, as_user)


def _serve(folder: Path, bin_folder: Path, as_user: tuple[str, list[str]] | None) -> Iterator[str]:
    data = folder / "data"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    if as_user:
        shutil.chown(folder, as_user[0])
    prefix = as_user[1] if as_user else []
    subprocess.run(
        [*prefix, bin_folder / "initdb", "-D", data, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync"],
        check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    options = [
        f"-cunix_socket_directories={folder}",
        "-cfsync=off",
        "-cmax_connections=200",
        "-clisten_addresses=127.0.0.1",
    ]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*prefix, bin_folder / "postgres", "-D", data, "-p", str(port), *options],
            stdout=log, stderr=log, cwd="/",
        )  # fmt: skip
        try:
            _wait(bin_folder, port, server, folder / "log")
            yield f"postgresql://{USER}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(2)  # SIGINT: ends the sessions, then the server
            server.wait(60)


def _unprivileged() -> tuple[str, list[str]] | None:
    """As root, a user to run it as, since it refuses to run as root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if shutil.which("setpriv"):
            ids = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
            return name, ["setpriv", *ids, "--"]
    raise NotHereError("PostgreSQL does not run as root, and there is no setpriv")


def _wait(bin_folder: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        ready = [bin_folder / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
        if subprocess.run(ready, check=False).returncode == 0:
            return
        time.sleep(0.05)
    raise AssertionError(log.read_text("utf-8", "replace"))
