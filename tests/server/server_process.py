"""`compress-server` as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Stands in for the real executor, so that the test is about the server process alone.
LAUNCH = """
import sys
sys.path.insert(0, {tests!r})
from modelpress_server import app, cli
from scripted_executor import ScriptedExecutor
app.Server.__init__.__defaults__ = (lambda _: ScriptedExecutor(), None)
cli.main()
"""
REPORT = """
import atexit, json
def report():
    names = ("torch", "onnx", "onnxruntime", "numpy", "alembic", "prometheus_client", "starlette", "uvicorn",
        "opentelemetry", "jinja2", "httpx")
    heavy = [name for name in names if name in sys.modules]
    rss = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS"))
    print(json.dumps({"heavy": heavy, "rss_kib": int(rss)}), flush=True)
atexit.register(report)
"""


@contextmanager
def launched(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """`compress-server` with the scripted executor; reports what it imported when it exits."""
    code = LAUNCH.format(tests=str(Path(__file__).parent)).replace("cli.main()", REPORT + "cli.main()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--listen", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
