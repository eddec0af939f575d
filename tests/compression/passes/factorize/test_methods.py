"""Each factorization equals the layer at full rank, in every form of convolution, and errs less the higher its rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelpress_compression.graph.edit import Editor
from modelpress_compression.passes.factorize.layers import find_layers
from modelpress_compression.passes.factorize.methods import METHODS, Problem, damped, rounded
from modelpress_compression.passes.factorize.writer import stored, write
from onnx import helper

FULL = {"svd": (24,), "tucker": (12, 24), "spatial": (36,), "depthwise": (9,)}
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"pads": [1, 1, 1, 1]},
    {"pads": [0, 2, 1, 3], "strides": [2, 1]},
    {"dilations": [2, 3], "strides": [1, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER"},
    {"auto_pad": "VALID", "strides": [3, 2]},
)


def in_place(model: Any, method: str, ranks: tuple[int, ...], moments: Any = None) -> Any:
    """A copy of the model whose only layer is factorized, and the factors."""
    clone = model.clone()
    (layer,), _ = find_layers(clone, (), {})
    factors = METHODS[method].factors(Problem(layer, moments), ranks)
    arrays = stored(layer, factors.stages)
    assert arrays is not None
    write(Editor(clone), layer, factors.stages, arrays)
    return clone, factors


def weight_of(*shape: int) -> Any:
    """Normal numbers of variance 1 over the inputs."""
    return np.random.default_rng(0).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_full_rank_is_exact(
    form: dict[str, Any], method: str, with_data: bool, convolution: Any, outputs_of: Any, correlated: Any
) -> None:
    """Answers are the layer's to within 1e-4 of their largest, wherever strides, dilations and padding lie."""
    model = convolution(weight_of(24, 12, 3, 3), 12, **form)
    x = correlated(3, 12)
    moments = None
    if with_data:
        rows = np.random.default_rng(2).standard_normal((300, 108)) * np.linspace(0.1, 3, 108)
        moments = damped((rows.T @ rows)[None])
    result, factors = in_place(model, method, FULL[method], moments)
    expected = outputs_of(model, x)
    np.testing.assert_allclose(outputs_of(result, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert factors.error < 1e-6
    assert len(result.graph) > len(model.graph)


@pytest.mark.parametrize("method", ["svd", "tucker", "depthwise"])
@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes(axes: int, method: str, channel_model: Any, outputs_of: Any) -> None:
    """Convolutions over one and three axes, exact at full rank (1e-4); a column and a row have no place there."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1] * axes + [0] * axes, strides=[2] * axes)
    model = channel_model(
        [node], {"w": weight_of(10, 6, *[3] * axes)}, ["n", 6, *[7] * axes], ["n", 10, *[None] * axes]
    )
    ranks = {"svd": (10,), "tucker": (6, 10), "depthwise": (10,)}[method]
    result, _ = in_place(model, method, ranks)
    x = np.random.default_rng(1).standard_normal((2, 6, *[7] * axes)).astype(np.float32)
    expected = outputs_of(model, x)
    np.testing.assert_allclose(outputs_of(result, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    (layer,), _ = find_layers(model.clone(), (), {})
    assert METHODS["spatial"].why_not(layer) == "its kernel has no two sides"


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_stay_groups(groups: int, convolution: Any, outputs_of: Any, correlated: Any) -> None:
    """The SVD of each group by itself, exact at full rank (1e-4); the other methods say why they are none."""
    model = convolution(weight_of(24, 12 // groups, 3, 3), 12, group=groups, pads=[1, 0, 0, 1])
    x = correlated(3, 12)
    result, _ = in_place(model, "svd", (24 // groups,))
    expected = outputs_of(model, x)
    np.testing.assert_allclose(outputs_of(result, x), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    (layer,), _ = find_layers(model.clone(), (), {})
    assert {METHODS[name].why_not(layer) for name in ("tucker", "spatial", "depthwise")} == {
        "its channels are in groups already"
    }


@pytest.mark.parametrize(("method", "ranks"), [
    ("svd", [(2,), (8,), (16,), (23,)]),
    ("tucker", [(2, 2), (6, 8), (8, 16), (11, 23)]),
    ("spatial", [(2,), (8,), (20,), (35,)]),
    ("depthwise", [(1,), (3,), (5,), (8,)]),
])  # fmt: skip
@pytest.mark.parametrize("with_data", [False, True])
def test_error_falls_with_the_rank(method: str, ranks: list[Any], with_data: bool, convolution: Any) -> None:
    """With second moments and without."""
    model = convolution(weight_of(24, 12, 3, 3), 12)
    rows = np.random.default_rng(2).standard_normal((300, 108)) * np.linspace(0.1, 3, 108)
    moments = damped((rows.T @ rows)[None]) if with_data else None
    errors = [in_place(model, method, rank, moments)[1].error for rank in ranks]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < errors[0] / 2


@pytest.mark.parametrize(
    ("method", "ranks"), [("svd", (6,)), ("tucker", (6, 10)), ("spatial", (9,)), ("depthwise", (3,))]
)
def test_error_is_that_of_the_composed_weight(method: str, ranks: Any, convolution: Any, outputs_of: Any) -> None:
    """Unit impulses read the composed kernel out of the factors: what it lacks of the weight is the error (1e-4)."""
    weight = weight_of(24, 12, 3, 3)
    model = convolution(weight, 12)
    result, factors = in_place(model, method, ranks)
    impulses = np.zeros((12, 12, 9, 10), np.float32)
    impulses[range(12), range(12), 2, 2] = 1
    silent = np.zeros((1, 12, 9, 10), np.float32)
    composed = (outputs_of(result, impulses) - outputs_of(result, silent))[:, :, :3, :3][:, :, ::-1, ::-1]
    lost = np.square(composed.transpose(1, 0, 2, 3) - weight).sum() / np.square(weight).sum()
    np.testing.assert_allclose(factors.error, lost, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)])
def test_whitening_is_the_best_of_its_rank(shape: tuple[int, int], channel_model: Any, outputs_of: Any) -> None:
    """By both sides: the answers err as the error says (5 %: H is damped), less than with plain factors."""
    rng = np.random.default_rng(0)
    model = channel_model([helper.make_node("MatMul", ["x", "w"], ["y"], "m")], {"w": rng.standard_normal(shape)},
                          ["n", shape[0]], ["n", shape[1]])  # fmt: skip
    x = (rng.standard_normal((500, shape[0])) @ np.diag(np.linspace(0.05, 4, shape[0]))).astype(np.float32)
    expected = outputs_of(model, x)
    lost = {}
    for name, moments in (("plain", None), ("whitened", damped((x.T.astype(float) @ x)[None]))):
        result, factors = in_place(model, "svd", (8,), moments)
        lost[name] = np.square(outputs_of(result, x) - expected).sum() / np.square(expected).sum()
    np.testing.assert_allclose(factors.error, lost["whitened"], rtol=0.05)
    assert lost["whitened"] < 0.8 * lost["plain"]


def test_ranks_cost_what_they_may(convolution: Any) -> None:
    """At every share the factors cost at most that of the layer; at a share too small there are none."""
    (layer,), _ = find_layers(
        convolution(weight_of(32, 16, 3, 3), 16, strides=[2, 2]).clone(), (), {"x": (1, 16, 9, 10)}
    )
    for method in METHODS.values():
        for share in (0.2, 0.5, 0.8):
            ranks = method.ranks(layer, share, 8)
            assert ranks is not None
            macs, parameters = method.cost(layer, ranks)
            assert macs <= share * layer.macs
            assert parameters <= share * layer.parameters
        assert method.ranks(layer, 1e-4, 8) is None


def test_ranks_are_multiples_where_they_are_large() -> None:
    """Down to a multiple of what is asked for; smaller ranks stay."""
    assert [rounded(rank, 8) for rank in (3.9, 7, 8, 15.2, 17)] == [3, 7, 8, 8, 16]


def test_moments_that_say_nothing() -> None:
    """Inputs that are zero throughout, or not finite, give no second moments."""
    assert damped(np.zeros((1, 4, 4))) is None
    assert damped(np.full((1, 4, 4), np.nan)) is None
