"""Compresses the MNIST example twice at the same time, with the asyncio client.

compress-server &
python examples/quickstart_async.py [--server localhost:50051]
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from modelpress_client import AsyncClient

MNIST = Path(__file__).resolve().parent / "mnist"


async def compressed(client: AsyncClient, recipe: str, output: Path) -> str:
    """Brings the result of one recipe; says what came of it."""
    model = await client.upload(MNIST / "model.onnx")
    job = await client.compress(model, recipe=recipe, data=MNIST / "samples.npz")
    async for event in job.watch():
        print(f"{recipe}: {event.fraction:4.0%}  {event.state:9}  {event.message}")
    report = await job.wait()
    await job.download(output)
    return f"{output}: {report.size_ratio:.2f} times smaller"


async def main() -> None:
    parser = argparse.ArgumentParser(description="Compresses the MNIST example twice at the same time.")
    parser.add_argument("--server", default="localhost:50051", metavar="HOST:PORT")
    parser.add_argument("--output", type=Path, default=Path(), metavar="FOLDER")
    arguments = parser.parse_args()

    async with AsyncClient(arguments.server) as client:
        recipes = ("lossless", "float16")
        jobs = (compressed(client, recipe, arguments.output / f"mnist.{recipe}.onnx") for recipe in recipes)
        print("\n".join(await asyncio.gather(*jobs)))


if __name__ == "__main__":
    asyncio.run(main())
