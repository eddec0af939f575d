"""Sums over a layer's inputs give the error of any weights; what is learned from them errs less."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modelpress_compression.graph.blocks import Block
from modelpress_compression.model import Model
from modelpress_compression.passes.quantize.reconstruction.grids import Grid
from modelpress_compression.passes.quantize.reconstruction.layer_sums import Layer, LayerReader
from modelpress_compression.passes.quantize.reconstruction.samples import Sample
from modelpress_compression.passes.quantize.reconstruction.soft_rounding import Annealing
from onnx import helper

Build = Callable[..., Model]
LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "conv": ("Conv", {"pads": [1, 1, 1, 1], "strides": [2, 2]}, (6, 4, 3, 3), (1, 4, 9, 9)),
    "depthwise": ("Conv", {"pads": [2, 2, 2, 2], "group": 4}, (4, 1, 5, 5), (1, 4, 8, 8)),
    "grouped": ("Conv", {"group": 2, "dilations": [2]}, (6, 2, 3), (1, 4, 12)),
    "gemm": ("Gemm", {"transB": 1}, (5, 7), (3, 7)),
}


def opened(build: Build, rng: np.random.Generator, kind: str) -> tuple[LayerReader, list[Sample], Callable[..., Any]]:
    """A layer whose float twin has another bias, twelve samples that it reads a little off, and what it answers."""
    op, attributes, shape, extents = LAYERS[kind]
    weight = rng.normal(size=shape).astype(np.float32)
    biases = rng.normal(size=(2, shape[0])).astype(np.float32)
    models = []
    for bias in biases:
        node = helper.make_node(op, ["x", "w", "b"], ["y"], "layer", **attributes)
        models.append(build([node], {"w": weight, "b": bias}, {"x": list(extents)}))
    original, student = models
    scale = np.full((shape[0], *(1,) * (len(shape) - 1)), 0.4, np.float32)
    bounds = (np.full(scale.shape, end, np.int16) for end in (-7, 7))
    grid = Grid(weight, scale, *bounds, np.clip(np.rint(weight / scale), -7, 7).astype(np.int16))
    reader = LayerReader.open(original, student, Block(("x",), "y", frozenset([student.graph.initializers["w"]])), grid)
    assert reader is not None
    stretch = torch.from_numpy(np.asarray(attributes.get("strides", [1] * (len(shape) - 2))))

    def answers(x: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        given = [torch.from_numpy(np.asarray(part, np.float64)) for part in (x, weights, bias)]
        if op == "Gemm":
            return (given[0] @ given[1].T + given[2]).numpy()
        convolve = torch.nn.functional.conv2d if len(shape) == 4 else torch.nn.functional.conv1d
        pad = attributes.get("pads", [0])[0]
        options = {"groups": attributes.get("group", 1), "dilation": attributes.get("dilations", [1])[0]}
        return convolve(*given, stride=tuple(stretch.tolist()), padding=pad, **options).numpy()

    samples = []
    for number in range(12):
        plain = rng.normal(size=extents).astype(np.float32)
        given = plain + 0.1 * rng.normal(size=extents).astype(np.float32)
        wanted = answers(plain, weight, biases[0]).astype(np.float32)
        tensors = ({name: torch.from_numpy(array)} for name, array in (("x", given), ("x", plain), ("y", wanted)))
        samples.append(Sample(*tensors, {"y": torch.ones(wanted.shape)}, number % 4 == 0))

    def error(levels: np.ndarray) -> float:
        real = grid.real(levels)
        off = [answers(one.given["x"].numpy(), real, biases[1]) - one.wanted["y"].numpy() for one in samples]
        return float(sum(np.square(part).sum() for part in off))

    return reader, samples, error


@pytest.mark.parametrize("kind", LAYERS)
def test_sums_give_the_error_of_any_levels(build: Build, rng: np.random.Generator, kind: str) -> None:
    """Within a hundredth of a percent, for levels at random, other biases, and inputs that are off."""
    reader, samples, error = opened(build, rng, kind)
    sums = reader.sums(samples)
    for _ in range(3):
        levels = rng.integers(-7, 8, reader.shape).astype(np.int16)
        change = reader.linear.matrix(levels) * reader.grid.scale.astype(np.float64) - reader.grid.weight
        assert math.isclose(float(sums.errors(change).sum()), error(levels), rel_tol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_learned_errs_less(build: Build, rng: np.random.Generator, kind: str) -> None:
    """Than rounding to the nearest level, on the samples that were held out too."""
    reader, samples, error = opened(build, rng, kind)
    layer = Layer(reader, samples)
    levels = layer.learn(Annealing(200, time.monotonic() + 60, lambda: None))
    assert levels is not None
    nearest = reader.linear.weight(reader.grid.levels.astype(np.float64), reader.shape).astype(np.int16)
    assert levels.shape == nearest.shape
    assert np.abs(levels - nearest).max() == 1
    assert error(levels) < error(nearest)


def test_padding_does_not_count(build: Build, rng: np.random.Generator) -> None:
    """Rows that no answer counts of are left out of the sums."""
    reader, samples, _ = opened(build, rng, "gemm")
    for sample in samples:
        sample.counts["y"][0] = 0
        sample.given["x"][0] = 1e6
    assert reader.sums(samples).products.max() < 1e3
