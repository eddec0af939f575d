"""What 8-bit models answer on CPUs without VNNI, with and without our care for it.

    python benchmarks/portable_int8.py --models DIR [--only NAME ...] [--scheme static dynamic] [--qemu QEMU]

Each model is quantized for `target.cpu` vnni and generic. The table tells how many layers the second is certified for,
how many channels gave up resolution for it, the signal-to-noise ratio of the outputs against float32 (mean over the
outputs, on representative inputs that calibration has not seen), and the task metric: in onnxruntime on this machine,
which must have VNNI for the comparison to mean anything, and with the arithmetic written out (saturating_products.py),
exact as with VNNI and saturating as without. Those differ by saturation alone; onnxruntime's kernels round what lies
in the middle between two levels in their own way.

--qemu: qemu-x86_64 of version 7.2 or later, which then runs onnxruntime's own AVX2 kernels on a CPU without VNNI, on a
few samples; the last columns say how far their outputs are from this machine's, in dB; 200 is bit for bit the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from model_evaluation import evaluate
from modelpress_compression import load
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.fuse.config import FuseConfig
from modelpress_compression.passes.fuse.fuse import Fuse
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.runtime import open_session, run_all
from modelpress_compression.target import Target
from saturating_products import emulate

CALIBRATION_SAMPLES = 64
QEMU_SAMPLES = 2
TARGETS = ("vnni", "generic")
# Runs under QEMU, where importing more than onnxruntime would take minutes.
RUNNER = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
outputs = []
for feeds in sys.argv[3:]:
    outputs.append(session.run(None, dict(np.load(feeds)))[0])
np.savez(sys.argv[2], *outputs)
"""


@dataclass(frozen=True)
class Case:
    """A model with its eval_NAME.py."""

    name: str
    file: str
    inputs: tuple[str, ...] = ()


CASES = (
    Case("mnist", "mnist/mnist.onnx"),
    Case("fashion", "fashion/fashion.onnx"),
    Case("effnet_lite0", "files/effnet_lite0.traced.pt", ("input:float32[batch,3,224,224]",)),
    Case("minilm", "files/minilm.onnx"),
    Case("ppocr_rec", "files/ppocr_rec.onnx"),
    Case("silero_vad", "files/silero_vad_16k_op15.onnx"),
)


@dataclass(frozen=True)
class Quantized:
    """One model for one target, and what was measured of it."""

    path: Path
    result: PassResult
    sqnr_db: float
    metric: float
    metric_exact: float
    metric_saturating: float
    qemu_db: float | None

    @property
    def rows(self) -> list[Mapping[str, str | int | float]]:
        """The certificates of single layers."""
        return [row for row in self.result.details if "without_vnni" in row]

    @property
    def certified(self) -> str:
        rows = self.rows
        return f"{sum('exact' in str(row['without_vnni']) for row in rows)}/{len(rows)}"

    @property
    def reduced(self) -> str:
        totals = [sum(int(row[key]) for row in self.rows) for key in ("channels_reduced", "channels")]
        return f"{totals[0]}/{totals[1]}"


def quantize(
    case: Case, model: Model, scheme: str, cpu: str, samples: InputData, work: Path, models: Path, qemu: Path | None
) -> Quantized | None:
    """None where the scheme finds nothing to do."""
    seen, unseen = split(samples)
    config = QuantizeConfig(scheme=scheme)
    result = Quantize(config)(model, Context(seen, work, target=Target(cpu=cpu)))
    if not result.changed:
        return None
    name = f"{case.name}.{scheme}.{cpu}"
    path, exact, saturating = (work / f"{name}{kind}.onnx" for kind in ("", ".exact", ".saturating"))
    result.model.save(path)
    for file, saturates in ((exact, False), (saturating, True)):
        emulate(result.model, saturating=saturates).save(file)
    fidelity = compare_outputs(work / f"{case.name}.onnx", path, unseen)
    ratios = [output.sqnr_db for output in fidelity.outputs.values() if output.sqnr_db is not None]
    metrics = [float(evaluate(case.name, models, "--model", str(file))) for file in (path, exact, saturating)]
    distance = None if qemu is None else against_qemu(path, unseen, work, qemu, here=path)
    return Quantized(path, result, float(np.mean(ratios)), *metrics, distance)


