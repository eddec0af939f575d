"""Rotations as a part of quantization: taken where the outputs gain by them, and reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest
from modelpress_compression import mapped
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize import rotate as rotate_step
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.report import Findings
from modelpress_compression.passes.quantize.rotate import with_rotated_streams
from numpy.typing import NDArray
from onnx import TensorProto, helper

Apply = Callable[..., PassResult]
NODE = helper.make_node
WIDTH, INNER, TOKENS = 64, 96, 200
LOUD = [3, 17, 40]


def decoder(build: Callable[..., Model], rng: np.random.Generator, loudness: float) -> Model:
    """Table, two blocks (RMS normalization, product, Relu, product, sum), head; a few channels are loud."""
    gain = np.ones(WIDTH)
    gain[LOUD] = loudness
    weights: dict[str, NDArray[Any]] = {"table": rng.normal(0, 1, (TOKENS, WIDTH)) * gain, "ones": np.ones(WIDTH)}
    nodes = [NODE("Gather", ["table", "x"], ["s0"], "table")]
    for block in range(2):
        weights[f"up{block}"] = rng.normal(0, WIDTH**-0.5, (WIDTH, INNER))
        weights[f"down{block}"] = rng.normal(0, INNER**-0.5, (INNER, WIDTH)) * gain
        nodes += [
            NODE("SimplifiedLayerNormalization", [f"s{block}", "ones"], [f"n{block}"], f"norm{block}", axis=-1),
            NODE("MatMul", [f"n{block}", f"up{block}"], [f"u{block}"], f"up{block}"),
            NODE("Relu", [f"u{block}"], [f"r{block}"], f"relu{block}"),
            NODE("MatMul", [f"r{block}", f"down{block}"], [f"d{block}"], f"down{block}"),
            NODE("Add", [f"s{block}", f"d{block}"], [f"s{block + 1}"], f"sum{block}"),
        ]
    weights["head"] = rng.normal(0, WIDTH**-0.5, (WIDTH, 32))
    nodes += [
        NODE("SimplifiedLayerNormalization", ["s2", "ones"], ["n2"], "norm2", axis=-1),
        NODE("MatMul", ["n2", "head"], ["y"], "head"),
    ]
    arrays = {name: array.astype(np.float32) for name, array in weights.items()}
    return build(nodes, arrays, {"x": ["n", 8]}, types={"x": TensorProto.INT64})


def tokens(rng: np.random.Generator, count: int) -> dict[str, NDArray[np.int64]]:
    return {"x": rng.integers(0, TOKENS, (count, 8))}


@pytest.mark.parametrize(
    ("options", "gain_db"),
    [
        ({"scheme": "static", "rounding": "nearest"}, 4),
        ({"scheme": "dynamic"}, 4),
        ({"scheme": "weight_only", "weights": "int4", "rounding": "nearest"}, 1.5),
    ],
)
def test_outliers_are_spread(build, rng, quantize: Apply, sqnr, options: dict[str, Any], gain_db: float) -> None:  # type: ignore[no-untyped-def]
    """Three channels 25 times as loud as the others: unseen outputs keep so many dB more at the same size."""
    model = decoder(build, rng, 25)
    seen, unseen = tokens(rng, 32), tokens(rng, 32)
    plain = quantize(model, seen, rotate="none", **options)
    turned = quantize(model, seen, **options)
    assert "rotated_streams" not in plain.changes
    assert turned.changes["rotated_streams"] == 1
    assert turned.model.weight_bytes() <= 1.02 * plain.model.weight_bytes()
    assert sqnr(model, turned.model, unseen) > sqnr(model, plain.model, unseen) + gain_db


def test_streams_that_gain_nothing_stay(build, rng, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """Weights that 4 bits hold exactly would err once they are rotated: auto leaves them, and says so."""
    model = decoder(build, rng, 1)
    for value in model.graph.initializers.values():
        if value.name != "ones" and value.const_value is not None:
            grid = rng.integers(-7, 8, value.const_value.shape.numpy()).astype(np.float32)
            grid[..., ::8, :] = 7  # every block of weights reaches as far
            grid[..., 1::8, :] = -8
            value.const_value = onnx_ir.tensor(grid / 64, name=value.name)
    options = {"scheme": "weight_only", "weights": "int4", "rounding": "nearest"}
    result = quantize(model, tokens(rng, 16), **options)
    assert "rotated_streams" not in result.changes
    (skip,) = [skip for skip in result.skipped if "residual streams were not rotated" in skip.reason]
    assert "with rotations" in skip.reason
    assert quantize(model, tokens(rng, 16), rotate="always", **options).changes["rotated_streams"] == 1


def test_without_data_weights_alone_are_judged(build, rng, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """Made-up inputs judge rotations of stored weights, and none whose ranges they would have to tell."""
    model, made_up = decoder(build, rng, 25), tokens(rng, 16)
    weights = {"scheme": "weight_only", "weights": "int4"}
    assert quantize(model, made_up, provided=False, **weights).changes["rotated_streams"] == 1
    assert "rotated_streams" not in quantize(model, made_up, provided=False, scheme="static").changes


def test_always_says_why_not(mlp: Model, vectors, build, rng, quantize: Apply) -> None:  # type: ignore[no-untyped-def]
    """A model that normalizes nothing, and one whose stream is its output, are quantized without rotations, with the
    reason; a model of which nothing comes in fewer bits is not changed."""
    result = quantize(mlp, vectors, scheme="static", rotate="always")
    assert "there is no residual stream to rotate: nothing is normalized" in [skip.reason for skip in result.skipped]
    assert result.changes["MatMul"]
    assert "rotated_streams" not in result.changes
    model = decoder(build, rng, 25)
    model.graph.outputs.append(model.graph.node("sum1").outputs[0])
    reasons = [skip.reason for skip in quantize(model, tokens(rng, 16), scheme="static", rotate="always").skipped]
    assert any("its residual stream was not rotated: 's2' is an output of the model" in reason for reason in reasons)
    result = quantize(decoder(build, rng, 25), tokens(rng, 16), scheme="dynamic", rotate="always", exclude=["*"])
    assert not result.changed


def test_of_a_large_model_turned_weights_lie_in_a_file(
    build: Callable[..., Model], rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers; what was tried is gone from the folder, and so is the file where no rotation is taken."""
    model = decoder(build, rng, 25)
    data = InputData(model.inputs, dict(tokens(rng, 16)), True)
    config, context = QuantizeConfig(scheme="weight_only", weights="int4"), Context(data, tmp_path)

    def turned(error_of_turned: float) -> Model:
        errors = iter((1.0, error_of_turned))

        def quickly(one: Model, few: Context) -> Model:
            (few.work_directory / "left behind").touch()
            return one

        monkeypatch.setattr(rotate_step, "output_distances", lambda *_: SimpleNamespace(error=next(errors)))
        return with_rotated_streams(model, config, context, Findings(), quickly)

    expected = turned(0.1)
    monkeypatch.setattr(mapped, "LARGE_BYTES", 0)
    monkeypatch.setattr(mapped, "MAPPED_BYTES", 4096)
    assert turned(1.0) is model
    assert not list(tmp_path.iterdir())
    found = turned(0.1)
    assert len(list(tmp_path.iterdir())) == 1
    inside = {name for name, value in found.graph.initializers.items() if value.const_value.nbytes >= 4096}  # type: ignore[union-attr]
    assert inside == {"table", "head", *(f"{name}{block}" for name in ("up", "down") for block in range(2))}
    for name in inside:
        tensor = found.graph.initializers[name].const_value
        assert isinstance(tensor, onnx_ir.ExternalTensor)
        np.testing.assert_array_equal(tensor.numpy(), expected.graph.initializers[name].const_value.numpy())  # type: ignore[union-attr]
