"""Networks as gates: built, simulated, synthesized, placed and routed, where the tools are installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import onnxruntime as ort
import pytest
from modelpress_compression import InputData, Model, Recipe, compress, target
from modelpress_compression.errors import InvalidRecipeError, TimeLimitError
from modelpress_compression.report.build import report_schema
from modelpress_compression.target import DEVICES

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
FPGA = {"version": 1, "goal": {"objective": "balanced"}, "target": {"device": "fpga"}}
installed = pytest.mark.skipif(
    bool(DEVICES["fpga"].fault), reason="the FPGA tools are not installed: pip install 'modelpress[fpga]'"
)


@pytest.fixture
def dense(model_from_text: Callable[..., Model]) -> Model:
    """x:float32[n,6] -> 3 classes."""
    rng = np.random.default_rng(0)
    return model_from_text(
        HEAD
        + "g (float[n,6] x) => (float[n,3] y) { h = Gemm(x, w, b)  r = Relu(h)  l = MatMul(r, v)  y = Softmax(l) }",
        {
            "w": rng.standard_normal((6, 8)).astype(np.float32),
            "b": rng.standard_normal(8).astype(np.float32),
            "v": rng.standard_normal((8, 3)).astype(np.float32),
        },
    )


@pytest.fixture
def vectors(dense: Model) -> InputData:
    """A thousand samples."""
    samples = np.random.default_rng(1).standard_normal((1000, 6)).astype(np.float32)
    return InputData.from_arrays({"x": samples}, dense.inputs)


def test_missing_tools_are_named(dense: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what installs them, before anything is done."""
    monkeypatch.setattr(target, "find_spec", lambda name: None)
    with pytest.raises(InvalidRecipeError, match=r"FPGA tools is not installed.*pip install 'modelpress\[fpga\]'"):
        compress(dense, Recipe.from_dict(FPGA))


def test_recipes_name_parts() -> None:
    """Of the table; a clock is a positive number of MHz."""
    with pytest.raises(InvalidRecipeError, match=r"target\.part"):
        Recipe.from_dict({**FPGA, "target": {"device": "fpga", "part": "lfe5u-86f"}})
    with pytest.raises(InvalidRecipeError, match=r"target\.clock_mhz"):
        Recipe.from_dict({**FPGA, "target": {"device": "fpga", "clock_mhz": 0}})


@installed
def test_pipelines_answer_as_the_emulator(model_from_text: Callable[..., Model], tmp_path: Path) -> None:
    """By da4ml's own interpreter of what it traced: convolutions with padding and groups, pooling, sums, saturation."""
    from modelpress_compression.backends.fpga.emulator import run
    from modelpress_compression.backends.fpga.network import read_network
    from modelpress_compression.backends.fpga.parallel import trace
    from modelpress_compression.backends.fpga.search import choose_formats

    rng = np.random.default_rng(2)
    model_from_text(
        HEAD
        + """g (float[n,2,4,4] x) => (float[n,3] y) {
        a = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(a)
        e = Conv<group=2, pads=[1,1,0,0]>(r, d)  s = Add(e, r)  t = Relu(s)
        m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t)  p = GlobalAveragePool(m)  f = Flatten(p)
        y = MatMul(f, v) }""",
        {
            "w": rng.standard_normal((2, 2, 3, 3)).astype(np.float32),
            "b": rng.standard_normal(2).astype(np.float32),
            "d": rng.standard_normal((2, 1, 2, 2)).astype(np.float32),
            "v": rng.standard_normal((2, 3)).astype(np.float32),
        },
    ).save(tmp_path / "model.onnx")
    network = read_network(tmp_path / "model.onnx")
    samples = rng.standard_normal((300, 2, 4, 4))
    design, _ = choose_formats(network, samples[:100])
    # Twice the range that bits were chosen for: saturation counts as well.
    given = design.values["x"].round_input(2 * samples)
    answers = trace(network, design).predict(given.reshape(len(given), -1))
    np.testing.assert_array_equal(answers, run(network, given, design))


