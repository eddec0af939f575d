"""Metrics of tasks against the figures of well-known libraries, and by hand; labels that do not fit."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from modelpress_compression.errors import InvalidDataError
from modelpress_compression.inputs import EvaluationData
from modelpress_compression.measure.accuracy import check_labels, evaluate
from modelpress_compression.measure.metrics import meter_for
from modelpress_compression.measure.metrics.base import Batch
from modelpress_compression.measure.metrics.sequences import edit_distance
from modelpress_compression.measure.task import Labelled, compare_on_task
from modelpress_compression.specs import parse_specs
from numpy.typing import NDArray

Array = NDArray[np.generic]
Save = Callable[..., Path]
SEEDS = st.integers(0, 2**32 - 1)
NAN = np.float32(np.nan)


def measured(
    metric: str, outputs: Mapping[str, Array], labels: Array, batch: int = 1, mask: Array | None = None, **extra: int
) -> float | None:
    """The figure of a model that answers `outputs`, all of whose axes of samples are the first."""
    given_arrays = {"x": np.zeros((len(labels), 1), np.float32), "labels": labels}
    data = EvaluationData.from_arrays({**given_arrays, **extra}, parse_specs(["x:float32[n,1]"]))
    meter = None
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        mine = {name: array[part] for name, array in outputs.items()}
        if meter is None:
            meter = meter_for(mine, data, len(labels[part]), metric)[1]
        meter.add(Batch(mine, labels[part], None if mask is None else mask[part]))
    assert meter is not None
    return meter.value()


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 3]))
def test_f1_is_that_of_scikit_learn(seed: int, batch: int) -> None:
    """Macro F1 of classes and of tokens, some without a label (atol 1e-12)."""
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    scores, labels = rng.standard_normal((9, 4, 5)), rng.integers(-1, 4, (9, 4))
    labels[0, 0] = 0
    kept = labels >= 0
    wanted = sklearn.f1_score(labels[kept], scores.argmax(-1)[kept], average="macro")
    assert measured("f1", {"y": scores}, labels, batch) == pytest.approx(wanted, abs=1e-12)
    first = scores[:, 0], np.maximum(labels[:, 0], 0)
    wanted = sklearn.f1_score(first[1], first[0].argmax(-1), average="macro")
    assert measured("f1", {"y": first[0]}, first[1], batch) == pytest.approx(wanted, abs=1e-12)


def test_f1_by_hand() -> None:
    """Of three samples of class 0 and one of class 1, one of class 0 is taken for 1; NaN answers nothing."""
    scores = np.float32([[1, 0], [1, 0], [0, 1], [0, 1]])
    assert measured("f1", {"y": scores}, np.int64([0, 0, 0, 1])) == pytest.approx((0.8 + 2 / 3) / 2)
    assert measured("f1", {"y": np.full((2, 2), NAN)}, np.int64([0, 1])) == 0.0


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from([1, 3, 4]))
def test_spearman_is_that_of_scipy(seed: int, batch: int) -> None:
    """With ties; of scores, of two embeddings, and of consecutive samples, whatever the batch (atol 1e-9)."""
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 12).astype(np.float64), rng.integers(0, 4, 12).astype(np.float64)
    scores[:2], labels[:2] = (0, 1), (0, 1)
    wanted = scipy_stats.spearmanr(scores, labels).statistic
    assert measured("spearman", {"y": scores[:, None]}, labels, batch) == pytest.approx(wanted, abs=1e-9)
    left, right = rng.standard_normal((2, 12, 3))
    cosine = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    wanted = scipy_stats.spearmanr(cosine, labels).statistic
    assert measured("spearman", {"a": left, "b": right}, labels, batch) == pytest.approx(wanted, abs=1e-9)
    pairs = np.stack([left, right], axis=1).reshape(24, 3)
    assert measured("spearman", {"y": pairs}, np.repeat(labels, 2), batch) == pytest.approx(wanted, abs=1e-9)


def test_spearman_of_answers_that_are_all_alike_is_zero() -> None:
    """They know nothing of the order, and NaN knows no more."""
    assert measured("spearman", {"y": np.ones((4, 1))}, np.arange(4.0)) == 0.0
    assert measured("spearman", {"y": np.full((4, 1), NAN)}, np.arange(4.0)) == 0.0


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_retrieval_is_the_nearest_neighbour_of_scikit_learn(seed: int) -> None:
    """Everything asks and answers; with roles queries ask and documents answer."""
    neighbors = pytest.importorskip("sklearn.neighbors")
    rng = np.random.default_rng(seed)
    rows, groups = rng.standard_normal((12, 4)), np.repeat(np.arange(4), 3)
    index = neighbors.NearestNeighbors(metric="cosine").fit(rows)
    nearest = index.kneighbors(n_neighbors=1, return_distance=False)[:, 0]
    assert measured("retrieval", {"y": rows}, groups) == pytest.approx(np.mean(groups[nearest] == groups))
    roles = np.tile([0, 1, 1], 4)
    documents = np.flatnonzero(roles)
    index = neighbors.NearestNeighbors(metric="cosine").fit(rows[documents])
    nearest = documents[index.kneighbors(rows[::3], n_neighbors=1, return_distance=False)[:, 0]]
    found = measured("retrieval", {"y": rows}, np.stack([groups, roles], axis=1), batch=5)
    assert found == pytest.approx(np.mean(groups[nearest] == groups[::3]))


def test_padding_is_no_part_of_an_embedding() -> None:
    """Positions that the mask leaves out may hold anything; without a mask they spoil the mean."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((3, 1, 4)), 2, axis=0)
    hidden = np.concatenate([rows, rng.standard_normal((6, 1, 4)) * 100], axis=1)
    mask = np.tile([True, False], (6, 1))
    groups = np.repeat(np.arange(3), 2)
    assert measured("retrieval", {"y": hidden}, groups, mask=mask) == 1.0
    assert measured("retrieval", {"y": hidden}, groups) < 1.0


