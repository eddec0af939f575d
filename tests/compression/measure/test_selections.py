"""Outputs that are a selection: what is told and obeyed, and that models are judged by what they find in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from modelpress_compression import Model, Recipe, compress, load
from modelpress_compression.graph.selections import Selections, asked_alike, obeying, selections_of
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.measure.damage import damage_of
from modelpress_compression.measure.fidelity import KnownOutputs, compare_outputs
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.prune.channel.bearable import Answers
from modelpress_compression.passes.quantize.ranges.output_error import output_distances
from modelpress_compression.runtime import open_session, run, session_of

SaveModel = Callable[..., Path]
Samples = Callable[..., InputData]
Weights = dict[str, Array]

# A grid of 16 x 16 places with a score and a box each, of which NonMaxSuppression leaves the best.
DETECTOR = """g (float[1,1,64,64] x) => (float[found,4] boxes, float[found] scores) {
  a = Conv<kernel_shape=[7,7], strides=[4,4], pads=[3,3,3,3]>(x, filters)
  b = Relu(a)
  c = Conv<kernel_shape=[1,1]>(b, mix, mix_bias)
  d = Relu(c)
  e = Conv<kernel_shape=[1,1]>(d, head, head_bias)
  flat = Reshape(e, flat_shape)
  logits, deltas = Split<axis=1>(flat, parts)
  all_scores = Sigmoid(logits)
  turned = Transpose<perm=[0,2,1]>(deltas)
  all_boxes = Add(turned, anchors)
  chosen = NonMaxSuppression(all_boxes, all_scores, most, overlap, least)
  column = Gather<axis=1>(chosen, two)
  index = Reshape(column, minus_one)
  first_boxes = Squeeze(all_boxes, zero)
  boxes = Gather<axis=0>(first_boxes, index)
  score_row = Reshape(all_scores, minus_one)
  scores = Gather<axis=0>(score_row, index)
}"""
# The best three of ten rows, and the values that they have.
BEST_ROWS = """g (float[batch,10,4] x) => (float[batch,3,4] rows) {
  scores = MatMul(x, w)
  line = Squeeze(scores, last)
  best, index = TopK<axis=1>(line, three)
  wide = Unsqueeze(index, last)
  all = Expand(wide, four)
  rows = GatherElements<axis=1>(x, all)
}"""
# Two of four experts for a row, which sums up what they say with their shares.
EXPERTS = """g (float[batch,4] x) => (float[batch,4] y) {
  router = MatMul(x, w)
  best, index = TopK<axis=1>(router, two)
  shares = Softmax<axis=1>(best)
  experts = Gather<axis=0>(tables, index)
  row = Unsqueeze(x, middle)
  turned = Unsqueeze(row, middle)
  said = MatMul(turned, experts)
  flat = Squeeze(said, middle_of_four)
  weights = Unsqueeze(shares, last)
  parts = Mul(flat, weights)
  y = ReduceSum<keepdims=0>(parts, middle)
}"""


def detector(error: float = 0.0, seed: int = 0) -> Weights:
    """Filters that answer to bright spots; `error`: of the weights, in their standard deviations."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-3:4, -3:4]
    spots = [np.exp(-(x**2 + y**2) / (2 * (1 + 0.1 * width) ** 2)) for width in range(16)]
    filters = np.stack([spot / spot.sum() - 1 / 49 for spot in spots])[:, None]
    head = np.concatenate([1.2 + 0.2 * rng.standard_normal((1, 16)), 0.1 * rng.standard_normal((4, 16))])
    places = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(-1, 2) * 4.0
    layers = {
        "filters": filters + 0.01 * rng.standard_normal(filters.shape),
        "mix": np.abs(rng.standard_normal((16, 16, 1, 1))) / 4,
        "head": head[..., None, None],
    }
    noise = np.random.default_rng(seed)
    layers = {name: array + error * array.std() * noise.standard_normal(array.shape) for name, array in layers.items()}
    return {
        **{name: array.astype(np.float32) for name, array in layers.items()},
        "mix_bias": np.full(16, -0.05, np.float32),
        "head_bias": np.array([-4, 0, 0, 0, 0], np.float32),
        "flat_shape": np.array([0, 5, -1]),
        "parts": np.array([1, 4]),
        "anchors": np.concatenate([places - 4, places + 4], 1).astype(np.float32)[None],
        "most": np.array([50]),
        "overlap": np.array([0.3], np.float32),
        "least": np.array([0.3], np.float32),
        "two": np.array([2]),
        "minus_one": np.array([-1]),
        "zero": np.array([0]),
    }


