"""How fast files move through server and client, against a bare gRPC stream; and how much memory that takes.

    python benchmarks/transfer.py [--size-mib 2048] [--rounds 3] [--directory DIR]

Each round sends one file and fetches it again, through a `compress-server` process and the client library in another
process, then through the bare stream of `bare_stream.py`. Hashing the file before the upload, which every
content-addressed upload needs, is timed apart and counted for neither side. Demanded: 70 % of the bare stream's rate,
and memory that grows by less than 64 MiB in the client as in the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare_stream
from server_process import MemoryWatch, running_server

MIB = 1024 * 1024
DEMANDED_SHARE = 0.7
DEMANDED_GROWTH_MIB = 64
BLOCK_BYTES = 8 * MIB


@dataclass(frozen=True)
class Measured:
    """One transfer in one direction."""

    seconds: float
    client_growth_mib: float
    server_growth_mib: float


def make_file(path: Path, size_bytes: int) -> None:
    """Random bytes, so that no layer can shrink them."""
    with path.open("wb") as file:
        for start in range(0, size_bytes, BLOCK_BYTES):
            file.write(os.urandom(min(BLOCK_BYTES, size_bytes - start)))


def transfer(kind: str, direction: str, address: str, path: Path, server_pid: int) -> Measured:
    """Has a client process move the file; watches both processes."""
    watch = MemoryWatch(server_pid)
    command = [sys.executable, __file__, "--child", kind, direction, address, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout)
    return Measured(answer["seconds"], answer["growth_bytes"] / MIB, watch.growth_bytes() / MIB)


async def _child(kind: str, direction: str, address: str, path: Path) -> dict[str, Any]:
    """The client process: one transfer."""
    if kind == "bare":
        watch, began = MemoryWatch(os.getpid()), time.perf_counter()
        await (bare_stream.upload if direction == "upload" else bare_stream.download)(address, path)
        return {"seconds": time.perf_counter() - began, "growth_bytes": watch.growth_bytes()}

    from modelpress_client import AsyncClient
    from modelpress_client.downloads import download_file
    from modelpress_client.transfers import hash_file
    from modelpress_client.uploads import upload_blobs

    source = path if direction == "upload" else path.with_name("source")
    blob = await hash_file(source)
    async with AsyncClient(address) as client:
        await client.server_info()
        connection = client._connection  # a blob alone, without a model, is no part of the public interface
        watch, began = MemoryWatch(os.getpid()), time.perf_counter()
        if direction == "upload":
            await upload_blobs(connection, [blob])
        else:
            await download_file(connection, blob.digest, path)
        return {"seconds": time.perf_counter() - began, "growth_bytes": watch.growth_bytes()}


@contextmanager
def bare_server(folder: Path) -> Iterator[tuple[str, int]]:
    """The bare stream's server: address and process id."""
    command = [sys.executable, bare_stream.__file__, "serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().removeprefix("listening on ").strip(), process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def run_round(folder: Path, size_bytes: int) -> dict[tuple[str, str], Measured]:
    """Both directions, both ways; the folder is removed."""
    folder.mkdir()
    results: dict[tuple[str, str], Measured] = {}
    try:
        source, fetched = folder / "source", folder / "fetched"
        make_file(source, size_bytes)
        (folder / "bare").mkdir()
        with bare_server(folder / "bare") as (address, pid):
            results["bare", "upload"] = transfer("bare", "upload", address, source, pid)
            results["bare", "download"] = transfer("bare", "download", address, fetched, pid)
        fetched.unlink()
        shutil.rmtree(folder / "bare")
        with running_server(folder / "data", "--worker-start", "exec") as server:
            pid = server.process.pid
            results["modelpress", "upload"] = transfer("modelpress", "upload", server.address, source, pid)
            results["modelpress", "download"] = transfer("modelpress", "download", server.address, fetched, pid)
    finally:
        shutil.rmtree(folder)
    return results


def report(rounds: list[dict[tuple[str, str], Measured]], size_mib: int) -> bool:
    """Prints the table; whether everything demanded holds."""
    print(f"\n{size_mib} MiB, median of {len(rounds)} rounds")
    print(f"{'':10}{'bare MiB/s':>12}{'modelpress':>12}{'share':>8}{'client MiB':>12}{'server MiB':>12}")
    holds = True
    for direction in ("upload", "download"):
        bare = size_mib / statistics.median(item["bare", direction].seconds for item in rounds)
        ours = size_mib / statistics.median(item["modelpress", direction].seconds for item in rounds)
        client = max(item["modelpress", direction].client_growth_mib for item in rounds)
        server = max(item["modelpress", direction].server_growth_mib for item in rounds)
        print(f"{direction:10}{bare:12.0f}{ours:12.0f}{ours / bare:8.0%}{client:12.1f}{server:12.1f}")
        holds &= ours / bare >= DEMANDED_SHARE and max(client, server) < DEMANDED_GROWTH_MIB
    print("as demanded" if holds else "NOT as demanded: at least 70 % of the bare rate, under 64 MiB of growth")
    return holds


def main() -> int:
    """Runs the rounds; 1 when something demanded does not hold."""
    if sys.argv[1:2] == ["--child"]:
        kind, direction, address, path = sys.argv[2:]
        print(json.dumps(asyncio.run(_child(kind, direction, address, Path(path)))))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure; needs five times the size")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modelpress-transfer-", dir=arguments.directory) as folder:
        rounds = []
        for number in range(arguments.rounds):
            rounds.append(run_round(Path(folder) / f"round-{number}", arguments.size_mib * MIB))
            print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr)
    return 0 if report(rounds, arguments.size_mib) else 1


if __name__ == "__main__":
    sys.exit(main())
