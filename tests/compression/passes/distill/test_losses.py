"""Which loss an output gets, and that each is a distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from modelpress_compression.graph.outputs import LOG_PROBABILITIES, LOGITS, PROBABILITIES
from modelpress_compression.passes.distill.losses import (
    ValueLoss,
    bernoulli_kl,
    cosine,
    kl,
    output_losses,
    relative_mse,
)
from modelpress_compression.passes.distill.objective import find_label_loss, label_tensor
from onnx import TensorProto, helper

HEADS = {
    "logits": ([("MatMul", ["x", "w"], ["y"])], "kl"),
    "softmax": ([("MatMul", ["x", "w"], ["l"]), ("Softmax", ["l"], ["y"])], "kl"),
    "log_softmax": ([("MatMul", ["x", "w"], ["l"]), ("LogSoftmax", ["l"], ["y"])], "kl"),
    "sigmoid": ([("MatMul", ["x", "w"], ["l"]), ("Sigmoid", ["l"], ["y"])], "kl (sigmoid)"),
    "normalized": ([("LpNormalization", ["x"], ["y"])], "cosine and mse"),
    "activation": ([("Tanh", ["x"], ["y"])], "mse"),
}


def graph_of(nodes: list[Any]) -> onnx_ir.Graph:
    made = [helper.make_node(op, inputs, outputs) for op, inputs, outputs in nodes]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 6]) for name in "xy"]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [6, 6], np.eye(6).ravel())
    model = helper.make_model(helper.make_graph(made, "g", infos[:1], infos[1:], [weight]))
    return onnx_ir.from_proto(model).graph


@pytest.mark.parametrize("head", HEADS)
def test_loss_follows_what_the_output_is(head: str) -> None:
    """Scores in each form get KL, embeddings the cosine, other numbers the squared error."""
    nodes, kind = HEADS[head]
    losses, reasons = output_losses(graph_of(nodes), {"y": np.ones((3, 6), np.float32)}, "auto", 2.0)
    assert [loss.kind for loss in losses] == [kind]
    assert not reasons


@pytest.mark.parametrize(
    "distance",
    [kl(LOGITS, 2.0), bernoulli_kl, cosine, relative_mse(np.arange(12.0)), kl(PROBABILITIES, 1.0)],
)
def test_zero_where_equal_and_positive_elsewhere(distance: Callable[[Any, Any], Any]) -> None:
    """Each distance is 0 (to 1e-6) between equal values, and above between different ones."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5, 4, generator=generator) for _ in range(2))
    assert abs(float(distance(a, a))) < 1e-6
    assert float(distance(a, b)) > 1e-4


def test_probabilities_and_scores_agree() -> None:
    """KL between probabilities is KL between the scores that they came from (rtol 1e-4)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(5, 4, generator=generator) for _ in range(2))
    expected = float(kl(LOGITS, 3.0)(a, b))
    assert float(kl(PROBABILITIES, 3.0)(a.softmax(-1), b.softmax(-1))) == pytest.approx(expected, rel=1e-4)
    assert float(kl(LOG_PROBABILITIES, 3.0)(a.log_softmax(-1), b.log_softmax(-1))) == pytest.approx(expected, rel=1e-4)


def test_padding_does_not_count() -> None:
    """Positions that the mask leaves out change neither the loss nor get gradients."""
    loss = ValueLoss("y", "mse", relative_mse(np.arange(12.0)))
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    loss({"y": student}, {"y": teacher}, mask).backward()
    assert student.grad is not None
    assert not student.grad[~mask].any()
    assert student.grad[mask].all()


def test_minus_infinity_scores_are_finite() -> None:
    """Scores that a mask set to minus infinity do not make the loss NaN."""
    scores = torch.tensor([[1.0, -torch.inf, 0.5]])
    assert torch.isfinite(kl(LOGITS, 4.0)(scores, scores + torch.tensor([[0.5, 0, 0]])))


@pytest.mark.parametrize(
    ("labels", "shape"), [(np.array([0, 2, -1]), (3, 4)), (np.array([[0, 1], [3, -1], [2, 2]]), (3, 2, 4))]
)
def test_class_labels(labels: Any, shape: tuple[int, ...]) -> None:
    """Class indices give the cross-entropy of those that are not negative (rtol 1e-5)."""
    scores = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    loss = find_label_loss([ValueLoss("y", "kl", kl(LOGITS, 4.0))], {"y": scores}, labels)
    assert loss is not None
    got = float(loss({"y": torch.from_numpy(scores)}, label_tensor(labels, torch.device("cpu"))))
    logs = torch.log_softmax(torch.from_numpy(scores), -1).numpy()
    counted = labels >= 0
    expected = -np.take_along_axis(logs, np.maximum(labels, 0)[..., None], -1)[..., 0][counted].mean()
    assert got == pytest.approx(expected, rel=1e-5)


def test_labels_that_fit_no_output() -> None:
    """Classes that the output does not have, or another number of axes, fit nothing."""
    scores = {"y": np.zeros((3, 4), np.float32)}
    losses = [ValueLoss("y", "kl", kl(LOGITS, 4.0))]
    assert find_label_loss(losses, scores, np.array([0, 1, 4])) is None
    assert find_label_loss(losses, scores, np.zeros((3, 5), np.int64)) is None