@pytest.fixture
def pictures(samples: Samples) -> InputData:
    """Forty-eight pictures of none to five spots each."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[0:64, 0:64]
    found = []
    for _ in range(48):
        picture = 0.02 * rng.standard_normal((64, 64))
        for _ in range(rng.integers(0, 6)):
            at_y, at_x, height, width = rng.uniform((4, 4, 0.5, 1.5), (60, 60, 3, 3))
            picture += height * np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / (2 * width**2))
        found.append(picture)
    return samples("x:float32[1,1,64,64]", np.asarray(found, np.float32)[:, None])


@pytest.fixture
def rows(samples: Samples) -> InputData:
    """Twenty tables of ten rows of four numbers."""
    numbers = np.random.default_rng(0).standard_normal((20, 10, 4)).astype(np.float32)
    return samples("x:float32[batch,10,4]", numbers)


def numbers_of_rows(paths: list[Path], data: InputData) -> Iterator[list[int]]:
    """How many boxes each model finds, picture by picture."""
    sessions = [open_session(path) for path in paths]
    for feed in data.feeds(1):
        yield [len(run(session, feed)["boxes"]) for session in sessions]


def best_rows(scale: float = 1.0) -> Weights:
    """Three columns decide; the `scale` of the first is what models differ in."""
    return {
        "w": np.array([[scale], [1], [1], [0]], np.float32),
        "last": np.array([2]),
        "three": np.array([3]),
        "four": np.array([1, 3, 4]),
    }


def experts(error: float = 0.0) -> Weights:
    """Tables of four experts, which are told apart by rows of four numbers."""
    rng, noise = np.random.default_rng(0), np.random.default_rng(1)
    router = rng.standard_normal((4, 4))
    return {
        "w": (router + error * noise.standard_normal((4, 4))).astype(np.float32),
        "tables": rng.standard_normal((4, 4, 4)).astype(np.float32),
        "two": np.array([2]),
        "middle": np.array([1]),
        "middle_of_four": np.array([2]),
        "last": np.array([2]),
    }


def test_a_box_more_or_less_is_no_damage(save_model: SaveModel, pictures: InputData) -> None:
    """With weights off by a hundredth the detector finds other numbers of boxes in some pictures, and almost the same
    in all of them: every output, and the scores of all places, keep a cosine of .99."""
    before, after = save_model(DETECTOR, detector()), save_model(DETECTOR, detector(0.01, seed=3), "after")
    assert any(one != other for one, other in numbers_of_rows([before, after], pictures))
    found = compare_outputs(before, after, pictures)
    assert set(found.outputs) == {"boxes", "scores", "all_scores"}
    assert found.cosine > 0.99
    assert found.agreement > 0.99
    assert damage_of(found, None) == ""
    assert "selecting what the original selects" in found.notes[-1]


def test_boxes_that_are_not_there_are_damage(save_model: SaveModel, pictures: InputData) -> None:
    """A detector that sees boxes everywhere, and one that sees none, differ in the scores of all places."""
    before = save_model(DETECTOR, detector())
    for bias in (2.0, -12.0):
        weights = {**detector(), "head_bias": np.array([bias, 0, 0, 0, 0], np.float32)}
        found = compare_outputs(before, save_model(DETECTOR, weights, "after"), pictures)
        assert damage_of(found, None) != "", bias


def test_boxes_in_other_places_are_damage(save_model: SaveModel, pictures: InputData) -> None:
    """The same scores with boxes that are gone elsewhere: the boxes of the original's places are compared."""
    weights = detector()
    moved = {**weights, "anchors": weights["anchors"][:, ::-1].copy()}
    found = compare_outputs(save_model(DETECTOR, weights), save_model(DETECTOR, moved, "after"), pictures)
    assert found.outputs["all_scores"].cosine == pytest.approx(1.0)
    assert found.outputs["boxes"].cosine is not None
    assert found.outputs["boxes"].cosine < 0.9
    assert damage_of(found, None) != ""


def test_known_outputs_hold_what_was_told(save_model: SaveModel, pictures: InputData) -> None:
    """The second comparison takes the original's outputs and selections from where the first has put them; one whose
    model selects in no such place is compared by its outputs alone."""
    before, after = save_model(DETECTOR, detector()), save_model(DETECTOR, detector(0.01), "after")
    known = KnownOutputs()
    first = compare_outputs(before, after, pictures, known=known)
    assert len(known) == 48
    assert compare_outputs(before, after, pictures, known=known) == first
    renamed = save_model(DETECTOR.replace("chosen", "picked"), detector(), "renamed")
    found = compare_outputs(before, renamed, pictures, known=known)
    assert set(found.outputs) == {"boxes", "scores"}
    assert found.cosine == pytest.approx(1.0)
    assert found.notes == ()


