"""The API against the one of the last release."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def breaking(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "protos/generate.py"), "--breaking"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_clients_of_the_last_release_are_understood(tmp_path: Path) -> None:
    """What was added breaks nobody; a field with another type, or gone, is told."""
    if shutil.which("buf", path=f"{Path(sys.executable).parent}") is None:
        pytest.skip("buf comes with [dev]")
    done = breaking(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    jobs = tmp_path / "protos/modelpress_protos/v1/job_service.proto"
    text = jobs.read_text("utf-8")
    for old, new, told in (
        ("int32 attempt = 6;", "int64 attempt = 6;", "attempt"),
        ("  bool from_cache = 7;\n", "", "from_cache"),
        ("rpc WaitJob(", "rpc AwaitJob(", "WaitJob"),
    ):
        assert old in text
        jobs.write_text(text.replace(old, new), "utf-8")
        done = breaking(tmp_path)
        assert done.returncode != 0
        assert told in done.stdout
