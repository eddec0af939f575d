"""How long a chain of layers takes on this machine: what factors of a layer really cost beside the layer itself.

A chain is one input shape and the products that run one after the other. It is built as a model of its own, with random
weights, and run on one thread by onnxruntime; its time is the shortest of many runs, which what else the machine does
lengthens least, less that of a model that does nothing. Chains that are compared run in turn. What was measured is kept
by the shapes, since a network repeats its layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir
import onnxruntime as ort

from modelpress_compression.inputs import Feeds
from modelpress_compression.model import MAX_IR_VERSION, Model, Provenance
from modelpress_compression.runtime import run, session_of

# Runs of each chain, as many as fit into the time; a few rounds at least.
_BUDGET_S, _LEAST_ROUNDS, _MOST_ROUNDS = 0.3, 5, 200
_OPSET = 17
Shape = tuple[int, ...]
Attributes = tuple[tuple[str, int | str | tuple[int, ...]], ...]


@dataclass(frozen=True)
class Product:
    """A Conv, MatMul or Gemm with a constant float32 weight of this shape; `attributes`: of the node, sorted."""

    op_type: str
    weight: Shape
    attributes: Attributes = ()


@dataclass(frozen=True)
class Chain:
    """Products that each read what the one before makes; `shape`: of what the first reads."""

    shape: Shape
    products: tuple[Product, ...]


_NOTHING = Chain((1,), ())


class ProductTimes:
    """Times of chains in milliseconds, each measured once."""

    def __init__(self) -> None:
        self._known: dict[Chain, float] = {}

    def of(self, chains: Sequence[Chain]) -> list[float]:
        """Those that are not known run in turn, beside the first. Raises ModelNotRunnableError."""
        unknown = [chain for chain in dict.fromkeys(chains) if chain not in self._known]
        if unknown:
            # What is known was measured at another time, when the machine may have been busier or less.
            together = list(dict.fromkeys([chains[0], *unknown]))
            for chain, found in zip(together, _measured(together), strict=True):
                self._known[chain] = min(found, self._known.get(chain, math.inf))
        return [self._known[chain] for chain in chains]


def _measured(chains: Sequence[Chain]) -> list[float]:
    with ExitStack() as stack:
        timed = [*chains, _NOTHING]
        sessions = [stack.enter_context(session_of(_model(chain))) for chain in timed]
        feeds: list[Feeds] = [{"x": np.ones(chain.shape, np.float32)} for chain in timed]
        best = [_run_ms(session, feed) for session, feed in zip(sessions, feeds, strict=True)]
        until, rounds = time.monotonic() + _BUDGET_S * len(chains), 0
        while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and time.monotonic() < until):
            for place, (session, feed) in enumerate(zip(sessions, feeds, strict=True)):
                best[place] = min(best[place], _run_ms(session, feed))
            rounds += 1
    return [max(ms - best[-1], 0.0) for ms in best[:-1]]


def _run_ms(session: ort.InferenceSession, feed: Feeds) -> float:
    began = time.perf_counter()
    run(session, feed)
    return 1000 * (time.perf_counter() - began)


def _model(chain: Chain) -> Model:
    generator = np.random.default_rng(0)
    value = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(chain.shape))
    inputs, nodes, weights = [value], [], []
    for number, product in enumerate(chain.products):
        array = generator.standard_normal(product.weight, np.float32)
        tensor = onnx_ir.Tensor(array, name=f"w{number}")
        weight = onnx_ir.Value(
            name=f"w{number}", type=onnx_ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
        )
        weights.append(weight)
        output = onnx_ir.Value(name=f"y{number}", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
        nodes.append(
            onnx_ir.node(
                product.op_type, [value, weight], dict(product.attributes), outputs=[output], name=f"n{number}"
            )
        )
        value = output
    if not nodes:
        nodes = [onnx_ir.node("Identity", [value], name="nothing")]
        value = nodes[0].outputs[0]
        value.name, value.type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph = onnx_ir.Graph(inputs, [value], nodes=nodes, initializers=weights, opset_imports={"": _OPSET}, name="chain")
    ir = onnx_ir.Model(graph, ir_version=min(MAX_IR_VERSION, 9))
    return Model(ir, Provenance("onnx", "0" * 64, 0))
