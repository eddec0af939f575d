"""The search for the fastest quantization that keeps the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelpress_compression import InputData, Model, Recipe, compress
from modelpress_compression.graph.heads import unvouched_heads
from modelpress_compression.inputs import EvaluationData
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.measure.latency import Speedup, Timings
from modelpress_compression.measure.task import Labelled
from modelpress_compression.model import Provenance, file_size_bytes
from modelpress_compression.passes.base import Context, PassResult
from modelpress_compression.passes.quantize.config import QuantizeConfig
from modelpress_compression.passes.quantize.quantize import prepare_static
from modelpress_compression.passes.quantize.weight_only.storage import store_rest
from modelpress_compression.recipe import Step
from modelpress_compression.search import quantization
from modelpress_compression.search.candidates import Candidate, fastest, pareto_set
from modelpress_compression.search.judge import Judge, RaceTimings
from modelpress_compression.search.kept_in_float import fewest_in_float, order_of
from modelpress_compression.search.quantization import SchemeSearch
from modelpress_compression.search.steps import StepRecord
from onnx import TensorProto, helper, numpy_helper


def candidate(name: str, size: int, time_s: float, cosine: float = 1.0, noise: float = 0.0) -> Candidate:
    """A racer of so many seconds; its rounds differ by up to `noise` of them."""
    times = time_s * (1 + noise * np.sin(np.arange(30)))
    speed = Speedup(1 / time_s, 1 / time_s, 1 / time_s)
    fidelity = Fidelity("provided", 8, {"y": OutputFidelity(cosine, 20.0, 0.1)}, None, cosine)
    record = StepRecord(Step("quantize", QuantizeConfig()), None, Path())  # type: ignore[arg-type]
    return Candidate(name, record, size, fidelity=fidelity, speedup=speed, times_s=times)


ROUGH_AND_CLOSE = (("rough", 0.5, 0.99), ("closer", 0.52, 0.996), ("little", 0.507, 0.993))


def test_the_fastest_wins_and_draws_go_to_the_smallest() -> None:
    """Who is not surely slower by 2 % draws with the fastest, and the smaller file is taken; who is, loses, however
    small; one with a reason against it does not run. Of files that are as small to within 1 % the faster one wins, or
    one that errs at most half as much and is slower by 5 % at most."""
    slow, small = candidate("a", 50, 0.9), candidate("b", 80, 0.51, noise=0.3)
    quick = candidate("c", 100, 0.5)
    assert fastest([slow, small, quick]) is small
    assert fastest([slow, replace(small, reason="no"), quick]) is quick
    assert fastest([candidate("d", 80, 0.52), quick]) is quick
    assert fastest([replace(slow, reason="no")]) is None
    as_small = candidate("e", 1005, 0.5)
    assert fastest([candidate("f", 1000, 0.505), as_small]) is as_small
    rough, closer, little = (candidate(name, 1000, *rest) for name, *rest in ROUGH_AND_CLOSE)
    assert fastest([rough, little]) is rough
    assert fastest([rough, little, closer]) is closer
    assert fastest([rough, replace(closer, drop=0.02)]) is rough
    assert fastest([rough, candidate("slower", 1000, 0.53, 1.0)]) is rough


def test_the_pareto_set_holds_what_nothing_beats() -> None:
    """A candidate is out where another is at least as small, fast and close, and better in one of them."""
    best, close = candidate("a", 50, 0.5, 0.97), candidate("b", 60, 0.6, 0.999)
    beaten = candidate("c", 60, 0.7, 0.96)
    unmeasured = replace(beaten, speedup=None)
    assert pareto_set([best, close, beaten, unmeasured]) == [True, True, False, False]


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_count_that_suffices_is_found_in_few_tries(layers: int, needed: int) -> None:
    """At most a quarter more than the fewest, in a logarithmic number of tries; None where even all do not suffice."""
    tried: list[int] = []

    def keeps(count: int) -> bool:
        tried.append(count)
        return count >= needed

    found = fewest_in_float(layers, keeps)
    if needed > layers:
        assert found is None
    else:
        assert found is not None
        assert needed <= found <= max(needed + 1, needed * 4 / 3 + 1)
    assert len(tried) <= 2 * layers.bit_length() + 2
    assert len(set(tried)) == len(tried)


@pytest.fixture
def two_layers() -> Model:
    """x [N,64,260] -> wide product -> classes; a narrow one beside it decides the class by inputs that one loud input,
    which it does not read, drowns in 8 bits."""
    rng = np.random.default_rng(3)
    wide = rng.normal(0, 0.06, (260, 1024)).astype(np.float32)
    back = rng.normal(0, 0.0003, (1024, 8)).astype(np.float32)
    wide[256:] = 0
    narrow = np.zeros((260, 8), np.float32)
    narrow[:256] = rng.normal(0, 0.2, (256, 8))
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Slice", ["x", "start", "stop", "axis"], ["quiet"], "slice"),
            node("MatMul", ["quiet", "wide"], ["h"], "wide"),
            node("Relu", ["h"], ["r"], "relu"),
            node("MatMul", ["r", "back"], ["b"], "back"),
            node("MatMul", ["x", "narrow"], ["n"], "sensitive"),
            node("Add", ["b", "n"], ["s"], "sum"),
            node("MatMul", ["s", "head"], ["y"], "head"),
        ],
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64, 260])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(array, name)
            for name, array in {
                "wide": wide[:256], "back": back, "narrow": narrow, "head": np.eye(8, dtype=np.float32),
                "start": np.asarray([0]), "stop": np.asarray([256]), "axis": np.asarray([2]),
            }.items()
        ],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    proto = onnx.shape_inference.infer_shapes(proto)
    return Model(onnx_ir.serde.deserialize_model(proto), Provenance("onnx", "0" * 64, 0))


@pytest.fixture
def loud(two_layers: Model) -> InputData:
    values = np.random.default_rng(5).normal(0, 1, (24, 64, 260)).astype(np.float32)
    values[:, :, 256:] = 400
    return InputData.from_arrays({"x": values}, two_layers.inputs)


@pytest.mark.usefixtures("timed_by_size")
def test_the_sensitive_layer_goes_back_to_float(two_layers: Model, loud: InputData) -> None:
    """Neither scheme keeps the classes as asked; with one layer in float32, the one that loses them, static does, and
    is taken."""
    step = {"quantize": {"scheme": "auto", "smooth_quant": False}}
    asked = Recipe.from_dict({"version": 1, "steps": [step], "constraints": {"max_drop": 0.003}})
    result = compress(two_layers, asked, data=loud)
    rows = {row["name"]: row for row in result.candidates}
    assert "agreement with the original" in rows["quantize static"]["reason"]
    assert rows["quantize dynamic"]["reason"]
    (chosen,) = [row for row in rows.values() if row["chosen"]]
    assert chosen["name"].startswith("quantize static, 1 layer in float32")
    assert chosen["speedup"]["low"] >= 1.0
    assert chosen["agreement"] >= 0.997
    integers = {
        node.name
        for node in result.model.nodes()
        if node.op_type == "MatMul" and node.inputs[1].producer() is not None  # type: ignore[union-attr]
    }
    assert {"wide", "back"} <= integers
    assert "sensitive" not in integers


def test_the_order_of_layers_is_counted_not_timed(two_layers: Model, loud: InputData) -> None:
    """The order is that of the error that goes over the work that comes, in multiply-accumulates and numbers moved: the
    same each time, on whatever machine."""
    context = Context(loud, Path(), alone=lambda: pytest.fail("nothing is timed"))
    quantizer = prepare_static(two_layers, QuantizeConfig(scheme="static", smooth_quant=False), context)
    assert quantizer is not None
    rows = {"wide": (64, 256, 1024), "back": (64, 1024, 8), "sensitive": (64, 260, 8), "head": (64, 8, 8)}
    worth = {}
    for node in quantizer.plan.layers:
        m, k, n = rows[node.name or ""]
        work = m * k * n + 20 * (m * k + k * n + m * n)
        worth[node.outputs[0].name] = quantizer.ranges.error_saved(node, quantizer.plan) / work
    assert len(worth) >= 3
    assert order_of(quantizer, context) == sorted(worth, key=lambda name: -worth[name])


def test_candidates_that_disagree_are_dropped(
    digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate whose outputs moved too far is named with its cosine, and the float model stays."""

    def ruined(model: Model) -> PassResult:
        work = model.clone()
        for value in work.graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == onnx_ir.DataType.FLOAT:
                value.const_value = onnx_ir.tensor(-value.const_value.numpy(), name=value.name)
        return PassResult(work, {"ruined": 1})

    monkeypatch.setattr(quantization, "Quantize", lambda config: lambda model, context: ruined(model))
    monkeypatch.setattr(quantization, "prepare_static", lambda model, config, context, **_: None)
    recipe = Recipe.from_dict({"version": 1, "steps": [{"quantize": {"scheme": "auto"}}], "benchmark": {"rounds": 5}})
    result = compress(digits, recipe, data=samples)
    assert result.report["size_ratio"] == pytest.approx(1.0, abs=0.01)
    assert not any(row["chosen"] for row in result.candidates)
    assert "cosine" in result.candidates[0]["reason"]


