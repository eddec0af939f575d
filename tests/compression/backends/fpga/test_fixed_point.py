"""Fixed-point numbers, the emulator, the choice of bits, and the network as ONNX files."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression import InputData, Model
from modelpress_compression.backends.fpga import search
from modelpress_compression.backends.fpga.emulator import Design, check_exact, run, sum_bits
from modelpress_compression.backends.fpga.estimate import estimate
from modelpress_compression.backends.fpga.formats import Fixed, fraction_bits, integer_bits
from modelpress_compression.backends.fpga.forms import plain_onnx, qonnx
from modelpress_compression.backends.fpga.network import Linear, Network, read_network
from modelpress_compression.backends.fpga.parts import PARTS
from modelpress_compression.backends.fpga.search import choose_formats, cost, loss_of, signed_digits
from modelpress_compression.errors import UnsupportedOperatorError
from modelpress_compression.target import FPGA_PARTS

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
forms = st.builds(
    lambda signed, width, fraction: Fixed(signed, width - fraction - signed, fraction),
    st.booleans(),
    st.integers(2, 20),
    st.integers(-6, 24),
)


@pytest.fixture
def network_of(model_from_text: Callable[..., Model], tmp_path: Path) -> Callable[..., Network]:
    """Reads a network in ONNX's text form."""

    def read(text: str, weights: dict[str, np.ndarray] | None = None) -> Network:
        path = tmp_path / "model.onnx"
        model_from_text(HEAD + text, weights).save(path)
        return read_network(path)

    return read


@given(forms, st.floats(-1e5, 1e5))
def test_rounding_is_to_the_nearest_and_saturates(form: Fixed, value: float) -> None:
    """As exact fractions say: floor(value / step + 1/2) steps, held between the ends."""
    steps = floor(Fraction(value) / Fraction(2) ** -form.fraction + Fraction(1, 2))
    low, high = (-(2 ** (form.width - 1)), 2 ** (form.width - 1) - 1) if form.signed else (0, 2**form.width - 1)
    expected = Fraction(min(max(steps, low), high)) * Fraction(2) ** -form.fraction
    rounded = form.round(np.array([value]))
    assert Fraction(float(rounded[0])) == expected
    # What has the format stays as it is, and its integers are those of the format.
    assert form.round(rounded) == rounded
    assert form.round_input(rounded) == rounded
    assert low <= int(form.integers(rounded)[0]) <= high
    assert form.low <= rounded[0] <= form.high


@given(forms, st.integers(-(2**30), 2**30))
def test_inputs_are_rounded_to_even(form: Fixed, halves: int) -> None:
    """As Python's own round does."""
    value = halves / 2 * form.step
    expected = min(max(round(Fraction(halves, 2)) * form.step, form.low), form.high)
    assert form.round_input(np.array([value]))[0] == expected


@given(st.lists(st.integers(-(2**20), 2**20), min_size=1), st.integers(-10, 10))
def test_bits_that_numbers_need(integers: list[int], fraction: int) -> None:
    """Behind the point so many that all are whole in it, and with one less some are not; before it enough for all."""
    values = np.array(integers, np.float64) * 2.0**-fraction
    needed = fraction_bits(values)
    assert (np.rint(values * 2.0**needed) == values * 2.0**needed).all()
    if values.any():
        assert (np.rint(values * 2.0 ** (needed - 1)) != values * 2.0 ** (needed - 1)).any()
    largest = float(np.abs(values).max())
    assert largest < 2.0 ** integer_bits(largest) or largest == 0


@given(st.integers(-(2**40), 2**40))
def test_digits_of_the_canonical_signed_form(number: int) -> None:
    """As many as the textbook's way finds, which takes them off one by one."""
    left, digits = abs(number), 0
    while left:
        if left % 2:
            left -= 2 - left % 4
            digits += 1
        left //= 2
    assert signed_digits(np.array([number])) == digits


def test_a_format_needs_a_bit() -> None:
    """And signed ones another."""
    with pytest.raises(ValueError, match="needs a bit"):
        Fixed(True, 0, 0)
    assert Fixed(False, 0, 1).high == 0.5


