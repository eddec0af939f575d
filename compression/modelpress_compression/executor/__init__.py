"""The differentiable executor: a model in torch, with gradients, from its graph alone.

    executor = Executor(model, trainable=weights)
    loss = criterion(executor(feeds)["logits"], target)
    loss.backward()
    ...
    executor.write_back(student)

A graph is compiled once into a flat list of steps (`plan`, `compiler`); operators register builders by family (`ops`).
`unsupported_nodes` lists the nodes of a model that are not implemented, without running anything.
docs/executor_coverage.md lists the operators and how they fare in ONNX's own tests.
"""

from modelpress_compression.executor import ops as _ops  # noqa: F401 - registers the operators
from modelpress_compression.executor.module import Executor, device_for, device_warning
from modelpress_compression.executor.registry import UnsupportedNode, unsupported_nodes
from modelpress_compression.executor.site import NotExecutableError
from modelpress_compression.executor.trainable import weights
from modelpress_compression.graph.blocks import Selector

__all__ = [
    "Executor",
    "NotExecutableError",
    "Selector",
    "UnsupportedNode",
    "device_for",
    "device_warning",
    "unsupported_nodes",
    "weights",
]
