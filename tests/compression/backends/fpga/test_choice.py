"""Weights trained for fixed point, and designs judged by what they were not fitted to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from modelpress_compression import InputData, Model, Recipe, compress
from modelpress_compression.backends.fpga import choice
from modelpress_compression.backends.fpga.choice import choose
from modelpress_compression.backends.fpga.emulator import Design, forward, rounded, run
from modelpress_compression.backends.fpga.formats import Fixed
from modelpress_compression.backends.fpga.network import Network, read_network
from modelpress_compression.backends.fpga.search import cheaper_and_cheaper, choose_formats, cost, loss_of
from modelpress_compression.backends.fpga.training import trained
from modelpress_compression.errors import TimeLimitError
from modelpress_compression.inputs import EvaluationData
from modelpress_compression.target import DEVICES

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '


@pytest.fixture
def model(model_from_text: Callable[..., Model]) -> Model:
    """x:float32[n,6] -> 3 classes."""
    rng = np.random.default_rng(2)
    return model_from_text(
        HEAD + "g (float[n,6] x) => (float[n,3] y) { h = Gemm(x, w, b)  r = Relu(h)  y = MatMul(r, v) }",
        {
            "w": rng.standard_normal((6, 12)).astype(np.float32),
            "b": rng.standard_normal(12).astype(np.float32),
            "v": rng.standard_normal((12, 3)).astype(np.float32),
        },
    )


@pytest.fixture
def network(model: Model, tmp_path: Path) -> Network:
    """The same, read."""
    model.save(tmp_path / "model.onnx")
    return read_network(tmp_path / "model.onnx")


def vectors(count: int, seed: int) -> np.ndarray:
    """[count, 6]"""
    return np.random.default_rng(seed).standard_normal((count, 6))


def test_gradients_pass_what_is_rounded() -> None:
    """As 1 inside the range, as 0 where numbers saturate."""
    values = torch.tensor([-3.0, -0.3, 0.26, 1.74, 1.9, 5.0], requires_grad=True)
    made = rounded(values, Fixed(True, 1, 1))
    assert made.tolist() == [-2.0, -0.5, 0.5, 1.5, 1.5, 1.5]
    made.sum().backward()  # type: ignore[no-untyped-call]  # torch has no annotations there
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_training_sees_what_the_emulator_computes(network: Network) -> None:
    """In float32, where no number on the way has more bits than it."""
    samples = vectors(50, 0)
    design, _ = choose_formats(network, samples)
    fractions = {"x": design.values["x"].fraction}
    (first, one), (second, two) = network.linear()
    fractions[second.inputs[0]] = design.values[first.output].fraction
    constants = {
        layer.name: tuple(
            torch.tensor(array, dtype=torch.float32)
            for array in (
                design.rounded_weight(layer, operation),
                design.rounded_bias(layer, operation, fractions[layer.inputs[0]]),
            )
        )
        for layer, operation in ((first, one), (second, two))
    }
    given = torch.tensor(design.values["x"].round_input(samples), dtype=torch.float32)
    np.testing.assert_array_equal(forward(network, given, constants, design).numpy(), run(network, samples, design))


def test_training_brings_answers_back(network: Network) -> None:
    """Of samples that it did not see: with two to four bits, of the answers that had changed four in ten do not."""
    design, _ = choose_formats(network, vectors(300, 0), 0.2)
    before, after = (
        loss_of(run(each, vectors(2000, 1), design), run(network, vectors(2000, 1)))
        for each in (network, trained(network, design, vectors(600, 0)))
    )
    assert after.noise < 0.8 * before.noise
    assert after.agreement is not None
    assert before.agreement is not None
    assert 1 - after.agreement < 0.6 * (1 - before.agreement)


def test_training_ends_when_time_is_up(network: Network) -> None:
    """Before its first step."""

    def late() -> None:
        raise TimeLimitError("late")

    design, _ = choose_formats(network, vectors(32, 0))
    with pytest.raises(TimeLimitError):
        trained(network, design, vectors(32, 0), late)


def test_designs_get_cheaper(network: Network) -> None:
    """Each than the one before."""
    costs = [cost(network, design) for design in cheaper_and_cheaper(network, vectors(200, 0), 0.01)]
    assert len(costs) > 5
    assert all(after < before for before, after in itertools.pairwise(costs))


def test_samples_that_are_held_out_judge(network: Network) -> None:
    """What is chosen has their bound of noise on samples that nobody saw, which the search's own choice is far from."""
    given, unseen = vectors(600, 0), vectors(4000, 1)
    found = choose(network, given, 0.01, None, vouch=True)
    assert found.trained
    assert found.judge == "200 samples that were held out"
    expected = run(network, unseen)
    kept = loss_of(run(found.network, unseen, found.design), expected)
    alone, _ = choose_formats(network, given, 0.01)
    lost = loss_of(run(network, unseen, alone), expected)
    assert kept.agreement is not None
    assert kept.agreement > 0.98
    assert kept.sqnr_db > 22
    assert lost.sqnr_db < 17


