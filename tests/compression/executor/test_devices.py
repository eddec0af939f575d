"""Accelerators: tensors of two devices never meet, shown on torch's device without data, which every machine has.

What reads numbers off a tensor, as shapes that are inputs of the graph, cannot run there and is not judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from modelpress_compression.errors import CompressionError
from modelpress_compression.executor import Executor, device_for, device_warning, unsupported_nodes, weights
from modelpress_compression.model import Model, Provenance
from onnx import helper
from oracles.conformance import cases, feed_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Copies between devices; reading a number; positions, which torch takes from the CPU too.
ALLOWED = {"_to_copy", "copy_", "_local_scalar_dense", "index"}


class MixedDevicesError(Exception):
    """What CUDA would refuse."""


class OneDevice(TorchDispatchMode):
    """Refuses every operation on tensors of two devices; a single number may come from the CPU, as in torch."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        tensors = [item for item in tree_leaves((args, kwargs or {})) if isinstance(item, Tensor)]
        devices = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
        if len(devices) > 1 and name not in ALLOWED:
            raise MixedDevicesError(f"{name}: {[(tensor.device.type, tuple(tensor.shape)) for tensor in tensors]}")
        return func(*args, **(kwargs or {}))


def outcome_of(case: Any) -> str:
    model = Model(onnx_ir.from_proto(case.model), Provenance("onnx", "", 0))
    if unsupported_nodes(model):
        return "unsupported"
    names = [value.name for value in case.model.graph.input]
    feeds = {name: feed_of(value) for name, value in zip(names, case.data_sets[0][0], strict=True)}
    try:
        with torch.no_grad(), OneDevice():
            Executor(model, device="meta")(feeds)
    except (CompressionError, NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower() or "expected device" in str(error):
            raise
        return "needs data"
    return "ran"


@pytest.mark.filterwarnings("ignore")
def test_no_operator_mixes_devices() -> None:
    """Every node test of ONNX that needs no data runs on the other device, over a thousand of them."""
    found = Counter(outcome_of(case) for case in cases())
    assert found["ran"] > 1000, found


def test_gradients_stay_on_the_device(channel_model: Any) -> None:
    """Forward and backward of a small network; parameters, outputs and gradients are all there."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "v"], ["y"]),
    ]
    arrays = {"w": rng.normal(size=(4, 3, 3, 3)), "b": rng.normal(size=4), "v": rng.normal(size=(4, 2))}
    model = channel_model(nodes, arrays, ["n", 3, 8, 8], ["n", 2])
    with OneDevice():
        executor = Executor(model, trainable=weights, device="meta")
        output = executor({"x": np.zeros((2, 3, 8, 8), np.float32)})["y"]
        output.square().sum().backward()
    assert output.shape == (2, 2)
    gradients = [parameter.grad for parameter in executor.parameters_by_name.values()]
    assert len(gradients) == 3
    assert all(gradient is not None and gradient.device.type == "meta" for gradient in gradients)


def test_mixing_is_seen() -> None:
    """The judge of the tests above refuses what CUDA would."""
    with OneDevice(), pytest.raises(MixedDevicesError):
        torch.mm(torch.ones(2, 2, device="meta"), torch.ones(2, 2))


def test_without_cuda_the_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that was asked for where it is there; else the CPU, and a sentence that says so."""
    assert device_for("cpu").type == "cpu"
    assert device_warning("cpu") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("cuda").type == "cpu"
    assert "ran on the CPU" in device_warning("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for("cuda").type == "cuda"
    assert device_warning("cuda") == ""
