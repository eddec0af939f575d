"""Kernels of onnxruntime are told by the layers that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from jsonschema import validate
from modelpress_compression.inputs import InputData
from modelpress_compression.loaders import load
from modelpress_compression.measure import node_times
from modelpress_compression.measure.layer_times import LayerForm, LayerTime, layer_forms, layer_times
from modelpress_compression.model import Model
from modelpress_compression.pipeline import compress
from modelpress_compression.recipe import Recipe, Step
from modelpress_compression.report.build import report_schema
from modelpress_compression.report.html import render_html
from modelpress_compression.report.ledger import Ledger

RNG = np.random.default_rng(0)
NET = """g (float[n,16,16,16] x) => (float[n,10] y) {
    a = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, w1)
    b = Relu(a)
    c = Conv<pads=[1,1,1,1], group=32, kernel_shape=[3,3]>(b, w2)
    p = GlobalAveragePool(c)
    q = Flatten(p)
    r = MatMul(q, w3)
    y = Add(r, b3)
}"""
WEIGHTS = {
    name: (RNG.standard_normal(shape) * 0.1).astype(np.float32)
    for name, shape in {"w1": (32, 16, 3, 3), "w2": (32, 1, 3, 3), "w3": (32, 10), "b3": (10,)}.items()
}
DATA = {"x": RNG.standard_normal((24, 16, 16, 16)).astype(np.float32)}
Save = Callable[..., Path]


def timed(model: Model, folder: Path) -> Mapping[str, LayerTime]:
    return layer_times([model], InputData.from_arrays(DATA, model.inputs), folder, threads=1)[0]


def test_kernels_have_the_names_of_their_layers(save_model: Save, tmp_path: Path) -> None:
    """A convolution that takes its activation in, and a product with its sum, are layers of weights still."""
    found = timed(load(save_model(NET, WEIGHTS)), tmp_path)
    assert {"Conv_0", "Conv_1", "MatMul_0"} <= found.keys()
    assert not {"Relu_0", "Add_0"} & found.keys()
    assert all(time.ms > 0 for time in found.values())
    assert found["Conv_0"].kernel.endswith("Conv")
    assert found["Conv_0"].types == "float → float"
    assert all(time.inserted == name.startswith("Reorder") for name, time in found.items())


def test_a_loop_is_the_kernels_within(save_model: Save, tmp_path: Path) -> None:
    """A product that runs eight times in each run takes longer than the one that runs once; the loop has no row."""
    text = """g (float[n,64] x) => (float[n,64] y) {
        first = MatMul(x, w)
        y = Loop(times, yes, first) <body = body (int64 i, bool go, float[n,64] h) => (bool on, float[n,64] k) {
            on = Identity(go)
            k = MatMul(h, w)
        }>
    }"""
    arrays = {"w": np.eye(64, dtype=np.float32), "times": np.int64(8), "yes": np.bool_(True)}
    model = load(save_model(text, arrays))
    data = InputData.from_arrays({"x": np.ones((1, 64), np.float32)}, model.inputs)
    (found,) = layer_times([model], data, tmp_path, threads=1)
    products = {name: time.ms for name, time in found.items() if "MatMul" in time.kernel or "Gemm" in time.kernel}
    assert len(products) == 2
    assert "Loop" not in {time.kernel for time in found.values()}
    assert max(products.values()) > 2 * products["MatMul_0"]


def test_a_profile_that_is_too_large_is_not_read(
    save_model: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loops may write any number of lines."""
    monkeypatch.setattr(node_times, "_PROFILE_BYTES", 1000)
    assert timed(load(save_model(NET, WEIGHTS)), tmp_path) == {}


def test_the_report_says_what_became_of_each_layer(save_model: Save) -> None:
    """Static: kernels of integers, with shares of the error that sum to one. Weights alone: stored, and why that is
    no faster."""
    model = load(save_model(NET, WEIGHTS))
    steps = (Step("fuse", {}), Step("quantize", {"scheme": "static"}))
    report = compress(model, Recipe(1, steps), data=DATA).report
    rows = {row["name"]: row for row in report["layers"]}
    validate(report, report_schema())
    conv, depthwise = rows["Conv_0"], rows["Conv_1"]
    assert (conv["kernel"], conv["types"]) == ("QLinearConv", "uint8, int8, int32 → uint8")
    assert conv["original_ms"] > 0
    assert conv["optimized_ms"] > 0
    assert "8 bits" in conv["why"]
    assert ("depthwise" in depthwise["why"]) == (depthwise["optimized_ms"] > depthwise["original_ms"])
    assert sum(row["error_share"] or 0 for row in rows.values()) == pytest.approx(1.0)
    assert all(row["why"] for row in rows.values() if row["layers"] == 1)
    page = render_html(report)
    assert "Time by layer" in page
    assert conv["types"] in page