def split(samples: InputData) -> tuple[InputData, InputData]:
    """For calibration, and for what is measured."""
    arrays = samples.arrays
    parts = [{name: array[part] for name, array in arrays.items()} for part in
             (slice(CALIBRATION_SAMPLES), slice(CALIBRATION_SAMPLES, None))]  # fmt: skip
    seen, unseen = (InputData(samples.specs, part, True) for part in parts)
    return seen, unseen


def against_qemu(path: Path, samples: InputData, work: Path, qemu: Path, *, here: Path) -> float:
    """SQNR in dB of the first output of `path` on an emulated Haswell, against that of `here` on this machine."""
    feeds = list(samples.feeds(1, limit=QEMU_SAMPLES))
    files = [work / f"feeds_{index}.npz" for index in range(len(feeds))]
    for file, feed in zip(files, feeds, strict=True):
        np.savez(file, **feed)
    (work / "runner.py").write_text(RUNNER)
    command = [str(qemu), "-cpu", "Haswell", sys.executable, str(work / "runner.py"), str(path), str(work / "out.npz")]
    subprocess.run([*command, *map(str, files)], check=True, stderr=subprocess.DEVNULL)
    with np.load(work / "out.npz") as outputs:
        other = list(outputs.values())
    expected = [next(iter(output.values())) for output in run_all(open_session(here), feeds)]
    signal = sum(float(np.square(a, dtype=np.float64).sum()) for a in expected)
    differences = [np.subtract(a, b, dtype=np.float64) for a, b in zip(expected, other, strict=True)]
    noise = sum(float(np.square(difference).sum()) for difference in differences)
    return min(200.0, 10 * float(np.log10(signal / max(noise, 1e-300))))


def measure(case: Case, scheme: str, models: Path, qemu: Path | None) -> list[str] | None:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        evaluate(case.name, models, "--make-calib", str(work / "data.npz"))
        loaded = load(models / case.file, inputs=case.inputs)
        with np.load(work / "data.npz") as arrays:
            samples = InputData.from_arrays({spec.name: arrays[spec.name] for spec in loaded.inputs}, loaded.inputs)
        model = Fuse(FuseConfig())(loaded, Context(samples, work)).model
        model.save(work / f"{case.name}.onnx")
        made = [quantize(case, model, scheme, cpu, samples, work, models, qemu) for cpu in TARGETS]
        before = float(evaluate(case.name, models, "--model", str(work / f"{case.name}.onnx")))
    vnni, generic = made
    if vnni is None or generic is None:
        return None
    return [
        f"{case.name}, {scheme}",
        vnni.certified,
        generic.certified,
        generic.reduced,
        f"{vnni.sqnr_db:.1f} / {generic.sqnr_db:.1f}",
        f"{before:.4f}",
        f"{vnni.metric:.4f} / {generic.metric:.4f}",
        f"{vnni.metric_exact:.4f} / {generic.metric_exact:.4f}",
        f"{vnni.metric_saturating:.4f} / {generic.metric_saturating:.4f}",
        *([] if qemu is None else [f"{vnni.qemu_db:.1f} / {generic.qemu_db:.1f}"]),
    ]


HEADINGS = ["model", "certified, vnni", "certified, generic", "channels reduced", "SQNR in dB, vnni / generic",
            "metric, float32", "metric, vnni / generic", "written out, exact", "written out, saturating"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="8-bit models on CPUs without VNNI.")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--only", nargs="*", default=[], help="names of the models to run")
    parser.add_argument("--scheme", nargs="*", default=["static", "dynamic"], choices=["static", "dynamic"])
    parser.add_argument("--qemu", type=Path, help="qemu-x86_64, to run onnxruntime's kernels of a CPU without VNNI")
    arguments = parser.parse_args()
    headings = HEADINGS + (["Haswell against this machine in dB"] if arguments.qemu else [])
    print("|".join(["", *headings, ""]), "|".join(["", *["---"] * len(headings), ""]), sep="\n", flush=True)
    for case in CASES:
        for scheme in arguments.scheme if not arguments.only or case.name in arguments.only else ():
            row = measure(case, scheme, arguments.models.resolve(), arguments.qemu)
            if row is not None:
                print("|".join(["", *row, ""]), flush=True)


if __name__ == "__main__":
    main()
