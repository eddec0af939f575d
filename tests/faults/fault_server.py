"""A server whose clock can be set: `fault_server.py ADDRESS DATA_DIR CLOCK_FILE`; the file holds seconds to add.

The environment may name stores that it shares with others: COMPRESS_SERVER_DATABASE, COMPRESS_SERVER_BLOBS.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path

from modelpress_server.app import Server
from modelpress_server.config import MIB, Settings
from modelpress_server.connections import raise_descriptor_limit
from modelpress_server.executors.base import Executor
from modelpress_server.executors.local import LocalExecutor


def set_clock_by(path: Path) -> None:
    """From now on, this process believes what the file says."""
    true_ns = time.time_ns

    def set_ns() -> int:
        try:
            return true_ns() + int(path.read_text("ascii")) * 1_000_000_000
        except (OSError, ValueError):
            return true_ns()

    time.time_ns = set_ns


def make_executor(settings: Settings) -> Executor:
    """Real worker processes with light tasks."""
    tasks = str(Path(__file__).with_name("fault_tasks.py"))
    return LocalExecutor(fork=True, sandbox="off", temp_root=settings.data_dir / "work", tasks=tasks)


async def main(address: str, data_dir: Path) -> None:
    """Serves until SIGTERM."""
    settings = Settings(
        listen=address,
        data_dir=data_dir,
        database=os.environ.get("COMPRESS_SERVER_DATABASE"),
        blobs=os.environ.get("COMPRESS_SERVER_BLOBS"),
        lease_s=3.0,
        workers=2,
        reserve_bytes=MIB,
        ack_interval_bytes=64 * 1024,
        upload_takeover_s=1.0,
        blob_ttl_s=120.0,
        janitor_interval_s=1.0,
        worker_memory_bytes=0,
        drain_grace_s=1.0,
        max_models=100_000,
    )
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    server = Server(settings, make_executor)
    await server.start()
    print(f"listening on {server.address}", flush=True)
    await stopped.wait()
    await server.stop()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    raise_descriptor_limit()
    set_clock_by(Path(sys.argv[3]))
    asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