PRODUCTS = """g (float[n,256] x) => (float[n,500] y) {
    a = MatMul(x, w1)
    b = Relu(a)
    c = MatMul(b, w2)
    y = Add(c, b2)
}"""
FACTORS = {
    "w1": RNG.standard_normal((256, 256)).astype(np.float32) * 0.1,
    "w2": RNG.standard_normal((256, 500)).astype(np.float32) * 0.1,
    "b2": np.ones(500, np.float32),
}


@pytest.mark.parametrize(("given", "says"), [(False, "give --data"), (True, "scheme: static")])
def test_stored_weights_say_what_would_make_them_faster(save_model: Save, given: bool, says: str) -> None:
    """They compute in float32, however few bits they have in the file."""
    data = {"x": RNG.standard_normal((8, 256)).astype(np.float32)} if given else None
    recipe = Recipe(1, (Step("quantize", {"scheme": "weight_only"}),))
    report = compress(load(save_model(PRODUCTS, FACTORS)), recipe, data=data).report
    rows = {row["name"]: row for row in report["layers"]}
    for name in ("MatMul_0", "MatMul_1"):
        assert "stored in 8 bits and it computes in float32" in rows[name]["why"]
        assert says in rows[name]["why"]


def test_products_with_ranges_of_each_run_are_one_layer(save_model: Save) -> None:
    """onnxruntime makes one kernel of what measures, multiplies and scales, named by its last node."""
    step = Step("quantize", {"scheme": "dynamic"})
    found = compress(load(save_model(PRODUCTS, FACTORS)), Recipe(1, (step,))).report
    kernels = {row["name"]: row.get("kernel") for row in found["layers"]}
    assert kernels["MatMul_0"] == kernels["MatMul_1"] == "DynamicQuantizeMatMul"


ORIGINAL = {"conv": LayerTime(1.0, "Conv", "float → float"), "relu": LayerTime(0.5, "Relu", "float → float")}
INTEGER = LayerTime(2.0, "QLinearConv", "uint8, int8 → uint8")


@pytest.mark.parametrize(
    ("ledger", "name", "weighted", "says"),
    [
        (Ledger(ORIGINAL, {"conv": INTEGER}, {"conv": LayerForm("Conv", depthwise=True)}), "conv", True, "0.5 times"),
        (Ledger(ORIGINAL, {"conv": INTEGER}, {}), "conv", True, "as before, without VNNI"),
        (Ledger(ORIGINAL, {"conv": INTEGER}, {}, instructions=["avx512_vnni"]), "conv", True, "as before; `exclude`"),
        (Ledger({"conv": INTEGER}, {"conv": INTEGER}, {}), "conv", True, "about as long as before"),
        (Ledger(ORIGINAL, ORIGINAL, {}, left_alone={"conv": "its weights are shared"}), "conv", True, "are shared."),
        (Ledger(ORIGINAL, ORIGINAL, {"conv": LayerForm("Conv")}), "conv", True, "quantize, or prune its channels"),
        (Ledger(ORIGINAL, ORIGINAL, {"relu": LayerForm("Relu")}), "relu", False, "Relu has no weights"),
        (Ledger({}, ORIGINAL, {}, known={"relu"}), "relu", False, "keeps them apart"),
        (Ledger(ORIGINAL, {}, {}), "relu", False, "no longer there"),
        (Ledger(ORIGINAL, {}, {"relu": LayerForm("Relu")}), "relu", False, "another layer's kernel"),
    ],
)
def test_why_a_layer_is_not_faster(ledger: Ledger, name: str, weighted: bool, says: str) -> None:
    """One sentence for each kind."""
    assert says in ledger.why(name, weighted)


def test_long_layers_are_over_a_hundredth() -> None:
    """Of the time of either model."""
    times = {f"n{index}": LayerTime(ms, "Add", "") for index, ms in enumerate((1.0, 98.0, 0.5, 0.5))}
    assert Ledger(times, {}, {}).long_layers() == {"n1"}
    assert Ledger(times, {"n3": LayerTime(1.0, "Add", "")}, {}).long_layers() == {"n1", "n3"}


def test_depthwise_layers_are_known_behind_conversions(save_model: Save) -> None:
    """By the weight, quantized or not."""
    model = load(save_model(NET, WEIGHTS))
    assert [name for name, form in layer_forms(model).items() if form.depthwise] == ["Conv_1"]
