"""Learned rounding: less error than GPTQ on samples that it did not see, and no harm where it cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from modelpress_compression.errors import TimeLimitError
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import Quantize
from modelpress_compression.passes.quantize.reconstruction import learn as module
from modelpress_compression.passes.quantize.reconstruction import samples as samples_module
from modelpress_compression.passes.quantize.reconstruction.dropping import add_dropping, at_random
from modelpress_compression.passes.quantize.reconstruction.rounders import LEARNED_LAYERS
from numpy.typing import NDArray
from onnx import helper

Apply = Callable[..., PassResult]
Arrays = Mapping[str, NDArray[Any]]
SQNR = Callable[[Model, Model, Arrays], float]


@pytest.fixture
def deep(build: Callable[..., Model], rng: np.random.Generator) -> Model:
    """Three Convs, the last two with a skip around them, and a head: x [N,8,8,8] -> y [N,40]."""
    shapes = {"w1": (24, 8, 3, 3), "w2": (24, 24, 3, 3), "w3": (24, 24, 3, 3), "w4": (24, 40)}
    weights = {name: rng.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape) for name, shape in shapes.items()}
    weights["w4"] *= 2
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1"], ["c1"], "conv_1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], "relu_1"),
        node("Conv", ["r1", "w2"], ["c2"], "conv_2", pads=[1, 1, 1, 1]),
        node("Relu", ["c2"], ["r2"], "relu_2"),
        node("Conv", ["r2", "w3"], ["c3"], "conv_3", pads=[1, 1, 1, 1]),
        node("Add", ["c3", "r1"], ["s"], "residual"),
        node("Relu", ["s"], ["r3"], "relu_3"),
        node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        node("Reshape", ["p", "rows"], ["f"], "flatten"),
        node("MatMul", ["f", "w4"], ["y"], "head"),
    ]
    arrays = {**{name: array.astype(np.float32) for name, array in weights.items()}, "rows": np.asarray([0, -1])}
    return build(nodes, arrays, {"x": ["n", 8, 8, 8]})


@pytest.fixture
def correlated(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    """Smooth images from a few patterns, to learn from and to judge by."""
    patterns = rng.normal(size=(12, 8, 8, 8))
    images = np.einsum("nk,kchw->nchw", rng.normal(size=(280, 12)), patterns) / 3
    images = (images + 0.1 * rng.normal(size=images.shape)).astype(np.float32)
    return {"x": images[:240]}, {"x": images[240:]}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["static", "weight_only"])
@pytest.mark.parametrize("rounding", ["adaround", "brecq"])
def test_it_gains_on_samples_not_seen(
    quantize: Apply,
    deep: Model,
    correlated: tuple[Arrays, Arrays],
    sqnr: SQNR,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    rounding: str,
) -> None:
    """More signal to noise than GPTQ's with 4-bit weights, on samples that calibration had not: 0.2 dB at least where
    weights make the error; where activations in 8 bits make most of it, no loss but of a tenth by chance. What is
    dropped at random moves one run by 0.4 dB: of those the mean of six counts."""
    given, unseen = correlated
    options = {"scheme": scheme, "weights": "int4"}
    plain = quantize(deep, given, rounding="gptq", **options)
    random = scheme == "weight_only" and rounding == "brecq"
    gains = []
    for seed in range(6 if random else 1):
        monkeypatch.setattr(module, "_SEED", seed)
        learned = quantize(deep, given, rounding=rounding, rounding_steps=200, **options)
        assert learned.changes[LEARNED_LAYERS] >= 3
        gains.append(sqnr(deep, learned.model, unseen) - sqnr(deep, plain.model, unseen))
    assert np.mean(gains) > (0.0 if random else 0.2 if scheme == "weight_only" else -0.1)
    if scheme == "weight_only":  # which biases are corrected may differ
        assert learned.model.weight_bytes() == plain.model.weight_bytes()


def test_the_same_twice(quantize: Apply, deep: Model, correlated: tuple[Arrays, Arrays]) -> None:
    """Equal inputs give equal files."""
    options = {"scheme": "static", "weights": "int4", "rounding": "brecq", "rounding_steps": 5}
    first, second = (quantize(deep, correlated[0], **options).model for _ in range(2))
    assert onnx_ir.serde.serialize_model(first.ir) == onnx_ir.serde.serialize_model(second.ir)


def test_no_layer_is_taken_that_is_not_better(
    quantize: Apply, deep: Model, correlated: tuple[Arrays, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels that err more on what is held out are left, layer by layer, with the reason; the result is GPTQ's."""

    def spoiled(self: Any, *_: object) -> NDArray[np.int16]:
        reader = self._reader
        return reader.linear.weight(reader.grid.levels + np.int16(1), reader.shape).astype(np.int16)

    monkeypatch.setattr(module.Layer, "learn", spoiled)
    options = {"scheme": "static", "weights": "int4"}
    plain = quantize(deep, correlated[0], rounding="gptq", **options)
    learned = quantize(deep, correlated[0], rounding="adaround", rounding_steps=1, **options)
    assert LEARNED_LAYERS not in learned.changes
    reasons = {skip.node: skip.reason for skip in learned.skipped if "not learned" in skip.reason}
    assert len(reasons) == 4
    assert "on samples held out its error was not smaller" in reasons["conv_2"]
    assert onnx_ir.serde.serialize_model(learned.model.ir) == onnx_ir.serde.serialize_model(plain.model.ir)