def test_without_data_no_layer_is_moved(digits: Model) -> None:
    """Synthetic inputs vouch for no ranges: static is measured, said to be unproven, and not searched further."""
    recipe = Recipe.from_dict({"version": 1, "steps": [{"quantize": {"scheme": "auto"}}], "benchmark": {"rounds": 5}})
    result = compress(digits, recipe)
    names = [row["name"] for row in result.candidates if "stored" not in row["name"]]
    assert names == ["quantize dynamic", "quantize static", "quantize static, memory-bound layers and sums too"]
    assert not any(row["chosen"] for row in result.candidates if "static" in row["name"])


def test_samples_that_are_all_the_same_vouch_for_nothing(digits: Model, samples: InputData) -> None:
    """Ranges of blank images would destroy every digit, though they agree with themselves: static is not taken, and the
    report says why."""
    blank = {name: np.zeros_like(array) for name, array in samples.arrays.items()}
    recipe = Recipe.from_dict({"version": 1, "steps": [{"quantize": {"scheme": "auto"}}], "benchmark": {"rounds": 5}})
    result = compress(digits, recipe, data=blank)
    assert not any(row["chosen"] for row in result.candidates if "static" in row["name"])
    assert any("all samples are the same" in text for text in result.report["warnings"])


def test_weights_left_in_float_are_stored_small(two_layers: Model, loud: InputData) -> None:
    """What keeps the answers comes with all its weights in 8 bits too, and that file is smaller."""
    excluded = {"quantize": {"scheme": "auto", "exclude": ["wide"]}}
    result = compress(two_layers, Recipe.from_dict({"version": 1, "steps": [excluded]}), data=loud)
    sizes = {row["name"]: row["size_bytes"] for row in result.candidates}
    assert not any("all weights stored in fewer bits" in name for name in sizes)  # the recipe wants that one in float32
    plain = {"quantize": {"scheme": "static", "exclude": ["wide"]}}
    step = compress(two_layers, Recipe.from_dict({"version": 1, "steps": [plain]}), data=loud)
    config = QuantizeConfig()
    stored = store_rest(PassResult(step.model, {"MatMul": 2}), config, Context(loud, Path()), 20.0)
    assert stored is not None
    assert stored.changes["stored_weights"] == 1
    assert stored.model.weight_bytes() < 0.5 * step.model.weight_bytes()
    assert store_rest(stored, config, Context(loud, Path()), 20.0) is None