def test_who_is_alone_in_a_group_is_not_counted() -> None:
    """Of one pair and one stranger the pair counts; of strangers alone nothing does."""
    rows = np.eye(3, 4)[[0, 0, 2]]
    assert measured("retrieval", {"y": rows}, np.int64([5, 5, 9])) == 1.0
    assert measured("retrieval", {"y": rows}, np.int64([1, 2, 3])) is None


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_iou_is_that_of_scikit_learn(seed: int) -> None:
    """Of scores, of class indices, and of one channel; some pixels are left out (atol 1e-12)."""
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 4, (5, 3, 4))
    labels[0, 0, 0] = 0
    kept = labels >= 0
    scores = rng.standard_normal((5, 4, 3, 4))
    classes = scores.argmax(1)
    wanted = sklearn.jaccard_score(labels[kept], classes[kept], average="macro")
    assert measured("iou", {"y": scores}, labels, batch=2) == pytest.approx(wanted, abs=1e-12)
    assert measured("iou", {"y": classes}, labels) == pytest.approx(wanted, abs=1e-12)
    assert measured("iou", {"y": classes.astype(np.float32)}, labels) == pytest.approx(wanted, abs=1e-12)
    binary, logits = np.minimum(labels, 1), scores[:, :1] * 3
    wanted = sklearn.jaccard_score(binary[kept], (logits[:, 0] >= 0)[kept], average="macro")
    assert measured("iou", {"y": logits}, binary) == pytest.approx(wanted, abs=1e-12)
    assert measured("iou", {"y": 1 / (1 + np.exp(-logits))}, binary) == pytest.approx(wanted, abs=1e-12)


def test_pixels_that_are_not_finite_are_wrong() -> None:
    """Half of the picture is NaN, in scores and in one channel alike."""
    labels = np.ones((1, 2, 2), np.int64)
    scores = np.float32([[[[0, 0], [0, 0]], [[1, 1], [NAN, NAN]]]])
    assert measured("iou", {"y": scores}, labels) == 0.5
    assert measured("iou", {"y": scores[:, 1:]}, labels) == 0.5


