"""Times decide: what is not faster stays, whatever it saves in multiplications."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from modelpress_compression.measure import product_times
from modelpress_compression.measure.latency import Speedup
from modelpress_compression.measure.product_times import Chain, Product, ProductTimes
from modelpress_compression.model import Model
from modelpress_compression.passes.base import PassResult
from modelpress_compression.passes.factorize import factorize as module
from onnx import helper

Apply = Callable[..., PassResult]


@pytest.fixture
def low_rank(channel_model: Callable[..., Model]) -> Model:
    """Two products of rank 4, of 48 and 64 inputs: x [n, 48] -> y [n, 32]."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (48, 64), "w2": (64, 32)}
    weights = {name: rng.normal(size=(k, 4)) @ rng.normal(size=(4, n)) for name, (k, n) in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "w2"], ["y"], name="second"),
    ]
    return channel_model(nodes, weights, ["n", 48], ["n", 32])


def prices(monkeypatch: pytest.MonkeyPatch, price: Callable[[Chain], float]) -> list[Chain]:
    """Chains take what `price` says; returns those that were asked for."""
    asked: list[Chain] = []

    def measured(chains: Sequence[Chain]) -> list[float]:
        asked.extend(chains)
        return [price(chain) for chain in chains]

    monkeypatch.setattr(product_times, "_measured", measured)
    return asked


def whole_model(monkeypatch: pytest.MonkeyPatch, median: float) -> None:
    monkeypatch.setattr(module, "speedup_of", lambda *_: Speedup(median, median, median))


def work(chain: Chain) -> float:
    """A price by multiplications, with something for each node."""
    return sum(np.prod(product.weight) for product in chain.products) + 100 * len(chain.products)


def test_factors_that_are_not_faster_stay_out(
    factorize: Apply, low_rank: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a node costs more than it multiplies, no layer is factorized, and the reason has both times."""
    prices(monkeypatch, lambda chain: float(len(chain.products)))
    result = factorize(low_rank, budget_of="latency")
    assert not result.changed
    reasons = {skip.node: skip.reason for skip in result.skipped}
    assert reasons["first"] == "Its factors are not faster on this machine: 2 ms, and 1 ms the layer."
    assert set(reasons) == {"first", "second"}
    assert factorize(low_rank, budget_of="macs").changed


def test_one_layer_is_faster_and_the_other_is_not(
    factorize: Apply, low_rank: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is judged by itself, by the shapes that it has: their chains were asked for."""
    asked = prices(monkeypatch, lambda chain: work(chain) if chain.shape == (1, 48) else float(len(chain.products)))
    whole_model(monkeypatch, 1.2)
    result = factorize(low_rank, budget_of="latency")
    assert [row["layer"] for row in result.details] == ["first"]
    assert Chain((1, 48), (Product("MatMul", (48, 64)),)) in asked
    assert any(chain.products == (Product("MatMul", (64, 8)), Product("MatMul", (8, 32))) for chain in asked)


def test_a_model_is_never_slower(factorize: Apply, low_rank: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that are faster one by one are taken back where the whole is not, with a warning."""
    prices(monkeypatch, work)
    whole_model(monkeypatch, 0.87)
    result = factorize(low_rank, budget_of="latency")
    assert result.model is low_rank
    assert not result.changed
    assert any("0.87 times as fast" in warning for warning in result.warnings)
    assert any("put back" in skip.reason for skip in result.skipped)


def test_a_budget_counts_times(factorize: Apply, low_rank: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the layers' time: as much is left at most, by the prices, and some layers have factors."""
    prices(monkeypatch, work)
    whole_model(monkeypatch, 1.5)
    result = factorize(low_rank, budget_of="latency", budget=0.5)
    full = {"first": 48 * 64 + 100, "second": 64 * 32 + 100}
    after = {str(row["layer"]): float(row["ms_after"]) for row in result.details}
    assert after
    assert sum({**full, **after}.values()) <= 0.5 * sum(full.values())


def test_real_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain is measured once."""
    small, large = (Chain((1, n, n), (Product("MatMul", (n, n)),)) for n in (32, 512))
    times = ProductTimes()
    first = times.of([small, large])
    assert min(first) >= 0
    monkeypatch.setattr(product_times, "_measured", lambda chains: pytest.fail("measured again"))
    assert times.of([large, small]) == first[::-1]


@pytest.mark.parametrize("kernel", [(3, 3), (3,)])
def test_convolutions_are_timed(kernel: tuple[int, ...]) -> None:
    """With their attributes, by every stage."""
    pads = (1,) * (2 * len(kernel))
    conv = Product("Conv", (8, 4, *kernel), (("pads", pads),))
    last = Product("Conv", (16, 8, *(1 for _ in kernel)))
    shape: Any = (1, 4, *(9 for _ in kernel))
    (found,) = ProductTimes().of([Chain(shape, (conv, last))])
    assert found >= 0
