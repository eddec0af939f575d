"""What TLS, tokens, roles and the audit log cost: the same calls to two servers, one with all of it and one with none.

    python benchmarks/access_overhead.py [--rounds 15] [--calls 400] [--size-mib 64]

Rounds take turns between the two servers, so that what else the machine does meets both. Told is the ratio of the
rates, on over off, as the median of the rounds with the smallest and the largest: for small calls (GetServerInfo and
ListJobs, one after the other and 16 at a time) and for files that are uploaded and fetched again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from modelpress_client import AsyncClient
from modelpress_client.transfers import hash_file
from modelpress_client.uploads import upload_blobs
from modelpress_protos.v1 import job_service_pb2, upload_service_pb2
from server_process import running_server

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "server"))
from authority import Authority

MIB = 1024 * 1024
AT_ONCE = 16


async def small_calls(client: AsyncClient, count: int, at_once: int) -> float:
    """Calls a second."""
    listing = job_service_pb2.ListJobsRequest(parent="projects/default")

    async def some() -> None:
        for _ in range(count // at_once):
            await client._connection.call(client._connection.jobs.ListJobs, listing)

    began = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(at_once)))
    return count / (time.perf_counter() - began)


async def transfer(client: AsyncClient, folder: Path, size_mib: int) -> float:
    """MiB a second, there and back."""
    path = folder / "file"
    path.write_bytes(os.urandom(size_mib * MIB))
    blob = await hash_file(path, None)
    began = time.perf_counter()
    await upload_blobs(client._connection, [blob], None)
    request = upload_service_pb2.ReadBlobRequest(parent="projects/default", digest=blob.digest)
    size_bytes = 0
    async for response in client._connection.uploads.ReadBlob(request, metadata=client._connection.metadata):
        size_bytes += len(response.data)
    assert size_bytes == size_mib * MIB
    return 2 * size_mib / (time.perf_counter() - began)


async def measure(on: AsyncClient, off: AsyncClient, options: argparse.Namespace, folder: Path) -> None:
    """Prints a line for each kind of call."""
    kinds: dict[str, Callable[[AsyncClient], Awaitable[float]]] = {
        "calls one by one": lambda client: small_calls(client, options.calls, 1),
        f"calls, {AT_ONCE} at a time": lambda client: small_calls(client, options.calls, AT_ONCE),
        f"files of {options.size_mib} MiB": lambda client: transfer(client, folder, options.size_mib),
    }
    for name, kind in kinds.items():
        ratios, rates = [], []
        await kind(on), await kind(off)  # connections are made, caches filled
        for number in range(options.rounds):
            first, second = (on, off) if number % 2 else (off, on)
            found = {id(client): await kind(client) for client in (first, second)}
            ratios.append(found[id(on)] / found[id(off)])
            rates.append(found[id(off)])
        middle = statistics.median(ratios)
        print(f"{name}: {middle:.2f} of the rate without [{min(ratios):.2f}, {max(ratios):.2f}], "
              f"which is {statistics.median(rates):,.0f} a second")  # fmt: skip


def main() -> None:
    """Starts both servers and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=400)
    parser.add_argument("--size-mib", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        authority = Authority(folder)
        cert, key = authority.issue("server")
        add = [sys.executable, "-m", "modelpress_server", "token", "--data-dir", str(folder / "on"), "add", "bench"]
        idle = ["--worker-start", "exec"]
        grants = ["--grant", "default:submitter"]
        token = subprocess.run([*add, *grants], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        secured = ["--tls-cert", str(cert), "--tls-key", str(key), "--audit-log", str(folder / "audit.log")]
        with running_server(folder / "on", *secured, *idle) as on, running_server(folder / "off", *idle) as off:

            async def run() -> None:
                async with (
                    AsyncClient(on.address, token=token, ca=authority.file) as first,
                    AsyncClient(off.address) as second,
                ):
                    await measure(first, second, options, folder)

            asyncio.run(run())


if __name__ == "__main__":
    main()