def ctc(texts: list[str], letters: str, blank: int, rng: np.random.Generator) -> Array:
    """Scores [N, T, C] that read so: letters are repeated, and blanks stand between equal ones."""
    lines = []
    for text in texts:
        steps = [blank]
        for letter in text:
            steps += [letters.index(letter)] * int(rng.integers(1, 3)) + [blank] * int(rng.integers(1, 3))
        lines.append(steps)
    length = max(map(len, lines))
    classes = np.asarray([steps + [blank] * (length - len(steps)) for steps in lines])
    scores: Array = np.eye(len(letters))[classes] + 0.3 * rng.random((len(texts), length, len(letters)))
    return scores


LETTERS = "_ " + string.ascii_lowercase  # the blank and the space first
TEXTS = st.lists(st.text(alphabet="ab c", min_size=1, max_size=12), min_size=3, max_size=3)


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS, SEEDS)
def test_cer_and_wer_are_those_of_jiwer(read: list[str], wanted: list[str], seed: int) -> None:
    """Over a corpus, read from scores with repetitions and blanks, samples on the first axis or on the second."""
    jiwer = pytest.importorskip("jiwer")
    read, wanted = ([" ".join(text.split()) or "a" for text in texts] for texts in (read, wanted))
    scores = ctc(read, LETTERS, 0, np.random.default_rng(seed))
    longest = max(map(len, wanted))
    labels = np.asarray([[LETTERS.index(each) for each in text] + [-1] * (longest - len(text)) for text in wanted])
    assert measured("cer", {"y": scores}, labels) == pytest.approx(jiwer.cer(wanted, read))
    assert measured("wer", {"y": scores}, labels, labels_space=1) == pytest.approx(jiwer.wer(wanted, read))
    data = EvaluationData.from_arrays(
        {"x": np.zeros((3, 1), np.float32), "labels": labels}, parse_specs(["x:float32[n,1]"])
    )
    turned = {"y": np.ascontiguousarray(np.swapaxes(scores, 0, 1))}
    if turned["y"].shape[0] != 3:
        _, meter = meter_for(turned, data, 3, "cer")
        meter.add(Batch(turned, labels))
        assert meter.value() == pytest.approx(jiwer.cer(wanted, read))


@pytest.mark.parametrize(
    ("read", "wanted", "edits"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("", "", 0)]
)
def test_edit_distance(read: str, wanted: str, edits: int) -> None:
    """Known distances, empty texts among them."""
    assert edit_distance(read, wanted) == edits


def test_the_blank_is_where_no_label_is() -> None:
    """Class 0, unless labels hold it: then the last class; or what the data says."""
    assert measured("cer", {"y": np.eye(4)[[[0, 1, 1, 0, 1]]]}, np.int64([[1, 1]])) == 0.0
    assert measured("cer", {"y": np.eye(4)[[[3, 0, 0, 3, 0]]]}, np.int64([[0, 0]])) == 0.0
    assert measured("cer", {"y": np.eye(4)[[[2, 1, 1, 2, 1]]]}, np.int64([[1, 1]]), labels_blank=2) == 0.0