def test_labels_judge_where_there_are_some(network: Network) -> None:
    """All that is taken loses at most what is permitted, and the cheapest such is taken."""
    given = vectors(300, 0)
    seen: list[tuple[float, float]] = []

    def drop_of(tuned: Network, design: Design) -> float:
        price = cost(network, design)
        drop = 100 / price
        seen.append((price, drop))
        return drop

    found = choose(network, given, 0.1, drop_of, vouch=True)
    assert found.judge == "the labels"
    taken = 100 / cost(network, found.design)
    assert taken <= 0.1
    assert not [price for price, drop in seen if drop <= 0.1 and price < cost(network, found.design)]


def test_what_nothing_keeps_is_as_wide_as_can_be(network: Network) -> None:
    """The report then says that the bound was not kept."""
    found = choose(network, vectors(300, 0), 0.01, lambda *_: 1.0, vouch=True)
    assert {form.width for form in found.design.values.values()} == {18}
    assert not found.trained


def test_few_and_made_up_samples_train_nothing(network: Network) -> None:
    """As before: what is chosen is the search's."""
    for count, vouch in ((80, True), (300, False)):
        given = vectors(count, 0)
        found = choose(network, given, None, None, vouch=vouch)
        assert not found.trained
        assert found.network is network
        assert found.design == choose_formats(network, given)[0]


@pytest.mark.skipif(bool(DEVICES["fpga"].fault), reason="the FPGA tools are not installed")
def test_a_job_hands_its_labels_over(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the metric of the fixed-point network in plain ONNX, as the report has it; nothing is built here."""
    given = vectors(400, 0).astype(np.float32)
    labels = run_labels(model, given)
    drops: list[float] = []
    real = choice._by_labels

    class EnoughError(Exception):
        """Nothing more is to be seen."""

    def watch(drop_of: choice.DropOf, network: Network, samples: np.ndarray, allowed: float) -> object:
        kept = real(drop_of, network, samples, allowed)
        wide = Design(
            {"x": Fixed(True, 3, 12), **{layer.output: Fixed(True, 6, 12) for layer in network.layers}},
            {layer.name: Fixed(True, 3, 12) for layer, _ in network.linear()},
        )
        narrow = Design(wide.values, {layer.name: Fixed(True, 0, 1) for layer, _ in network.linear()})
        assert kept(network, wide)
        drops.extend(drop_of(network, design) for design in (wide, narrow))
        raise EnoughError

    monkeypatch.setattr(choice, "_by_labels", watch)
    recipe = Recipe.from_dict({"version": 1, "goal": {"objective": "balanced"}, "target": {"device": "fpga"}})
    data = InputData.from_arrays({"x": given}, model.inputs)
    with pytest.raises(EnoughError):
        compress(model, recipe, data=data, eval_data=EvaluationData(data, labels))
    assert drops[0] <= 0.005
    assert drops[1] > 0.05


def run_labels(model: Model, given: np.ndarray) -> np.ndarray:
    """The classes that the model itself names."""
    weights = {name: value.const_value.numpy() for name, value in model.ir.graph.initializers.items()}
    hidden = np.maximum(given @ weights["w"] + weights["b"], 0)
    return np.asarray((hidden @ weights["v"]).argmax(axis=1))