def test_the_emulator_against_python_integers(network_of: Callable[..., Network]) -> None:
    """Bit for bit: integers of any size, shifts and comparisons, element by element."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((5, 4)), "b": rng.standard_normal(4), "v": rng.standard_normal((4, 2))}
    network = network_of(
        "g (float[n,5] x) => (float[n,2] y) { h = MatMul(x, w)  s = Add(h, b)  r = Relu(s)  y = MatMul(r, v) }",
        {name: array.astype(np.float32) for name, array in weights.items()},
    )
    (first, one), (second, two) = network.linear()
    design = Design(
        {"x": Fixed(True, 2, 5), first.output: Fixed(False, 1, 4), second.output: Fixed(True, 1, 3)},
        {first.name: Fixed(True, 1, 6), second.name: Fixed(True, 2, 3)},
    )
    samples = rng.standard_normal((50, 5)) * 2
    answers = run(network, samples, design)

    def layer(inputs: list[int], operation: Linear, fraction: int, name: str, output: Fixed, low: int) -> list[int]:
        form, results = design.weights[name], []
        for row, bias in zip(operation.weight, operation.bias, strict=True):
            whole = [min(max(floor(Fraction(w) * 2**form.fraction + Fraction(1, 2)), -(2 ** (form.width - 1))),
                         2 ** (form.width - 1) - 1) for w in row]  # fmt: skip
            total = sum(w * x for w, x in zip(whole, inputs, strict=True))
            total += floor(Fraction(bias) * 2 ** (fraction + form.fraction) + Fraction(1, 2))
            shift = fraction + form.fraction - output.fraction
            results.append(min(max((total + (1 << (shift - 1))) >> shift, low), int(output.high / output.step)))
        return results

    for sample, answer in zip(samples, answers, strict=True):
        inputs = [int(k) for k in design.values["x"].integers(design.values["x"].round_input(sample))]
        hidden = layer(inputs, one, 5, first.name, design.values[first.output], 0)
        made = layer(hidden, two, 4, second.name, design.values[second.output], -16)
        assert made == [int(k) for k in design.values[second.output].integers(answer)]


def test_the_float_network_is_the_models(network_of: Callable[..., Network], tmp_path: Path) -> None:
    """Convolutions with padding, strides, dilations and groups, pooling, sums and layout, to 1e-4 of onnxruntime."""
    rng = np.random.default_rng(1)
    weights = {
        "w": rng.standard_normal((6, 2, 3, 3)), "b": rng.standard_normal(6), "d": rng.standard_normal((6, 1, 3, 3)),
        "v": rng.standard_normal((5, 24)), "c": rng.standard_normal(5),
    }  # fmt: skip
    network = network_of(
        """g (float[n,2,8,8] x) => (float[n,5] y) {
        a = Conv<pads=[1,1,1,1]>(x, w, b)  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)  r = Relu(m)
        e = Conv<group=6, pads=[2,2,2,2], dilations=[2,2]>(r, d)  s = Add(e, r)  t = Relu(s)
        p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(t)  q = Transpose<perm=[0,2,3,1]>(p)
        f = Flatten(q)  y = Gemm<transB=1, alpha=0.5>(f, v, c) }""",
        {name: array.astype(np.float32) for name, array in weights.items()},
    )
    samples = rng.standard_normal((7, 2, 8, 8)).astype(np.float32)
    (expected,) = ort.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"x": samples})
    np.testing.assert_allclose(run(network, samples), expected, rtol=1e-4, atol=1e-4)
    # The Relu behind the pooling went to the convolution; that behind the sum stays with the sum.
    assert [layer.relu for layer in network.layers if layer.rounds] == [True, False, True, False, False]
    # The fixed-point network in plain ONNX is the emulator's, exactly, and so close to the float one as was asked.
    design, loss = choose_formats(network, samples)
    check_exact(network, design)
    answers = run(network, samples, design)
    session = ort.InferenceSession(plain_onnx(network, design, "y").SerializeToString())
    np.testing.assert_array_equal(session.run(None, {"x": samples})[0], answers)
    assert loss == loss_of(answers, run(network, samples))
    assert loss.sqnr_db >= 10


@pytest.mark.slow
def test_bits_are_chosen_by_answers(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """On real digits: what may differ in more answers costs less, and both keep what they were told to."""
    digits.save(tmp_path / "digits.onnx")
    network = read_network(tmp_path / "digits.onnx")
    given = np.concatenate([feed[network.input] for feed in samples.feeds(64, limit=128)]).astype(np.float64)
    strict, loose = (choose_formats(network, given, drop) for drop in (0.0, 0.1))
    assert strict[1].agreement == 1.0
    assert loose[1].agreement is not None
    assert loose[1].agreement >= 0.9
    assert cost(network, loose[0]) <= cost(network, strict[0]) < cost(network, _wide(strict[0]))
    assert max(sum_bits(network, strict[0]).values()) <= 24
    assert network.host


def _wide(design: Design) -> Design:
    """With six more bits everywhere."""
    return Design(*({name: Fixed(form.signed, form.integer, form.fraction + 6) for name, form in part.items()}
                    for part in (design.values, design.weights)))  # fmt: skip


def test_qonnx_gives_the_same_numbers(network_of: Callable[..., Network], monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed by the qonnx package, where it is installed."""
    # It gives onnxruntime single nodes in onnx's newest form, which onnxruntime may not know yet.
    monkeypatch.setattr("onnx.IR_VERSION", 10)
    wrapper = pytest.importorskip("qonnx.core.modelwrapper", reason="qonnx is not installed: pip install qonnx")
    execute = pytest.importorskip("qonnx.core.onnx_exec").execute_onnx
    shapes = pytest.importorskip("qonnx.transformation.infer_shapes").InferShapes
    rng = np.random.default_rng(2)
    network = network_of(
        "g (float[n,6] x) => (float[n,3] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }",
        {"w": rng.standard_normal((6, 8)).astype(np.float32), "v": rng.standard_normal((8, 3)).astype(np.float32)},
    )
    samples = rng.standard_normal((64, 6)).astype(np.float32)
    design, _ = choose_formats(network, samples)
    model = wrapper.ModelWrapper(qonnx(network, design, "y")).transform(shapes())
    for sample, expected in zip(samples, run(network, samples, design), strict=True):
        answer = execute(model, {"x": sample[None]})["y"]
        np.testing.assert_array_equal(answer[0], expected)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("y = Tanh(x)", "it has the operator Tanh"),
        ("y = MatMul(x, x)", "takes two values that both depend on the input"),
        ("s = Softmax(x)  y = MatMul(s, w)", "MatMul stands behind Softmax, which the host does"),
        ("y = Relu(x)", "no layer with weights"),
        ("h = MatMul(x, w)  y = Clip(h, one)", r"clips to 1\.0 \.\.\. None"),
        ("y = MatMul(x, hole)", "a weight that is no finite number"),
        ("h = MatMul(x, w)  y = Reshape(h, flat)", "does not keep samples apart"),
    ],
)
def test_what_does_not_become_hardware_is_named(network_of: Callable[..., Network], nodes: str, reason: str) -> None:
    """With the reason, and what to do."""
    weights = {"w": np.eye(4, dtype=np.float32), "flat": np.array([-1, 2]), "one": np.float32(1)}
    weights["hole"] = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(UnsupportedOperatorError, match=reason) as raised:
        network_of(f"g (float[n,4] x) => (float[n,4] y) {{ {nodes} }}", weights)
    assert "take the target cpu" in raised.value.message