def boxes_of(rng: np.random.Generator, count: int) -> Array:
    corners = rng.integers(0, 40, (count, 2))
    found: Array = np.concatenate([corners, corners + rng.integers(8, 40, (count, 2))], axis=1).astype(np.float32)
    return found


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_map_is_that_of_coco(seed: int) -> None:
    """AP50:95 and AP50 as faster-coco-eval has them, in all layouts of detectors (atol 1e-9)."""
    coco = pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(seed)
    samples, truths, detections = 4, 5, 8
    labels = np.full((samples, truths, 5), -1.0, np.float32)
    boxes = np.zeros((samples, detections, 4), np.float32)
    for sample in range(samples):
        truth = boxes_of(rng, truths)
        labels[sample] = np.concatenate([truth, rng.integers(-1, 3, (truths, 1))], axis=1)
        moved = truth[rng.integers(0, truths, detections)] + rng.integers(-3, 4, (detections, 4))
        boxes[sample] = np.where(rng.random((detections, 1)) < 0.8, moved, boxes_of(rng, detections))
    labels[0, 0, 4] = 1
    scores = rng.permutation(samples * detections).reshape(samples, detections).astype(np.float32) / 64 + 0.01
    classes = rng.integers(0, 3, (samples, detections))
    wanted = coco_figures(coco, labels, boxes, scores, classes)
    separate = {"b": boxes, "s": scores, "c": classes}
    every = {"b": boxes, "s": np.where(np.arange(3) == classes[..., None], scores[..., None], -1.0)}
    rows = np.concatenate([boxes + 0.25, scores[..., None], classes[..., None]], axis=2)
    shifted = labels + np.float32([0.25, 0.25, 0.25, 0.25, 0])
    for name, figure in zip(("map", "map50"), wanted, strict=True):
        assert measured(name, separate, labels) == pytest.approx(figure, abs=1e-9)
        assert measured(name, {"r": rows}, shifted, batch=2) == pytest.approx(figure, abs=1e-9)
        turned = rows[..., [5, 4, 0, 1, 2, 3]]
        assert measured(name, {"r": turned}, shifted, batch=4) == pytest.approx(figure, abs=1e-9)
        kept = {"b": every["b"], "s": np.where(every["s"] < 0, NAN, every["s"]).astype(np.float32)}
        assert measured(name, kept, labels) == pytest.approx(figure, abs=1e-9)


def coco_figures(coco: object, labels: Array, boxes: Array, scores: Array, classes: Array) -> tuple[float, float]:
    def listed(corners: Array) -> list[float]:
        x1, y1, x2, y2 = (float(each) for each in corners)
        return [x1, y1, x2 - x1, y2 - y1]

    truth = [
        {"image_id": sample, "category_id": int(row[4]), "bbox": listed(row[:4])}
        for sample, rows in enumerate(labels, start=1)
        for row in rows
        if row[4] >= 0
    ]
    annotations = [
        {**each, "id": number, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0}
        for number, each in enumerate(truth, start=1)
    ]
    dataset = {
        "images": [{"id": sample + 1} for sample in range(len(labels))],
        "annotations": annotations,
        "categories": [{"id": each, "name": str(each)} for each in range(3)],
    }
    found = [
        {
            "image_id": i + 1,
            "category_id": int(classes[i, j]),
            "bbox": listed(boxes[i, j]),
            "score": float(scores[i, j]),
        }
        for i in range(len(boxes))
        for j in range(boxes.shape[1])
    ]
    known = coco.COCO(dataset)
    evaluation = coco.COCOeval_faster(known, known.loadRes(found), "bbox", print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def test_map_by_hand() -> None:
    """One of two boxes is found, overlapping by 2/3: right up to the threshold of 0.65, half of the recall."""
    labels = np.float32([[[0, 0, 10, 10, 1], [50, 50, 60, 60, 1], [0, 0, 0, 0, -1]]])
    outputs = {"boxes": np.float32([[[0, 0, 15, 10]]]), "scores": np.float32([[0.9]]), "labels": np.int64([[1]])}
    assert measured("map50", outputs, labels) == pytest.approx(51 / 101)
    assert measured("map", outputs, labels) == pytest.approx(0.4 * 51 / 101)
    broken = {**outputs, "boxes": np.full((1, 1, 4), NAN)}
    assert measured("map", broken, labels) == 0.0


PICTURE = {"y": np.zeros((1, 3, 2, 2), np.float32)}
DETECTOR = {"b": np.zeros((1, 7, 4), np.float32), "s": np.zeros((1, 7), np.float32), "c": np.zeros((1, 7), np.int64)}


@pytest.mark.parametrize(
    ("metric", "outputs", "labels", "says"),
    [
        ("f1", PICTURE, np.zeros(1, np.int64), "fit no output for f1"),
        ("iou", PICTURE, np.zeros((1, 4, 4), np.int64), r"\[1, 3, 2, 2\].*resize the labels"),
        ("iou", PICTURE, np.zeros((1, 2, 2)), "Give class indices"),
        ("iou", PICTURE, np.full((1, 2, 2), 3), "3 classes are 0 to 2"),
        ("spearman", {"y": np.zeros((1, 3))}, np.arange(6.0), "samples 0 and 1, 2 and 3"),
        ("spearman", {"y": np.zeros((1, 3))}, np.zeros((6, 2)), "one finite number"),
        ("retrieval", {"y": np.zeros((1, 3))}, np.arange(6.0), "whole numbers"),
        ("retrieval", {"y": np.zeros((1, 3))}, np.zeros(60_000, np.int64), "Give fewer samples"),
        ("cer", {"y": np.zeros((1, 9, 4))}, np.full((2, 3), 4), "4 classes are 0 to 3"),
        ("cer", {"y": np.zeros((1, 9, 4))}, np.zeros(2, np.int64), "filled up with -1"),
        ("cer", {"y": np.zeros((1, 20_000, 2))}, np.zeros((2, 1), np.int64), "Give shorter pieces"),
        ("wer", {"y": np.zeros((1, 9, 4))}, np.ones((2, 3), np.int64), "labels_space"),
        ("map", DETECTOR, np.zeros((1, 2, 4)), r"boxes \[N, M, 5\]"),
        ("map", DETECTOR, np.float32([[[9, 9, 4, 4, 0]]]), "not width and height"),
        ("map", PICTURE, np.zeros((1, 2, 5)), "fit no output for map"),
        ("map", DETECTOR, np.zeros((1, 20_000, 5), np.float32), "Leave out rows"),
    ],
)
def test_labels_that_do_not_fit_say_what_would(
    metric: str, outputs: dict[str, Array], labels: Array, says: str
) -> None:
    """Before anything is measured, with the shapes and what to give instead."""
    with pytest.raises(InvalidDataError, match=says):
        measured(metric, outputs, labels)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"labels_blank": np.int64(9)}, "'labels_blank' is 9, but the classes are 0 to 3"),
        ({"labels_blank": np.int64(1)}, "labels hold 1"),
        ({"labels_blank": np.float32(1)}, "one whole number"),
        ({"labels_blank": np.arange(3)}, "one whole number"),
    ],
)
def test_settings_that_do_not_fit(extra: dict[str, Array], says: str) -> None:
    """The blank is one class of the output that no label holds."""
    with pytest.raises(InvalidDataError, match=says):
        measured("cer", {"y": np.zeros((1, 9, 4))}, np.ones((2, 3), np.int64), **extra)


