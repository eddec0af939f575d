"""Nets with random weights in 8 bits: signal-to-noise ratio beside Quark's on the same file.

    python benchmarks/random_weights.py --cache DIR --tools DIR [--only NAME ...] [--samples N] [--limit SECONDS]
                                        [--render]

ARCHITECTURES are those of `architectures.py`, which needs timm, torchvision and transformers. Each gets the same random
inputs as calibration in our static quantization and in Quark, which is installed in an environment of its own below
--tools. SQNR is that of the worst output on as many inputs that nobody saw, against the float32 file in onnxruntime.
Rows are gathered in docs/random_weights.json, a net at a time; docs/random_weights.md is written from them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from architectures import ARCHITECTURES, drawn_samples, exported
from frontier_tools import TOOLS, Installed, installed, make
from modelpress_compression import load
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from quantization_contenders import clean
from quantization_process import Limits

NETS = ("resnet18", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "squeezenet1_1", "vit", "bert")
OURS = QuantizeConfig(scheme="static")
THEIRS = ("A8W8", "A8W8, AdaRound", "U8S8 per channel, percentile", "U8S8 per channel, MSE")
MEMORY_BYTES = 8 * 1024**3
DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "random_weights.json", DOCS / "random_weights.md"
TABLE = ("| net | by | how | SQNR, dB | s |", "| --- | --- | --- | --- | --- |")
HEADER = """# Nets with random weights in 8 bits

Written by `benchmarks/random_weights.py`; do not edit.

The same file and the same calibration inputs for all; SQNR is that of the worst output on inputs that nobody saw,
against the float32 file in onnxruntime. Of random weights no metric tells more; they are harder than trained ones,
whose values are spread less evenly. Seconds are of one thread for Quark, of all for ours.
"""


def rows_of(name: str, cache: Path, quark: Installed, samples: int, limits: Limits) -> Iterator[str]:
    """Rows of a net, those of Quark's points behind ours."""
    path, _ = exported(ARCHITECTURES[name], "dynamo", cache)
    model = load(path)
    drawn = InputData.from_arrays(drawn_samples(ARCHITECTURES[name], 2 * samples), model.inputs)
    given, held_out = drawn.only(range(samples)), drawn.only(range(samples, 2 * samples))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole, cleaned, result = (folder / f"{kind}.onnx" for kind in ("float", "clean", "result"))
        model.save(whole)

        def row(by: str, how: str, made: Path, seconds: float) -> str:
            return f"| {name} | {by} | {how} | {compare_outputs(whole, made, held_out).sqnr_db:.1f} | {seconds:.0f} |"

        context = Context(given, folder)
        began = time.monotonic()
        fused = Fuse(FuseConfig())(model, context).model
        Quantize(OURS)(fused, context).model.save(result)
        yield row("modelpress", "fuse, quantize: {scheme: static}", result, time.monotonic() - began)
        clean(whole, cleaned)
        feeds = list(given.feeds(1))
        np.savez(folder / "feeds.npz", **{key: np.stack([feed[key] for feed in feeds]) for key in feeds[0]})
        points = folder / "points"
        points.mkdir()
        for outcome in make(quark, cleaned, folder / "feeds.npz", points, limits, THEIRS):
            if outcome["outcome"] == "ok":
                yield row("Quark", outcome["name"], Path(outcome["file"]), outcome["wall_s"])
            else:
                yield f"| {name} | Quark | {outcome['name']} | {outcome['outcome']} | {outcome['wall_s']:.0f} |"


def main() -> None:
    """Prints the rows, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("architectures"), help="folder for the nets' ONNX files")
    parser.add_argument("--tools", type=Path, default=Path("tools"), help="folder for Quark's environment")
    parser.add_argument("--only", nargs="*", default=list(NETS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each of Quark's points")
    parser.add_argument("--render", action="store_true", help="write the page from the rows that there are")
    arguments = parser.parse_args()
    if not arguments.render:
        quark = installed(next(tool for tool in TOOLS if tool.name == "quark"), arguments.tools)
        print("\n".join(TABLE), flush=True)
        for name in arguments.only:
            rows = []
            for row in rows_of(name, arguments.cache, quark, arguments.samples, Limits(arguments.limit, MEMORY_BYTES)):
                print(row, flush=True)
                rows.append(row)
            # Read only now: another run may have gone through another net meanwhile.
            RESULTS.write_text(json.dumps(gathered() | {name: rows}, indent=1), "utf-8")
    lines = [HEADER, *TABLE, *(row for rows in gathered().values() for row in rows)]
    PAGE.write_text("\n".join([*lines, ""]), "utf-8")


def gathered() -> dict[str, list[str]]:
    """The rows so far, by net."""
    found: dict[str, list[str]] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return found


if __name__ == "__main__":
    main()
