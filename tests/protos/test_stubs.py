"""The committed stubs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_stubs_are_what_the_generator_writes() -> None:
    """Generated code comes from protos/generate.py alone."""
    pytest.importorskip("mypy_protobuf", reason="the versions of the generators that write the stubs come with [dev]")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "protos/generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