def test_other_settings_are_other_data() -> None:
    """What was found out about one is not remembered for the other."""
    arrays = {"x": np.zeros((2, 1), np.float32), "labels": np.ones((2, 3), np.int64)}
    specs = parse_specs(["x:float32[n,1]"])
    digests = {
        EvaluationData.from_arrays({**arrays, **extra}, specs).digest
        for extra in ({}, {"labels_blank": np.int64(2)}, {"labels_blank": np.int64(3)})
    }
    assert len(digests) == 3


READER = "g (float[batch,5,4] x) => (float[batch,5,4] y) { y = Identity(x) }"
BLIND = "g (float[batch,5,4] x) => (float[batch,5,4] y) { y = Neg(x) }"


def test_more_errors_are_a_drop(save_model: Save) -> None:
    """cer of two models in onnxruntime: lower is better, and the words say so."""
    texts = np.int64([[0, 1, 1, 0, 2], [3, 0, 0, 1, 1]])
    data = EvaluationData.from_arrays(
        {"x": np.eye(4, dtype=np.float32)[texts], "labels": np.int64([[1, 2], [3, 1]])},
        parse_specs(["x:float32[batch,5,4]"]),
    )
    good, bad = save_model(READER), save_model(BLIND, name="blind")
    assert check_labels(good, data, "cer") == ""
    assert evaluate(good, data, "cer").value == 0.0
    found = compare_on_task(Labelled(data, "cer"), good, bad)
    assert found is not None
    assert found.drop > 0
    assert found.lower_is_better
    assert found.loss == f"cer rises by {found.drop:.4f}"
    with pytest.raises(InvalidDataError, match="wer needs an array 'labels_space'"):
        check_labels(good, data, "wer")