@pytest.fixture
def reader(two_layers: Model) -> Model:
    """The same with a head of 300 classes behind it, a bias and a softmax."""
    rng = np.random.default_rng(9)
    work = two_layers.clone()
    (old,) = work.graph.outputs
    values = {
        name: onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array.astype(np.float32), name=name))
        for name, array in {"classes": rng.normal(0, 1, (8, 300)), "bias": rng.normal(0, 1, 300)}.items()
    }
    for value in values.values():
        work.graph.register_initializer(value)
    scores = onnx_ir.node("MatMul", [old, values["classes"]], name="head_300")
    shifted = onnx_ir.node("Add", [values["bias"], scores.outputs[0]])
    soft = onnx_ir.node("Softmax", [shifted.outputs[0]])
    for name, made in (("scores", scores), ("shifted", shifted), ("p", soft)):
        made.outputs[0].name = name
        made.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    work.graph.extend([scores, shifted, soft])
    work.graph.outputs[0] = soft.outputs[0]
    return work


def test_heads_of_more_classes_than_samples_are_found(reader: Model, two_layers: Model) -> None:
    """Behind bias and softmax; with as many samples as classes there is none; eight classes are few."""
    assert unvouched_heads(reader, 299) == {"head_300": 300}
    assert unvouched_heads(reader, 300) == {}
    assert unvouched_heads(two_layers, 24) == {}


