"""Compresses the MNIST example with the engine alone: no server, no client.

python examples/in_process.py [--output mnist.optimized.onnx]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from modelpress_compression import Recipe, compress, load

MNIST = Path(__file__).resolve().parent / "mnist"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compresses the MNIST example in this process.")
    parser.add_argument("--output", type=Path, default=Path("mnist.optimized.onnx"))
    arguments = parser.parse_args()

    model = load(MNIST / "model.pt2")
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "steps": [{"fuse": {}}, {"quantize": {"scheme": "static", "calibration": "entropy"}}],
            "benchmark": {"batch_sizes": [1, 8], "rounds": 30},
        }
    )
    samples, evaluation = np.load(MNIST / "samples.npz"), np.load(MNIST / "eval.npz")
    result = compress(model, recipe, data=dict(samples), eval_data=dict(evaluation))

    result.model.save(arguments.output)
    report = result.report
    accuracy = report["accuracy"]
    print(f"{arguments.output}: {report['size_ratio']:.2f} times smaller")
    for row in report["latency"]:
        print(f"batch {row['batch_size']}: {row['speedup']['median']:.2f} times as fast")
    print(f"{accuracy['metric']}: {accuracy['original']:.4f} before, {accuracy['optimized']:.4f} after")
    for step in report["steps"]:
        print(f"{step['name']}: {step['changes']}")
        for skip in step["skipped"]:
            print(f"  {skip['node']} left alone: {skip['reason']}")


if __name__ == "__main__":
    main()
