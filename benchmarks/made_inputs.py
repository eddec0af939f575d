"""What made-up token sequences are worth beside real ones, on a model that both are there for.

    python benchmarks/made_inputs.py --model minilm.onnx --data calib_minilm.npz [--samples 64]

Of each kind of inputs: the mean cosine of the outputs of two sequences; and of the model in static 8 bits with ranges
from them, the signal to noise of its worst output in dB on these inputs, on real ones that nothing has seen, and on the
same where everything that is fitted to inputs (SmoothQuant, bias correction, ranges by the outputs) was fitted to them.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from modelpress_compression import load
from modelpress_compression.graph.padding import counted_positions
from modelpress_compression.graph.synthetic import synthetic_inputs
from modelpress_compression.graph.watch import taps
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.distill import made_inputs as making
from modelpress_compression.passes.distill.token_inputs import with_lengths
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize


def nearness(model: Model, data: InputData) -> float:
    """Mean cosine of the first output of two sequences, a mean over the positions that count."""
    name = model.graph.outputs[0].name or ""
    feed = next(iter(data.feeds(len(data))))
    with taps(model, [name]) as observe:
        hidden = observe(feed)[name]
    mask = counted_positions(feed)
    weight = np.ones(hidden.shape[:2]) if mask is None else mask
    points = (hidden * weight[..., None]).sum(1)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    cosines = points @ points.T
    return float(cosines[~np.eye(len(points), dtype=bool)].mean())


def worst_db(model: Path, data: InputData, quantized: Model, folder: Path) -> float:
    """Of a quantized model on these inputs."""
    quantized.save(folder / "quantized.onnx")
    found = compare_outputs(model, folder / "quantized.onnx", data).outputs.values()
    return min(item.sqnr_db for item in found if item.sqnr_db is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    options = parser.parse_args()
    model = load(options.model)
    with np.load(options.data) as arrays:
        real = InputData.from_arrays({name: arrays[name] for name in arrays.files}, model.inputs)
    unseen = real.only(range(options.samples, len(real)))
    random = synthetic_inputs(model, samples=options.samples)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        making.SAMPLES = making.TOKEN_SAMPLES = options.samples
        making.MAX_SECONDS = math.inf  # how good they are is asked here, not how soon
        context = Context(random, folder, original=model)
        kinds = {
            "random tokens": random,
            "of different lengths": with_lengths(random, 0),
            "made": making.made_inputs(model, context, 0, math.inf)[0],
            "real": real.head(options.samples),
        }
        original = folder / "original.onnx"
        model.save(original)
        fused = Fuse(FuseConfig())(model, context).model
        quantize = Quantize(QuantizeConfig(scheme="static", rounding="nearest"))
        print("| inputs | cosine | static int8: on its own | on real ones | fitted: on its own | on real ones |")
        print("|---|---|---|---|---|---|", flush=True)
        for kind, data in kinds.items():
            cells = [kind, f"{nearness(model, data):.3f}"]
            for provided in (False, True):
                given = replace(data, provided=provided)
                result = quantize(fused, Context(given, folder)).model
                cells += [f"{worst_db(original, judged, result, folder):.1f}" for judged in (data, unseen)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
