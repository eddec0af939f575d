"""Compresses the MNIST example through a server, with the Python client.

compress-server &
python examples/quickstart.py [--server localhost:50051]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from modelpress_client import Client

MNIST = Path(__file__).resolve().parent / "mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compresses the MNIST example through a server.")
    parser.add_argument("--server", default="localhost:50051", metavar="HOST:PORT")
    parser.add_argument("--output", type=Path, default=Path("mnist.optimized.onnx"))
    arguments = parser.parse_args()

    with Client(arguments.server) as client:
        # TorchScript does not record its inputs, so they are named; ONNX and .pt2 files need no `inputs`.
        model = client.upload(MNIST / "model_scripted.pt", inputs=["x:float32[batch,1,28,28]"])
        job = client.compress(
            model,
            recipe="default",
            data=MNIST / "samples.npz",  # representative inputs: to calibrate and to compare
            eval=MNIST / "eval.npz",  # inputs with labels: for the accuracy in the report
            max_drop=0.005,
        )
        for event in job.watch():
            print(f"{event.fraction:4.0%}  {event.state:9}  {event.message}")
        report = job.wait()
        job.download(arguments.output)

    print(f"\n{arguments.output}: {report.size_ratio:.2f} times smaller")
    for row in report.latency:
        print(f"batch {row.batch_size}, {row.threads} thread: {row.speedup.median:.2f} times as fast")
    if report.accuracy is not None:
        print(f"{report.accuracy.metric}: {report.accuracy.original:.4f} before, {report.accuracy.optimized:.4f} after")


if __name__ == "__main__":
    main()
