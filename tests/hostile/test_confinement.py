"""A confinement that silently is none: what the operator asks for and does not get."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from modelpress_server.sandbox.landlock import landlock_version

pytestmark = pytest.mark.skipif(landlock_version() == 0, reason="this kernel has no Landlock")


def serve(data: Path, import_path: Path, *options: str) -> subprocess.Popen[str]:
    """`compress-server` with one more entry of the import path, which workers must be able to read."""
    return subprocess.Popen(
        [sys.executable, "-m", "modelpress_server", "--listen", "127.0.0.1:0", "--spare-workers", "0",
         "--data-dir", str(data), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(import_path)},
    )  # fmt: skip


@pytest.mark.parametrize("what", ["data folder", "token file"])
def test_what_workers_could_read_is_not_served_with_require(tmp_path: Path, what: str) -> None:
    """The server does not start, and says what lies where, instead of running strangers' code beside its secrets."""
    readable, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    readable.mkdir()
    tokens = (readable if what == "token file" else tmp_path) / "tokens"
    tokens.write_text("secret\n")
    data = readable / "data" if what == "data folder" else elsewhere
    process = serve(data, readable, "--sandbox", "require", "--token-file", str(tokens))
    output, errors = process.communicate()
    assert (process.returncode, output) == (2, "")
    said = " ".join(errors.split())
    exposed = data if what == "data folder" else tokens
    assert f"{exposed} lies below {readable}, which workers must be able to read" in said.replace("│ ", "")


def test_with_auto_the_log_says_so(tmp_path: Path) -> None:
    """It serves, at level 1, and says why."""
    readable = tmp_path / "site"
    readable.mkdir()
    process = serve(readable / "data", readable)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("listening on")
    process.terminate()
    _, errors = process.communicate()
    assert "workers are confined to level 1 only" in errors
    assert f"lies below {readable}" in errors
