"""The differentiable executor: a model in torch, with gradients, from its graph alone.

    executor = Executor(model, trainable=weights)
    loss = criterion(executor(feeds)["logits"], target)
    loss.backward()
    ...
    executor.write_back(student)

A graph is compiled once into a flat list of steps (`plan`, `compiler`); operators register builders by family (`ops`).
`unsupported_nodes` says without running anything what a model has that is not implemented. docs/executor_coverage.md
lists the operators and how they fare in ONNX's own tests.
"""

from modelpress_compression.executor.devices import device_for
from modelpress_compression.executor.errors import NotExecutableError
from modelpress_compression.executor.module import Executor, Selector
from modelpress_compression.executor.support import UnsupportedNode, unsupported_nodes
from modelpress_compression.executor.trainable import weights

__all__ = [
    "Executor",
    "NotExecutableError",
    "Selector",
    "UnsupportedNode",
    "device_for",
    "unsupported_nodes",
    "weights",
]
