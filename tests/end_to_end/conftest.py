"""The product as people run it: a server process, and the command line in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist"
TIMEOUT_S = 280


@dataclass(frozen=True)
class Finished:
    """What one command said and how it ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.stdout)


@dataclass(frozen=True)
class CommandLine:
    """`compress-client` against one server."""

    address: str

    def __call__(self, *arguments: str | Path, cwd: Path | None = None) -> Finished:
        command = [sys.executable, "-m", "modelpress_client", "--server", self.address, *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COMPRESS_")}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=cwd, env=environment
        )
        assert "Traceback" not in done.stdout + done.stderr
        return Finished(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line, and a server on a free port of 127.0.0.1 that ends with the tests."""
    data_dir = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "modelpress_server", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("listening on ")
            yield CommandLine(line.removeprefix("listening on ").strip())
        finally:
            server.terminate()
            assert server.wait() == 0


@pytest.fixture(scope="session")
def example() -> Path:
    """Folder of the digit classifier in all kinds of file, with samples.npz and eval.npz."""
    return EXAMPLE