def test_such_a_head_stays_in_float_under_dynamic(reader: Model, loud: InputData, tmp_path: Path) -> None:
    """Dynamic quantization leaves it, and says why; with labels the metric judges instead. Static, whose biases take
    back the mean error of every class, has it in 8 bits."""
    path = reader.save(tmp_path / "reader.onnx")[0]
    recipe = Recipe.from_dict({"version": 1, "steps": [{"quantize": {"scheme": "auto"}}]})
    context = Context(loud, tmp_path)
    labelled = EvaluationData(loud, np.zeros((24, 64), np.int64))
    for task, kept in ((None, True), (Labelled(labelled), False)):
        judge = quantization.Judge(path, path, context, recipe, task)
        search = quantization.SchemeSearch(
            recipe.steps[0], reader, path, context, tmp_path / str(kept) / "model.onnx", judge
        )
        search.dynamic()
        search.static()
        dynamic, static = search.candidates[:2]
        reasons = {skip.node: skip.reason for skip in dynamic.record.skipped}
        assert ("24 samples cannot vouch for the weights of its 300 classes" in reasons.values()) is kept
        assert any(node.name == "head_300" for node in dynamic.record.model.graph) is kept
        head = next(node for node in static.record.model.graph if node.name == "head_300")
        assert head.inputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]


def test_batch_sizes_count_alike(tmp_path: Path) -> None:
    """Times of a race are geometric means over batch sizes, in the rounds that all of them have; a candidate that is
    slower at one of them shows there."""
    one = Timings(1, (1, 1), np.asarray([[4.0] * 9, [1.0] * 9]))
    eight = Timings(8, (1, 1), np.asarray([[9.0] * 6, [16.0] * 6]))
    race = RaceTimings((one, eight))
    np.testing.assert_allclose(race.times_s, [[6.0] * 6, [4.0] * 6])
    assert race.speedup(1).median == pytest.approx(1.5)
    assert [speed.median for speed in race.speedups(1)] == [4.0, 9 / 16]