def test_rows_of_top_k(save_model: SaveModel, rows: InputData) -> None:
    """The best rows in their order: where two scores nearly tie, models differ in it, and not in what they find."""
    before, after = save_model(BEST_ROWS, best_rows()), save_model(BEST_ROWS, best_rows(1.2), "after")
    sessions = [open_session(path) for path in (before, after)]
    given = [[run(session, feed)["rows"] for session in sessions] for feed in rows.feeds(1)]
    assert any(not np.allclose(one, other) for one, other in given)
    found = compare_outputs(before, after, rows)
    assert found.outputs["rows"].cosine == pytest.approx(1.0)
    assert 0.98 < found.cosine < 1.0  # of the scores, which the weights change


def test_experts_are_no_selection(save_model: SaveModel, samples: Samples) -> None:
    """A router's order plays no part, and a model that asks other experts answers otherwise: that stays an error."""
    data = samples("x:float32[batch,4]", np.random.default_rng(2).standard_normal((50, 4)).astype(np.float32))
    before = save_model(EXPERTS, experts())
    assert selections_of(load(before), data.feeds(1)) is None
    found = compare_outputs(before, save_model(EXPERTS, experts(0.5), "after"), data)
    assert set(found.outputs) == {"y"}
    assert found.cosine < 0.99


def test_sorting_numbers_of_classes_is_no_selection(save_model: SaveModel, samples: Samples) -> None:
    """TopK of integers sorts what something else has decided."""
    text = """g (int64[batch,8] x) => (int64[batch,8] y) { y, index = TopK<axis=1>(x, eight) }"""
    path = save_model(text, {"eight": np.array([8])})
    data = samples("x:int64[batch,8]", np.random.default_rng(0).integers(0, 9, (10, 8)))
    assert selections_of(load(path), data.feeds(1)) is None


def test_boxes_above_a_threshold(save_model: SaveModel, samples: Samples) -> None:
    """Without NonMaxSuppression: NonZero finds the rows, and what is compared with the threshold is compared."""
    text = """g (float[1,10] x) => (float[found] y) {
      scores = Mul(x, k)
      above = Greater(scores, threshold)
      index = NonZero(above)
      places = Transpose<perm=[1,0]>(index)
      y = GatherND(scores, places)
    }"""
    weights = {"k": np.float32(1), "threshold": np.float32(0.5)}
    data = samples("x:float32[1,10]", np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32))
    before, after = save_model(text, weights), save_model(text, {**weights, "k": np.float32(1.05)}, "after")
    found = compare_outputs(before, after, data)
    assert set(found.outputs) == {"y", "scores"}
    assert found.cosine == pytest.approx(1.0)
    assert found.sqnr_db == pytest.approx(26.02, abs=0.01)  # of an error of a twentieth


def test_one_selection_behind_another(save_model: SaveModel, samples: Samples) -> None:
    """What is above a threshold, and of that the best two, written with the same NonZero twice: all scores are compared
    once, and a model whose duplicate was merged obeys as well."""
    twice = """g (float[1,20] x) => (float[2] y, int64[2] which) {
      scores = Mul(x, k)
      above = Greater(scores, threshold)
      index = NonZero(above)
      again = NonZero(above)
      places = Transpose<perm=[1,0]>(index)
      others = Transpose<perm=[1,0]>(again)
      left = GatherND(scores, places)
      y, best = TopK(left, two)
      column = Slice(others, one, two, one)
      numbers = Squeeze(column, one)
      which = Gather(numbers, best)
    }"""
    once = twice.replace("      again = NonZero(above)\n", "").replace("(again)", "(index)")
    weights = {"k": np.float32(1), "threshold": np.float32(-0.5), "two": np.array([2]), "one": np.array([1])}
    data = samples("x:float32[1,20]", np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32))
    after = {**weights, "k": np.float32(1.1), "threshold": np.float32(-0.6)}
    found = compare_outputs(save_model(twice, weights), save_model(once, after, "after"), data)
    assert set(found.outputs) == {"y", "which", "scores"}
    assert found.outputs["which"].equal == 1.0
    assert found.sqnr_db == pytest.approx(20.0, abs=0.01)