def test_sizes_that_are_computed_are_read(network_of: Callable[..., Network]) -> None:
    """As traced networks flatten: the batch is taken from the value's own shape."""
    network = network_of(
        """g (float[n,2,3,3] x) => (float[n,4] y) {
        c = Conv(x, w)  s = Shape(c)  b = Gather<axis=0>(s, zero)  u = Unsqueeze(b, zeros)  t = Concat<axis=0>(u, rest)
        f = Reshape(c, t)  y = MatMul(f, v) }""",
        {
            "w": np.ones((5, 2, 1, 1), np.float32),
            "v": np.ones((45, 4), np.float32),
            "zero": np.array(0),
            "zeros": np.array([0]),
            "rest": np.array([-1]),
        },
    )
    assert [layer.shape for layer in network.layers] == [(5, 3, 3), (45,), (4,)]


def test_numbers_far_out_of_range_have_no_fixed_point_form(network_of: Callable[..., Network]) -> None:
    """A bias beyond all that sums can hold: the layer is named."""
    network = network_of(
        "g (float[n,4] x) => (float[n,4] y) { h = MatMul(x, w)  y = Add(h, b) }",
        {"w": np.eye(4, dtype=np.float32), "b": np.full(4, 1e30, np.float32)},
    )
    design, _ = choose_formats(network, np.random.default_rng(0).standard_normal((8, 4)))
    with pytest.raises(UnsupportedOperatorError, match=r"no form in fixed point: sums of .* would have"):
        check_exact(network, design)


def test_large_networks_get_one_width(network_of: Callable[..., Network], monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrowest that keeps the answers, on a few samples."""
    rng = np.random.default_rng(5)
    network = network_of(
        "g (float[n,6] x) => (float[n,3] y) { h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, v) }",
        {"w": rng.standard_normal((6, 8)).astype(np.float32), "v": rng.standard_normal((8, 3)).astype(np.float32)},
    )
    samples = rng.standard_normal((64, 6))
    monkeypatch.setattr(search, "MOST_PRODUCTS", 100)
    assert search.is_large(network)
    design, loss = choose_formats(network, samples)
    (width,) = {form.width for form in design.values.values()}
    assert {form.width for form in design.weights.values()} == {width - 2}
    assert loss.agreement is not None
    assert loss.agreement >= 0.99
    assert loss.sqnr_db >= search.FLOOR_DB


def test_inputs_of_unknown_size_are_refused(network_of: Callable[..., Network]) -> None:
    """All but the batch must be fixed."""
    with pytest.raises(UnsupportedOperatorError, match="fixed sizes"):
        network_of("g (float[n,m] x) => (float[n,4] y) { y = MatMul(x, w) }", {"w": np.eye(4, dtype=np.float32)})


def test_the_estimate_of_a_folded_design(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """It unfolds the slowest layer as far as the part allows: a larger part is faster."""
    digits.save(tmp_path / "digits.onnx")
    network = read_network(tmp_path / "digits.onnx")
    given = np.concatenate([feed[network.input] for feed in samples.feeds(8, limit=8)]).astype(np.float64)
    design, _ = choose_formats(network, given)
    small, large = (estimate(network, design, PARTS[name]) for name in ("lfe5u-25f", "xcvu13p"))
    assert small.fits
    assert large.fits
    assert large.cycles < small.cycles
    assert "not built here" in small.words()


def test_the_table_of_parts_is_the_targets() -> None:
    """What a recipe may name has figures."""
    assert sorted(PARTS) == sorted(FPGA_PARTS)