@installed
def test_gates_are_simulated(tmp_path: Path) -> None:
    """A small netlist, as yosys writes it: an adder of two bits with a register, against arithmetic."""
    from modelpress_compression.backends.fpga.gates import Netlist

    def cell(kind: str, output: str, **pins: int) -> dict[str, object]:
        return {"type": kind, "connections": {name: [net] for name, net in pins.items()} | {output: [pins[output]]}}

    module: dict[str, dict[str, object]] = {
        "netnames": {"first": {"bits": [6], "attributes": {"init": "1"}}},
        "ports": {"a": {"bits": [2, 3]}, "b": {"bits": [4, 5]}, "y": {"bits": [6, 7, "0"]}},
        "cells": {
            "low": cell("$_XOR_", "Y", A=2, B=4, Y=8),
            "carry": cell("$_AND_", "Y", A=2, B=4, Y=9),
            "half": cell("$_XOR_", "Y", A=3, B=5, Y=10),
            "high": cell("$_XOR_", "Y", A=10, B=9, Y=11),
            "first": cell("$_DFF_P_", "Q", C=12, D=8, Q=6),
            "second": cell("$_DFF_P_", "Q", C=12, D=11, Q=7),
        },
    }
    path = tmp_path / "netlist.json"
    path.write_text(json.dumps({"modules": {"top": module}}))
    values = np.random.default_rng(0).integers(0, 4, (2, 9, 100))  # operands, cycles, lanes
    bits = (values[..., None] >> np.arange(2) & 1).astype(bool)
    seen = Netlist(path, "top").run({"a": bits[0], "b": bits[1]}, "y", 10)
    assert (seen[0] == [True, False, False]).all()
    np.testing.assert_array_equal(seen[1:] @ [1, 2, 4], values.sum(axis=0) % 4)
    module["cells"]["memory"] = cell("$_TBUF_", "Y", A=2, Y=13)
    path.write_text(json.dumps({"modules": {"top": module}}))
    with pytest.raises(ValueError, match="memory is a"):
        Netlist(path, "top")


@installed
def test_networks_that_do_not_fit_are_estimated(model_from_text: Callable[..., Model], tmp_path: Path) -> None:
    """Neither at once nor folded: nothing is built, all figures are called estimates, and the fixed-point network comes
    back."""
    rng = np.random.default_rng(0)
    large = model_from_text(
        HEAD + "g (float[n,256] x) => (float[n,10] y) { h = MatMul(x, w)  r = Clip(h, low, high)  y = MatMul(r, v) }",
        {
            "w": rng.standard_normal((256, 512)).astype(np.float32),
            "v": rng.standard_normal((512, 10)).astype(np.float32),
            "low": np.float32(0),
            "high": np.float32(6),
        },
    )
    given = rng.standard_normal((64, 256)).astype(np.float32)
    samples = InputData.from_arrays({"x": given}, large.inputs)
    recipe = Recipe.from_dict({**FPGA, "target": {"device": "fpga", "part": "lfe5u-25f"}})
    said: list[str] = []
    result = compress(large, recipe, data=samples, on_log=lambda _, text: said.append(text))
    jsonschema.validate(result.report, report_schema())
    section = result.report["target"]
    assert section["form"] == "estimated"
    assert section["routed"] is section["bit_exact"] is section["hls"] is None
    assert [unit["cycles"] for unit in section["units"]] == [
        256 * 512 // (section["units"][0]["pe"] * section["units"][0]["simd"]),
        512 * 10 // (section["units"][1]["pe"] * section["units"][1]["simd"]),
    ]
    assert section["interval_cycles"] == max(unit["cycles"] for unit in section["units"])
    assert any(re.search(r"take about \d+ block RAMs, and 56 are there", text) for text in said)
    assert any("by FINN's cost formulas" in text for text in result.report["warnings"])
    assert "not built" in result.report["verdict"]
    (archive,) = [artifact for artifact in result.write(tmp_path) if artifact.kind == "project"]
    with zipfile.ZipFile(archive.files[0]) as packed:
        assert sorted(packed.namelist()) == [
            "fpga/README.md", "fpga/model/fixed_point.onnx", "fpga/model/qonnx.onnx", "fpga/report.json",
        ]  # fmt: skip
        assert "A network that was not built" in packed.read("fpga/README.md").decode()
    (answers,) = ort.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"x": given})
    assert np.isfinite(answers).all()