def loop_around_suppression(folder: Path, scale: float, name: str) -> Path:
    """Sample by sample, as exporters write a batch of pictures: boxes [N, 6, 4] and scores [N, 1, 6] to rows [N, 2, 3].

    `scale`: of the scores.
    """
    body = onnx.parser.parse_graph(
        """body (int64 step, bool go_on) => (bool goes_on, int64[2,3] row) {
          goes_on = Identity(go_on)
          here = Unsqueeze(step, zero)
          some_boxes = Gather<axis=0>(boxes, here)
          some_scores = Gather<axis=0>(scores, here)
          row = NonMaxSuppression(some_boxes, some_scores, most)
        }"""
    )
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2,6,5] x) => (float[2,2,3] y) {
          boxes, last = Split<axis=2>(x, parts)
          turned = Transpose<perm=[0,2,1]>(last)
          scores = Mul(turned, scale)
          y = Cast<to=1>(found)
        }"""
    )
    loop = onnx.helper.make_node("Loop", ["steps", "go"], ["found"], body=body)
    proto.graph.node.insert(3, loop)
    weights = {
        "parts": np.array([4, 1]), "scale": np.float32(scale), "steps": np.array(2), "go": np.array(True),
        "zero": np.array([0]), "most": np.array([2]),
    }  # fmt: skip
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(one), key) for key, one in weights.items())
    onnx.save(proto, folder / f"{name}.onnx")
    return folder / f"{name}.onnx"


def test_suppression_in_a_loop(tmp_path: Path, samples: Samples) -> None:
    """What a loop selects is taken as it is; the boxes and scores that it is given are compared."""
    numbers = np.abs(np.random.default_rng(0).standard_normal((8, 6, 5))).astype(np.float32)
    numbers[..., 2:4] += numbers[..., :2]
    data = samples("x:float32[2,6,5]", numbers)
    before = loop_around_suppression(tmp_path, 1.0, "before")
    found = compare_outputs(before, loop_around_suppression(tmp_path, 1.1, "after"), data)
    assert set(found.outputs) == {"y", "boxes", "scores"}
    assert found.outputs["scores"].sqnr_db == pytest.approx(20.0, abs=0.01)
    assert found.outputs["y"].cosine == pytest.approx(1.0)


def test_obeying(save_model: SaveModel, pictures: InputData) -> None:
    """The model that obeys gives the original's rows in the original's order; fed with other rows, it gives these."""
    original, changed = load(save_model(DETECTOR, detector())), load(save_model(DETECTOR, detector(0.05), "after"))
    feeds = list(pictures.feeds(1))
    found = selections_of(original, feeds)
    assert isinstance(found, Selections)
    alike = asked_alike(original, changed, found)
    with session_of(alike.first) as first, session_of(alike.second) as second, session_of(changed) as plain:
        for feed in feeds:
            before = run(first, feed)
            after = run(second, {**feed, **alike.given(before)})
            assert after["boxes"].shape == before["boxes"].shape
            own: Feeds = {**feed, "modelpress.chosen.chosen": _chosen(changed, feed)}
            np.testing.assert_array_equal(run(second, own)["boxes"], run(plain, feed)["boxes"])
    assert obeying(load(save_model(BEST_ROWS, best_rows(), "rows")), found) is None


def _chosen(model: Model, feed: Feeds) -> Array:
    with session_of(asked_alike(model, model, selections_of(model, [feed])).first) as session:
        return run(session, feed)["modelpress.chosen.chosen"]


def test_distances_and_what_pruning_bears(save_model: SaveModel, pictures: InputData, tmp_path: Path) -> None:
    """What quantization and pruning measure errors by: finite, and small, where numbers of rows differ."""
    original, changed = (load(save_model(DETECTOR, detector(error), f"{error}")) for error in (0.0, 0.03))
    context = Context(pictures, tmp_path)
    known = KnownOutputs()
    distances = [output_distances(original, changed, context, known).error for _ in range(2)]
    assert distances[0] == pytest.approx(distances[1])
    assert 0 < distances[0] < 0.01
    assert Answers(original, context).kept(changed) > 0.99


def test_quantization_of_a_detector(save_model: SaveModel, pictures: InputData) -> None:
    """Through the search: no candidate is refused for rows that come and go, and 8 bits keep the answers."""
    recipe = Recipe.from_dict({"version": 1, "steps": [{"quantize": {"scheme": "auto"}}], "benchmark": {"rounds": 5}})
    report = compress(load(save_model(DETECTOR, detector())), recipe, data=pictures).report
    static = [one for one in report["candidates"] if one["name"].startswith("quantize static")]
    assert static
    assert all(one["cosine"] > 0.99 for one in static if one["cosine"] is not None)
    assert not [one["name"] for one in static if "differ too much" in one["reason"]]
    assert set(report["fidelity"]["outputs"]) == {"boxes", "scores", "all_scores"}
    assert report["fidelity"]["agreement"] > 0.99