@pytest.mark.parametrize(("uploaded_s", "taken"), [(2.0, True), (1.0, False), (None, None)])
def test_without_a_faster_one_float32_is_stored_small(
    two_layers: Model,
    loud: InputData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uploaded_s: float | None,
    taken: bool | None,
) -> None:
    """A model that earlier steps made faster, and that 8 bits make no faster still, gets weights stored in 8 bits; not
    one that is as fast as the original, and none is tried without earlier steps."""
    before, uploaded = tmp_path / "before" / "model.onnx", tmp_path / "uploaded" / "model.onnx"
    for path in (before, uploaded):
        path.parent.mkdir()
        two_layers.save(path)

    def timed(self: Judge, paths: list[Path], rounds: int, budget_s: float) -> RaceTimings:
        times = {before: 1.0, uploaded: uploaded_s or 1.0}
        noises = np.random.default_rng(0).uniform(0.98, 1.02, (1 + len(paths), 30))
        rows = [times.get(path, 1.0) * noise for path, noise in zip((before, *paths), noises, strict=True)]
        return RaceTimings((Timings(1, (1, 1), np.asarray(rows)),))

    monkeypatch.setattr(Judge, "timed", timed)
    recipe = Recipe.from_dict({"version": 1})
    context = Context(loud, tmp_path)
    judge = Judge(uploaded if uploaded_s else before, before, context, recipe, None)
    step = Step("quantize", QuantizeConfig(scheme="auto"))
    search = SchemeSearch(step, two_layers, before, context, tmp_path / "out" / "model.onnx", judge)
    search.in_float()
    record = search.outcome()
    if taken is None:
        assert not record.candidates
        return
    (row,) = record.candidates
    assert row["name"] == "quantize weight_only, all weights stored in fewer bits, computing in float32"
    assert row["chosen"] is taken, row["reason"]
    if taken:
        assert file_size_bytes(record.path) < 0.4 * file_size_bytes(before)
    else:
        assert "the original" in row["reason"]


@pytest.mark.parametrize(
    ("cosine", "expected", "drop", "answers", "kept"),
    [
        (0.999, 0.9, 0.005, 30, True),
        (0.999, 0.9, 0.007, 30, False),
        (0.96, 0.9, 0.0, 30, True),
        (0.96, 0.9, 0.0, 29, False),
        (0.995, 0.9, 0.0, 2, True),
        (0.96, 0.05, 0.0, 30, False),
        (0.995, 0.05, 0.004, 30, True),
    ],
)
def test_the_doubt_of_the_original_decides_without_labels(
    two_layers: Model, loud: InputData, cosine: float, expected: float, drop: float, answers: int, kept: bool
) -> None:
    """So little of the expected accuracy may go that the metric falls by less than a point; where that says nothing of
    the original, or too few answers say it, cosines decide."""
    recipe = Recipe.from_dict({"version": 1})
    judge = Judge(Path(), Path(), Context(loud, Path()), recipe, None)
    outputs = {"y": OutputFidelity(cosine, 20.0, 0.1)}
    fidelity = Fidelity("provided", 8, outputs, 0.9, 0.9, expected_top1=expected, expected_drop=drop, positions=answers)
    assert (judge._disagrees(fidelity) == "") is kept


def test_an_output_that_is_missing_is_no_cosine(two_layers: Model, loud: InputData) -> None:
    """With the metric cosine, what cannot be compared counts 0, and integers the share that is equal."""
    recipe = Recipe.from_dict({"version": 1, "constraints": {"metric": "cosine"}})
    judge = Judge(Path(), Path(), Context(loud, Path()), recipe, None)
    whole = Fidelity("provided", 8, {"y": OutputFidelity(0.999, 20.0, 0.1)}, None, 0.999)
    assert judge._disagrees(whole) == ""
    assert judge._disagrees(replace(whole, comparable=False)) != ""
    integers = {**whole.outputs, "z": OutputFidelity(None, None, None, equal=0.5)}
    assert judge._disagrees(replace(whole, outputs=integers)) != ""


@pytest.mark.parametrize(("max_drop", "kept"), [(None, True), (0.008, True), (0.006, False)])
def test_the_metric_cosine_needs_no_classes(
    two_layers: Model, loud: InputData, max_drop: float | None, kept: bool
) -> None:
    """With it, classes may change as they like; without a `max_drop` a cosine of 0.99 is kept."""
    constraints = {"metric": "cosine"} | ({} if max_drop is None else {"max_drop": max_drop})
    judge = Judge(
        Path(), Path(), Context(loud, Path()), Recipe.from_dict({"version": 1, "constraints": constraints}), None
    )
    outputs = {"y": OutputFidelity(0.993, 20.0, 0.1), "z": OutputFidelity(0.999, 20.0, 0.1)}
    fidelity = Fidelity("provided", 8, outputs, 0.2, 0.2, expected_top1=0.9, expected_drop=0.8)
    assert (judge._disagrees(fidelity) == "") is kept