@installed
def test_the_ceiling_of_a_relu_is_kept(model_from_text: Callable[..., Model], tmp_path: Path) -> None:
    """Relu6 in the float network, the emulator, da4ml's pipeline, the unit of a folded design and plain ONNX; between
    two users of a value as well."""
    from modelpress_compression.backends.fpga.emulator import run
    from modelpress_compression.backends.fpga.folded import build_folded
    from modelpress_compression.backends.fpga.forms import plain_onnx
    from modelpress_compression.backends.fpga.network import read_network
    from modelpress_compression.backends.fpga.parallel import trace
    from modelpress_compression.backends.fpga.parts import PARTS
    from modelpress_compression.backends.fpga.search import choose_formats

    rng = np.random.default_rng(4)
    weights = {
        "w": 2 * rng.standard_normal((5, 8)).astype(np.float32),
        "v": rng.standard_normal((8, 3)).astype(np.float32),
        "u": rng.standard_normal((8, 8)).astype(np.float32),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    chain = "h = MatMul(x, w)  r = Clip(h, low, high)  y = MatMul(r, v)"
    fork = "h = MatMul(x, w)  r = Clip(h, low, high)  a = MatMul(h, u)  s = Add(a, r)  y = MatMul(s, v)"
    samples = rng.standard_normal((300, 5)).astype(np.float32)
    for nodes in (chain, fork):
        path = tmp_path / "model.onnx"
        model_from_text(f"{HEAD} g (float[n,5] x) => (float[n,3] y) {{ {nodes} }}", weights).save(path)
        network = read_network(path)
        (expected,) = ort.InferenceSession(str(path)).run(None, {"x": samples})
        np.testing.assert_allclose(run(network, samples), expected, rtol=1e-4, atol=1e-4)
        design, _ = choose_formats(network, samples)
        answers = run(network, samples, design)
        given = design.values["x"].round_input(samples.astype(np.float64))
        np.testing.assert_array_equal(trace(network, design).predict(given), answers)
        session = ort.InferenceSession(plain_onnx(network, design, "y").SerializeToString())
        np.testing.assert_array_equal(session.run(None, {"x": samples})[0], answers)
        if nodes is chain:
            first = build_folded(network, design, PARTS["lfe5u-85f"]).units[0]
            assert first.ceiling == 6 * 2 ** design.values["h"].fraction


@installed
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_folded_designs_answer_as_the_emulator(model_from_text: Callable[..., Model], tmp_path: Path) -> None:
    """Gate by gate, two samples at a time in memories of two banks: padding, strides, pooling, dense layers. The next
    sample comes after as many cycles as the slowest unit has, and a few for its pipeline."""
    from modelpress_compression.backends.fpga.emulator import run
    from modelpress_compression.backends.fpga.folded import build_folded, stream_through
    from modelpress_compression.backends.fpga.folded_verilog import TOP
    from modelpress_compression.backends.fpga.network import read_network
    from modelpress_compression.backends.fpga.parts import PARTS
    from modelpress_compression.backends.fpga.search import choose_formats
    from modelpress_compression.backends.fpga.synthesis import gates_as_written, write_sources

    rng = np.random.default_rng(3)
    model_from_text(
        HEAD
        + """g (float[n,2,8,8] x) => (float[n,3] y) {
        a = Conv<pads=[1,1,1,1]>(x, w, b)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)  r = Relu(m)
        e = Conv<pads=[1,1,1,1], strides=[2,2]>(r, d)  s = Relu(e)  f = Flatten(s)
        h = MatMul(f, v)  t = Relu(h)  y = MatMul(t, u) }""",
        {
            "w": rng.standard_normal((5, 2, 3, 3)).astype(np.float32),
            "b": rng.standard_normal(5).astype(np.float32),
            "d": rng.standard_normal((4, 5, 3, 3)).astype(np.float32),
            "v": rng.standard_normal((16, 7)).astype(np.float32),
            "u": rng.standard_normal((7, 3)).astype(np.float32),
        },
    ).save(tmp_path / "model.onnx")
    network = read_network(tmp_path / "model.onnx")
    samples = rng.standard_normal((101, 2, 8, 8))
    design, _ = choose_formats(network, samples)
    folded = build_folded(network, design, PARTS["lfe5u-25f"])
    netlist = gates_as_written(write_sources(folded.sources, tmp_path), TOP, tmp_path)
    given = design.values["x"].round_input(2 * samples)  # saturation counts as well
    seen = stream_through(netlist, folded, given.reshape(len(given), -1), lambda: None)
    np.testing.assert_array_equal(seen.answers, run(network, given, design))
    slowest = max(unit.cycles for unit in folded.units)
    assert slowest <= seen.interval <= slowest + 40
    assert seen.latency <= sum(unit.cycles for unit in folded.units) + 128 + 200


@installed
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_job_ends_with_a_routed_design(dense: Model, vectors: InputData, tmp_path: Path) -> None:
    """Every bit of a thousand answers is right, as written and as synthesized; the result in ONNX answers the same."""
    said: list[str] = []
    result = compress(dense, Recipe.from_dict(FPGA), data=vectors, on_log=lambda _, text: said.append(text))
    report = result.report
    jsonschema.validate(report, report_schema())
    section = report["target"]
    assert section["bit_exact"] == {"samples": 1000, "as_written": 1000, "synthesized": 1000}
    assert section["fits"]
    assert 20 < section["routed"]["fmax_mhz"] < 500
    assert section["routed"]["latency_us"] == pytest.approx(section["latency_cycles"] / section["routed"]["fmax_mhz"])
    assert section["resources"]["dsps"] == 0
    assert 0 < section["resources"]["flip_flops"] < 5000
    assert report["latency"] == []
    assert report["measurement"] is None
    assert report["fidelity"]["top1_agreement"] >= 0.98
    assert "MHz" in report["verdict"]
    assert [step["name"] for step in report["steps"]] == ["fuse", "fpga"]
    assert len(report["steps"][1]["details"]) == 2
    assert any("Softmax at the end is left to the host" in note for note in report["steps"][1]["notes"])
    (project,) = [artifact for artifact in result.write(tmp_path) if artifact.kind == "project"]
    with zipfile.ZipFile(project.files[0]) as packed:
        packed.extractall(tmp_path)
    names = {path.relative_to(tmp_path / "fpga").as_posix() for path in (tmp_path / "fpga").rglob("*.*")}
    assert {"README.md", "interface.json", "rtl/network_wrapper.v", "tb/testbench.v", "model/qonnx.onnx"} <= names
    answers = [
        ort.InferenceSession(str(path)).run(None, {"x": vectors.arrays["x"]})[0]
        for path in (tmp_path / "model.onnx", tmp_path / "fpga/model/fixed_point.onnx")
    ]
    np.testing.assert_array_equal(*answers)
    _simulate(tmp_path / "fpga")


def _simulate(folder: Path) -> None:
    """The project's own test bench, in a simulator of others, where there is one."""
    if shutil.which("verilator") is None or shutil.which("g++") is None:
        return
    for path in (folder / "rtl").glob("*.v"):
        lines = path.read_text().splitlines()
        kept = [line for line in lines if "WIDTHTRUNC" not in line and "WIDTHEXPAND" not in line]
        path.write_text("\n".join(kept) + "\n")
    sources = ["testbench.v", *(f"../rtl/{path.name}" for path in (folder / "rtl").glob("*.v"))]
    built = ["verilator", "--binary", "--timing", "-Wno-fatal", "-Wno-lint", "--top", "testbench", *sources]
    ran = subprocess.run(built, cwd=folder / "tb", capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    ran = subprocess.run(
        [folder / "tb/obj_dir/Vtestbench"], cwd=folder / "tb", capture_output=True, text=True, check=True
    )
    assert "256 of 256 samples answered exactly" in ran.stdout


@installed
@pytest.mark.slow
def test_a_design_that_is_wrong_is_found(dense: Model, vectors: InputData, tmp_path: Path) -> None:
    """One weight's sign turned behind the emulator's back: the simulation tells."""
    from modelpress_compression.backends.fpga.build import TOP, answered
    from modelpress_compression.backends.fpga.emulator import Design, run
    from modelpress_compression.backends.fpga.network import read_network
    from modelpress_compression.backends.fpga.parallel import build_parallel
    from modelpress_compression.backends.fpga.search import choose_formats
    from modelpress_compression.backends.fpga.synthesis import gates_as_written, write_sources

    dense.save(tmp_path / "model.onnx")
    network = read_network(tmp_path / "model.onnx")
    samples = vectors.arrays["x"].astype(np.float64)
    design, _ = choose_formats(network, samples)
    hardware = build_parallel(network, design, 3)
    gates = gates_as_written(write_sources(hardware.sources, tmp_path), TOP, tmp_path)
    given, expected = design.values["x"].round_input(samples), run(network, samples, design)
    assert answered(gates, hardware, given, expected) == len(samples)
    network.linear()[0][1].weight[0, 0] *= -1
    wrong = run(network, samples, Design(design.values, design.weights))
    assert 0 < answered(gates, hardware, given, wrong) < len(samples)


@installed
def test_tools_obey_the_time_limit(tmp_path: Path) -> None:
    """Yosys is stopped while it works."""
    from modelpress_compression.backends.fpga.tools import WORK, YOSYS, ToolError, is_ready, run_tool

    if not is_ready(YOSYS):
        pytest.skip("yosys is not prepared: python -m modelpress_compression.backends.fpga")
    (tmp_path / "a.v").write_text("module a(input x, output y); assign y = x; endmodule")
    assert "1 input bits" not in run_tool(YOSYS, ["-q", "-p", f"read_verilog {WORK}/a.v; synth"], tmp_path)
    (tmp_path / "b.v").write_text("module b(;")
    with pytest.raises(ToolError, match="syntax error"):
        run_tool(YOSYS, ["-q", "-p", f"read_verilog {WORK}/b.v"], tmp_path)
    wide = "module c(input [255:0] x, y, output [511:0] z); assign z = x * y * (x + y); endmodule"
    (tmp_path / "c.v").write_text(wide)
    with pytest.raises(TimeLimitError, match="while yosys was running"):
        run_tool(YOSYS, ["-q", "-p", f"read_verilog {WORK}/c.v; synth_ecp5 -nodsp"], tmp_path, time_left_s=1.0)
    assert not list(tmp_path.glob("modelpress-*"))
