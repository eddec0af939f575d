"""OpenVINO as a target, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from modelpress_compression import EvaluationData, InputData, Model, Recipe, compress
from modelpress_compression.backends import backend_of, backends_of
from modelpress_compression.backends.cpu import CPU
from modelpress_compression.errors import ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.target import Target

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'modelpress[openvino]'")
HEAD = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> '
EXACT, COARSE = (Target(device="openvino", precision=precision) for precision in ("float32", "bfloat16"))


@pytest.fixture
def save(model_from_text: Callable[..., Model], tmp_path: Path) -> Callable[..., Path]:
    """Writes a model in ONNX's text form to a file."""

    def write(text: str, weights: dict[str, np.ndarray] | None = None) -> Path:
        path = tmp_path / "model.onnx"
        model_from_text(HEAD + text, weights).save(path)
        return path

    return write


def test_it_answers_as_onnxruntime_in_float32(digits: Model, samples: InputData, tmp_path: Path) -> None:
    """Up to rounding; alone, in batches, from several threads at once, and on data that may not be written to."""
    path = tmp_path / "digits.onnx"
    digits.save(path)
    runner, common = backend_of(EXACT).open(path, comparable=True), CPU.open(path)
    feeds = [*samples.feeds(1, 16), *samples.feeds(4, 16)]
    for feed in feeds:
        for array in feed.values():
            array.flags.writeable = False
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(runner.run, feeds))
    for feed, answer in zip(feeds, answers, strict=True):
        expected = common.run(feed)
        assert list(answer) == list(expected)
        for name, array in expected.items():
            np.testing.assert_allclose(answer[name], array, rtol=1e-4, atol=1e-4)
    (timed,) = runner.prepared(feeds[0])().values()
    np.testing.assert_allclose(timed, next(iter(common.run(feeds[0]).values())), rtol=1e-4, atol=1e-4)


def test_outputs_keep_their_order_types_and_numbers(save: Callable[..., Path]) -> None:
    """Integers, booleans and a number without axes among inputs and outputs."""
    nodes = "size = Abs(x)  b = Less(x, size)  twice = Add(k, k)  a = Neg(x)"
    path = save(f"g (float[n] x, int64 k) => (bool[n] b, int64 twice, float[n] a) {{ {nodes} }}")
    feed = {"x": np.array([1.0, -2.0], np.float32), "k": np.array(3, np.int64)}
    answer, expected = (backend.open(path).run(feed) for backend in (backend_of(EXACT), CPU))
    assert list(answer) == list(expected) == ["b", "twice", "a"]
    for name, array in expected.items():
        np.testing.assert_array_equal(answer[name], array)
        assert answer[name].shape == array.shape


def test_random_models_can_be_compared(save: Callable[..., Path]) -> None:
    """Both runtimes draw the same numbers."""
    path = save("g (float[2,3] x) => (float[2,3] y) { noise = RandomNormalLike(x)  y = Add(x, noise) }")
    feed = {"x": np.zeros((2, 3), np.float32)}
    answers = [backend.open(path, comparable=True).run(feed)["y"] for backend in (backend_of(EXACT), CPU)]
    assert np.abs(answers[0]).min() > 0
    np.testing.assert_allclose(*answers, rtol=1e-6)


def test_a_rank_that_shapes_decide(save: Callable[..., Path]) -> None:
    """OpenVINO converts it with the shapes of the feeds, as exporters write `squeeze`; the report says so."""
    path = save(
        """g (float[n,m] x) => (float[n,k] y) {
        size = Shape(x)  second = Gather(size, at)  one = Equal(second, at)
        some = If(one) <then_branch = a () => (t) { t = Squeeze(x, axes) },
                        else_branch = b () => (e) { e = Identity(x) }>
        rows = Unsqueeze(some, axes)  wide = Conv(rows, w)  y = Squeeze(wide, axes) }""",
        {"at": np.array(1), "axes": np.array([1]), "w": np.ones((1, 1, 2), np.float32)},
    )
    runner = backend_of(EXACT).open(path)
    assert "only with fixed input shapes" in runner.note
    for width in (3, 4, 5, 6, 7, 3):
        feed = {"x": np.arange(2 * width, dtype=np.float32).reshape(2, width)}
        np.testing.assert_allclose(runner.run(feed)["y"], CPU.open(path).run(feed)["y"], rtol=1e-5)
        runner.prepared(feed)()


def test_what_it_does_not_run_is_named(save: Callable[..., Path]) -> None:
    """The operator where it is one, without paths of its sources."""
    path = save("g (float[2,4] x) => (float[2,4] y) { y = com.microsoft.BifurcationDetector(x) }")
    with pytest.raises(UnsupportedOperatorError, match=r"OpenVINO does not run these operators.*BifurcationDetector"):
        backend_of(EXACT).open(path)
    path.write_bytes(b"no model")
    with pytest.raises(ModelNotRunnableError, match="OpenVINO cannot run the model") as raised:
        backend_of(EXACT).open(path)
    assert "src/" not in raised.value.message


def test_a_job_measures_in_both_runtimes(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """OpenVINO's rows stand first; the report says in what it computed."""
    said: list[str] = []
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "steps": [{"fuse": {}}, {"quantize": {"scheme": "weight_only"}}],
            "target": {"device": "openvino", "precision": "float32"},
            "benchmark": {"rounds": 6},
        }
    )
    result = compress(digits, recipe, data=samples, eval_data=labelled, on_log=lambda _, text: said.append(text))
    report = result.report
    assert [row["execution_provider"] for row in report["latency"]] == ["OpenVINO float32", "CPUExecutionProvider"]
    assert report["environment"]["openvino"]
    assert report["accuracy"]["drop"] <= 0.01
    assert any("computes in float32 here, as the target's precision says" in text for text in said)
    assert not any("answers otherwise" in warning for warning in report["warnings"])


def test_a_runtime_that_answers_otherwise_is_told(model_from_text: Callable[..., Model]) -> None:
    """A sum of which little is left over has no digits in bfloat16: the original itself is another model there."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((64, 32)).astype(np.float32)
    text = HEAD + "g (float[n,64] x) => (float[n,32] y) { h = MatMul(x, w)  y = MatMul(h, v) }"
    weights = {
        "w": np.concatenate([weight, weight + 1e-3 * weight**2], axis=1),
        "v": np.concatenate([np.eye(32), -np.eye(32)]).astype(np.float32),
    }
    model = model_from_text(text, weights)
    recipe = {"version": 1, "steps": [{"fuse": {}}], "benchmark": {"rounds": 6}}
    warned = {}
    for target in (EXACT, COARSE):
        result = compress(model, Recipe.from_dict({**recipe, "target": target.to_dict()}))
        warned[target.precision] = [text for text in result.report["warnings"] if "answers otherwise" in text]
    assert warned["float32"] == []
    assert len(warned["bfloat16"]) == 1
    assert "before anything was done to it" in warned["bfloat16"][0]


def test_the_backends_of_the_target() -> None:
    """Its own first, whose figures decide; both precisions have labels of their own."""
    assert [backend.label for backend in backends_of(EXACT)] == ["OpenVINO float32", "CPUExecutionProvider"]
    assert backend_of(COARSE).label == "OpenVINO bfloat16"