def test_weights_on_their_grid_stay(quantize: Apply, deep: Model, correlated: tuple[Arrays, Arrays]) -> None:
    """Where rounding costs nothing there is nothing to learn: every block is left as it is."""
    for name in ("w1", "w2", "w3", "w4"):
        value = deep.graph.initializers[name]
        array = np.asarray(value.const_value.numpy())  # type: ignore[union-attr]
        scale = np.abs(array).max(axis=0 if name == "w4" else (1, 2, 3), keepdims=True) / 127
        value.const_value = onnx_ir.Tensor((np.rint(array / scale) * scale).astype(np.float32), name=name)
    result = quantize(deep, correlated[0], scheme="weight_only", rounding="adaround", rounding_steps=3)
    assert LEARNED_LAYERS not in result.changes


def test_samples_that_are_not_finite_do_no_harm(
    quantize: Apply, deep: Model, correlated: tuple[Arrays, Arrays]
) -> None:
    """NaN and infinities in some samples: the others are learned from, and the result is finite on them."""
    images = np.array(correlated[0]["x"])
    images[3], images[17, 0, 0, 0] = np.nan, np.inf
    result = quantize(deep, {"x": images}, scheme="weight_only", weights="int4", rounding="brecq", rounding_steps=5)
    for tensor in result.model.tensors():
        if tensor.dtype.is_floating_point():
            assert np.isfinite(tensor.numpy()).all()


def test_a_block_takes_no_more_memory_than_it_may(
    quantize: Apply, deep: Model, correlated: tuple[Arrays, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are kept until their activations fill the room; the rest is left out, and learning goes on."""
    room = 1 << 20
    monkeypatch.setattr(samples_module, "MAX_BYTES", room)
    kept: list[int] = []
    gather = module.gathered

    def gathered(*arguments: Any) -> Any:
        found = gather(*arguments)
        kept.append(
            sum(
                value.nbytes
                for item in found
                for part in (item.given, item.plain, item.wanted)
                for value in part.values()
            )
        )
        return found

    monkeypatch.setattr(module, "gathered", gathered)
    quantize(deep, correlated[0], scheme="static", weights="int4", rounding="brecq", rounding_steps=2)
    assert kept
    assert room // 2 < max(kept) <= room


def test_it_stops_when_time_is_up(deep: Model, correlated: tuple[Arrays, Arrays], tmp_path: Any) -> None:
    """The job's limit ends it; less time than its steps would take is shared out among the blocks."""
    data = InputData(deep.inputs, dict(correlated[0]), True)
    config = QuantizeConfig(scheme="weight_only", weights="int4", rounding="adaround", rounding_steps=100_000)
    with pytest.raises(TimeLimitError):
        Quantize(config)(deep, Context(data, tmp_path, deadline=1.0, clock=lambda: 2.0))
    import time

    result = Quantize(config)(deep, Context(data, tmp_path, deadline=time.monotonic() + 6))
    assert result.changed


def test_data_it_needs(quantize: Apply, deep: Model, correlated: tuple[Arrays, Arrays]) -> None:
    """Without representative inputs weights go to the nearest level, with a warning that names the option."""
    result = quantize(deep, correlated[0], provided=False, scheme="weight_only", weights="int4", rounding="brecq")
    assert LEARNED_LAYERS not in result.changes
    assert any(warning.startswith("Rounding 'brecq' needs representative inputs") for warning in result.warnings)


def test_dropping_spares_activations_by_chance(quantize: Apply, deep: Model, correlated: tuple[Arrays, Arrays]) -> None:
    """One choice for each pair of quantization, under the name that the pair had."""
    model = quantize(deep, correlated[0], scheme="static").model
    pairs = [
        node.outputs[0].name
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].producer() is not None  # type: ignore[union-attr]
        and node.inputs[0].producer().op_type == "QuantizeLinear"  # type: ignore[union-attr]
    ]  # fmt: skip
    add_dropping(model)
    chosen = [node.outputs[0].name for node in model.graph if node.op_type == "Choose"]
    assert pairs
    assert chosen == pairs


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_elements_are_chosen_at_random(share: float) -> None:
    """As many as asked for, to within 1 % of 100,000, and others the next time."""
    like = torch.empty(100, 1003)
    first, second = at_random(like, share).expand(like.shape), at_random(like, share).expand(like.shape)
    assert abs(float(first.float().mean()) - share) < 0.01
    assert bool((first == second).all()) == (share in (0.0, 1.0))
