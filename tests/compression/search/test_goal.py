"""What a goal makes of a model: a win without data, limits held or named, and no damage without a word."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from modelpress_compression import InputData, Model, Recipe, compress
from modelpress_compression.inputs import EvaluationData
from modelpress_compression.measure.damage import DAMAGE_DROP
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.measure.latency import Timings
from modelpress_compression.measure.task import Labelled
from modelpress_compression.passes.quantize.weight_only.mixed_bits import EIGHT, FLOAT, Form, MixedBits
from modelpress_compression.recipe import OBJECTIVES
from modelpress_compression.report.build import report_schema
from modelpress_compression.search import judge, quantization, search_time
from modelpress_compression.search.judge import SCREENING_SAMPLES
from modelpress_compression.search.levers import Cut, LeverSearch
from onnx import helper


@pytest.fixture
def many_samples(samples: InputData) -> InputData:
    """More than few of them."""
    arrays = {name: np.concatenate([array] * 20)[:100] for name, array in samples.arrays.items()}
    return InputData(samples.specs, arrays)


def goal(**options: Any) -> Recipe:
    """A recipe with nothing but a goal; few rounds, since nothing here asserts on time."""
    return Recipe.from_dict({"version": 1, "goal": options, "benchmark": {"rounds": 5}})


@pytest.mark.usefixtures("timed_by_size")
def test_without_data_weights_are_stored_in_8_bits(digits: Model) -> None:
    """The file alone: over three times smaller, every answer kept, said in the verdict and in valid JSON."""
    result = compress(digits, goal())
    report = result.report
    jsonschema.validate(report, report_schema())
    assert report["size_ratio"] > 3
    assert report["fidelity"]["top1_agreement"] == 1.0
    assert report["verdict"].startswith("Goal balanced: ")
    (taken,) = [row for row in report["candidates"] if row["chosen"]]
    assert "stored" in taken["name"]
    assert all(row["chosen"] or row["reason"] for row in report["candidates"])


@pytest.mark.usefixtures("timed_by_size")
def test_ranges_of_made_up_inputs_are_not_taken_but_advised(digits: Model) -> None:
    """Static quantization waits for data; what it would bring, measured, becomes a command to copy."""
    report = compress(digits, goal()).report
    static = [row for row in report["candidates"] if row["name"].startswith("quantize static")]
    assert static
    assert not any(row["chosen"] for row in static)
    assert all("vouch" in row["reason"] for row in static)


@pytest.mark.usefixtures("timed_by_size")
def test_a_balance_prunes_only_where_labels_judge(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """With data alone nothing is pruned; with labels it is tried, and taken where the metric holds."""
    names = [row["name"] for row in compress(digits, goal(), data=samples).report["candidates"]]
    assert not any("prune" in name for name in names)
    report = compress(digits, goal(max_drop=0.02), data=samples, eval_data=labelled).report
    assert any("prune" in row["name"] for row in report["candidates"])
    assert report["accuracy"]["drop"] <= 0.02
    assert report["size_ratio"] > 3


@pytest.mark.parametrize(("time_s", "fewest"), [(1e-5, 120), (1e-2, 20)])
def test_small_models_are_left_after_more_rounds(
    digits: Model, monkeypatch: pytest.MonkeyPatch, time_s: float, fewest: int
) -> None:
    """All candidates run in 20 rounds, and in 100 more where these say little: those of ten microseconds."""
    asked: Counter[int] = Counter()

    def timed(models: Sequence[Path], data: InputData, *, batch_size: int, rounds: int, **_: Any) -> Timings:
        asked[len(models)] += rounds
        return Timings(batch_size, (1,) * len(models), np.full((len(models), rounds), time_s))

    monkeypatch.setattr(judge, "time_interleaved", timed)
    compress(digits, goal())
    assert asked[max(asked)] == fewest


@pytest.mark.usefixtures("timed_by_size")
def test_accurate_stores_weights_so_that_nobody_could_tell(digits: Model) -> None:
    """Half the size at least, and an error under -40 dB."""
    report = compress(digits, goal(objective="accurate")).report
    assert report["size_ratio"] > 1.9
    assert min(output["sqnr_db"] for output in report["fidelity"]["outputs"].values()) > 40


@pytest.mark.usefixtures("timed_by_size")
def test_what_is_taken_is_judged_on_all_samples(
    digits: Model, many_samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few samples that see nothing wrong let candidates into the race; all of them must agree with what wins it.

    Here all samples find every candidate wrong but the fused one: so that is what comes back.
    """
    asked: list[tuple[str, int]] = []

    def blind(original: Path, optimized: Path, data: InputData, **options: Any) -> Fidelity:
        asked.append((optimized.parent.name, len(data)))
        good = len(data) <= SCREENING_SAMPLES or "fuse" in str(optimized)
        output = OutputFidelity(1.0 if good else 0.5, 60.0 if good else 0.0, 0.0)
        return Fidelity("provided", len(data), {"logits": output}, 1.0, 1.0)

    monkeypatch.setattr(judge, "compare_outputs", blind)
    report = compress(digits, goal(), data=many_samples).report
    assert report["size_ratio"] < 1.2
    refused = [row for row in report["candidates"] if "cosine 0.5000" in row["reason"]]
    assert refused
    assert len({count for _, count in asked}) == 2


@pytest.mark.usefixtures("timed_by_size")
@pytest.mark.parametrize("few_see_it", [True, False])
def test_what_is_stored_too_roughly_is_stored_closer(
    few_see_it: bool, digits: Model, many_samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest model with dynamic ranges is refused for the weights that it stores beside its integers, at once or
    when all samples are looked at: with those stored more closely it is taken."""
    refused: list[Path] = []

    def strict(original: Path, optimized: Path, data: InputData, **options: Any) -> Fidelity:
        stored = b"DynamicQuantizeLinear" in (content := optimized.read_bytes()) and len(content) < 30_000
        if stored and not refused:
            refused.append(optimized)
        good = stored and (optimized not in refused or (len(data) <= SCREENING_SAMPLES and not few_see_it))
        good = good or (b"DynamicQuantizeLinear" in content and not stored)
        output = OutputFidelity(1.0 if good else 0.5, 60.0 if good else 0.0, 0.0)
        return Fidelity("provided", len(data), {"logits": output}, 1.0, 1.0)

    monkeypatch.setattr(judge, "compare_outputs", strict)
    monkeypatch.setattr(quantization, "_CLOSER_DB", 5.0)
    rows = {row["name"]: row for row in compress(digits, goal(), data=many_samples).report["candidates"]}
    stored = rows["quantize dynamic, all weights stored in fewer bits"]
    (closer,) = [row for name, row in rows.items() if name.startswith(f"{stored['name']}, for ")]
    assert "cosine 0.5000" in stored["reason"]
    assert closer["chosen"]
    assert stored["size_bytes"] < closer["size_bytes"] < rows["quantize dynamic"]["size_bytes"]


@pytest.mark.usefixtures("timed_by_size")
@pytest.mark.parametrize("shared", [3e2, 3e5])
def test_damage_is_never_taken(channel_model, shared: float) -> None:  # type: ignore[no-untyped-def]
    """Scores far above what tells the classes apart keep 40 dB in 8 bits, and other classes: what the job would be
    called damaged for is stored closer, as far as 16 bits help, or not at all."""
    rng = np.random.default_rng(2)
    weight = (shared * rng.standard_normal((64, 1)) + rng.standard_normal((64, 96))).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "head")]
    report = compress(channel_model(nodes, {"w": weight}, ["n", 64], ["n", 96]), goal()).report
    assert report["constraints"]["met"]
    assert report["fidelity"]["expected_drop"] <= DAMAGE_DROP
    refused = [row["name"] for row in report["candidates"] if "no longer resemble" in row["reason"]]
    assert "quantize weight_only, weights stored in fewer bits, computing in float32" in refused
    assert report["size_ratio"] > (1.8 if shared < 1e3 else 0.99)


@pytest.mark.usefixtures("timed_by_size")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_objective_makes_the_file_larger(digits: Model, objective: str) -> None:
    """And each says in its verdict what it was."""
    report = compress(digits, goal(objective=objective)).report
    assert report["size_ratio"] >= 1 or objective == "fastest"
    assert report["verdict"].startswith(f"Goal {objective}: ")
    assert report["goal"]["objective"] == objective


@pytest.mark.usefixtures("timed_by_size")
def test_a_limit_that_cannot_be_held_is_named(digits: Model) -> None:
    """100 times smaller: the smallest comes back, and the report says what was asked."""
    report = compress(digits, goal(min_ratio=100)).report
    assert not report["constraints"]["met"]
    assert any("min_ratio 100" in violation for violation in report["constraints"]["violations"])
    assert "not met" in report["verdict"]
    assert report["size_ratio"] > 3


def test_limits_of_a_goal_beside_steps_are_checked(digits: Model) -> None:
    """The steps run as written; the goal's limits are constraints then."""
    document = {"version": 1, "steps": [{"fuse": {}}], "goal": {"max_size_bytes": 1000}, "benchmark": {"rounds": 5}}
    report = compress(digits, Recipe.from_dict(document)).report
    assert [step["name"] for step in report["steps"]] == ["fuse"]
    assert any("max_size_bytes" in violation for violation in report["constraints"]["violations"])


@pytest.mark.usefixtures("timed_by_size")
def test_damage_is_a_broken_constraint_unless_allowed(digits: Model) -> None:
    """Nine in ten weights gone and no data: another model; `allow_damage` takes it."""
    document: dict[str, Any] = {"version": 1, "steps": [{"prune": {"sparsity": 0.97}}], "benchmark": {"rounds": 5}}
    report = compress(digits, Recipe.from_dict(document)).report
    assert any("resembles" in violation for violation in report["constraints"]["violations"])
    allowed = compress(digits, Recipe.from_dict(document | {"constraints": {"allow_damage": True}})).report
    assert allowed["constraints"]["met"]


@pytest.mark.usefixtures("timed_by_size")
def test_progress_says_what_is_tried_and_what_was_taken(digits: Model) -> None:
    """Each candidate by its number, with the smallest so far; how many there are only once that is known."""
    told: list[str] = []
    report = compress(digits, goal(), on_progress=lambda *event: told.append(event[4])).report
    (chosen,) = [number for number, row in enumerate(report["candidates"], start=1) if row["chosen"]]
    (taken,) = [text for text in told if text.endswith("taken")]
    count = len(report["candidates"])
    assert re.fullmatch(rf"candidate {chosen} of {count}: \d\d % smaller, \d\.\d\dx; taken", taken)
    built = [text for text in told if text.startswith("candidate ") and text != taken]
    numbers = [int(text.split()[1].rstrip(":")) for text in built]
    assert numbers == sorted(numbers)
    assert 1 < max(numbers) <= count
    assert any(re.search(r"; so far \d\d % smaller$", text) for text in built)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("timed_by_size")
def test_all_levers_together(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """`smallest` with labels: channels go, what lost too much is trained, and bits are chosen weight by weight; the
    result beats quantization alone, and keeps the metric."""
    alone = compress(
        digits,
        goal(objective="smallest", max_drop=0.02, techniques=["fuse", "quantize"]),
        data=samples,
        eval_data=labelled,
    )
    result = compress(digits, goal(objective="smallest", max_drop=0.02), data=samples, eval_data=labelled)
    names = [row["name"] for row in result.report["candidates"]]
    assert any("distill" in name for name in names)
    assert any("in blocks of 4 bits or less" in name for name in names)
    assert result.report["accuracy"]["drop"] <= 0.02
    assert result.report["size_ratio"] > 1.3 * alone.report["size_ratio"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("timed_by_size")
def test_widths_and_bits_are_chosen_together(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """`smallest` builds models whose channels and bits one solver has chosen: one of them keeps the metric, and is
    smaller than all that keep every channel."""
    recipe = goal(objective="smallest", max_drop=0.02, techniques=["fuse", "prune", "quantize"])
    rows = compress(digits, recipe, data=samples, eval_data=labelled).report["candidates"]
    together = [row for row in rows if "bits chosen with the widths" in row["name"]]
    whole = [row["size_bytes"] for row in rows if "prune" not in row["name"] and row["drop"] is not None]
    assert any(row["drop"] <= 0.02 and row["size_bytes"] < min(whole) for row in together)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("timed_by_size")
def test_levers_without_labels(digits: Model, samples: InputData, labelled: EvaluationData, tmp_path: Path) -> None:
    """`smallest` with nothing but inputs: what is cut is judged on samples that nothing was fitted to, and the
    accuracy, which the search has not seen, holds."""
    alone = compress(digits, goal(objective="smallest", techniques=["fuse", "quantize"]), data=samples)
    told: list[str] = []
    result = compress(digits, goal(objective="smallest"), data=samples, on_log=lambda level, text: told.append(text))
    pattern = rf"nothing is fitted to (\d+) of {len(samples)} samples, which judge what is cut"
    (held,) = [int(found[1]) for text in told if (found := re.fullmatch(pattern, text))]
    assert abs(held / len(samples) - 1 / 3) < 0.02  # samples that are alike stay together
    assert any("prune" in row["name"] and not row["reason"].startswith("its") for row in result.report["candidates"])
    assert result.report["size_ratio"] >= alone.report["size_ratio"]
    digits.save(tmp_path / "before.onnx")
    result.model.save(tmp_path / "after.onnx")
    before, after = (Labelled(labelled, "top1").evaluate(tmp_path / name) for name in ("before.onnx", "after.onnx"))
    assert after.value >= before.value - 0.01


@pytest.mark.usefixtures("timed_by_size")
@pytest.mark.parametrize("expected_drop", [0.001, 0.1])
def test_what_a_bound_on_changed_answers_costs_is_told(
    digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch, expected_drop: float
) -> None:
    """One answer in 64 changes, more than 1 %: nothing is smaller. The advice says what there would be where the
    original is hardly less sure of the other class; else nothing."""

    def compared(*_: Any, **__: Any) -> Fidelity:
        outputs, agreement = {"logits": OutputFidelity(0.999, 30.0, 0.1)}, 63 / 64
        return Fidelity("provided", 64, outputs, agreement, agreement, (), 0.95, expected_drop, True, 64)

    monkeypatch.setattr(judge, "compare_outputs", compared)
    report = compress(digits, goal(objective="smallest", techniques=["quantize"], max_drop=0.01), data=samples).report
    assert report["size_ratio"] < 1.1
    told = [advice for advice in report["advice"] if "counts every changed answer" in advice["text"]]
    commands = ["compress-client upload MODEL --data FILE.npz --goal smallest"] if expected_drop < 0.01 else []
    assert [advice["command"] for advice in told] == commands


@pytest.mark.usefixtures("timed_by_size")
def test_a_short_search_ends_in_time(digits: Model, samples: InputData, labelled: EvaluationData) -> None:
    """Less time than one candidate takes: the first ones are built, and one of them is taken."""
    report = compress(digits, goal(search_time_s=0.001), data=samples, eval_data=labelled).report
    assert len(report["candidates"]) <= 3
    assert report["size_ratio"] > 3


@pytest.mark.usefixtures("timed_by_size")
def test_a_candidate_that_takes_too_long_is_left(
    digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prices of bits would never end: the search does, in its time, with the 4 bits that it began with."""

    def endless(bits: MixedBits) -> dict[str, tuple[Form, ...]]:
        while True:
            bits._context.check_time()
            time.sleep(0.01)

    monkeypatch.setattr(MixedBits, "options", property(endless))
    report = compress(digits, goal(objective="smallest", search_time_s=10.0), data=samples).report
    names = [row["name"] for row in report["candidates"]]
    assert any("4 bits in blocks, to the nearest" in name for name in names)
    assert not any("priced at" in name for name in names)
    assert report["size_ratio"] > 3


@pytest.mark.usefixtures("timed_by_size")
@pytest.mark.parametrize("mixes", [False, True])
def test_4_bits_are_rounded_well_where_no_mix_is_as_small(
    digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch, mixes: bool
) -> None:
    """The metric refuses 4 bits to the nearest. Where mixes of bits give nothing as small, 4 bits rounded by the data
    are tried, and taken; where they do, these would gain nothing."""
    seen: list[int] = []

    def metric(path: str, _: object) -> float:
        seen.append(Path(path).stat().st_size)
        return 0.0 if [size for size in seen if size < seen[0] / 4.5] == seen[-1:] else 1.0

    if not mixes:
        monkeypatch.setattr(MixedBits, "options", {"": (Form(EIGHT, 1, 0.0), Form(FLOAT, 4, 0.0))})
    asked = goal(objective="smallest", techniques=["quantize"], max_drop=0.01)
    report = compress(digits, asked, data=samples, metric=metric).report
    rows = {row["name"].partition(", ")[2]: row for row in report["candidates"]}
    assert "falls by 1.0" in rows["4 bits in blocks, to the nearest"]["reason"]
    assert [row["chosen"] for name, row in rows.items() if name == "4 bits in blocks"] == ([] if mixes else [True])


@pytest.mark.usefixtures("timed_by_size")
def test_a_far_search_ends_without_a_search_time(
    digits: Model, samples: InputData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first cut would be trained for ever: the usual time ends it, progress is that of the time, and the report
    says what is left out."""
    monkeypatch.setattr(search_time, "USUAL_S", 3.0)
    monkeypatch.setattr(search_time, "TIMES_FIRST", 1)
    monkeypatch.setattr(LeverSearch, "cuts", _endless)
    seen: list[tuple[str, float, str]] = []
    report = compress(
        digits,
        goal(objective="smallest", techniques=["prune"], max_drop=0.02, max_size_bytes=12_000_000),
        data=samples,
        on_progress=lambda stage, index, stages, fraction, message: seen.append((stage, fraction, message)),
    ).report
    jsonschema.validate(report, report_schema())
    assert report["search"]["limit_s"] >= 3
    assert report["search"]["time_s"] >= 3
    assert report["search"]["untried"] >= 5
    (more,) = [item for item in report["advice"] if "--search-time" in item["command"]]
    assert f"up to {report['search']['untried']} more models" in more["text"]
    same = "compress-client upload MODEL --data FILE.npz --max-drop 0.02 --goal smallest --max-size 12000000B"
    assert more["command"] == f"{same} --search-time 1m"
    assert any("more" in message for stage, _, message in seen if stage == "search")
    fractions = [fraction for stage, fraction, message in seen if "endless" in message]
    assert fractions[-1] > fractions[0] + 0.5


def _endless(lever: LeverSearch, *_: object) -> Iterator[Cut]:
    while True:
        lever._context.check_time()
        lever._context.progress(0.5, "endless")
        time.sleep(0.05)
        yield from ()


@pytest.mark.usefixtures("timed_by_size")
def test_for_the_smallest_arithmetic_comes_last(digits: Model, samples: InputData) -> None:
    """It makes no file smaller than stored weights do: cuts are tried first, and the time may end before it."""
    report = compress(digits, goal(objective="smallest", techniques=["prune", "quantize"]), data=samples).report
    names = [row["name"] for row in report["candidates"]]
    cuts = [place for place, name in enumerate(names) if name.startswith("prune") and "quantize" not in name]
    arithmetic = [place for place, name in enumerate(names) if "quantize static" in name or "dynamic" in name]
    assert cuts
    assert min(arithmetic) > max(cuts)


@pytest.mark.usefixtures("timed_by_size")
def test_who_asks_for_size_gets_blocks_before_arithmetic(digits: Model, samples: InputData) -> None:
    """A search that ends early has done what was asked for."""
    orders = {}
    for objective in ("smallest", "fastest"):
        report = compress(digits, goal(objective=objective, techniques=["fuse", "quantize"]), data=samples).report
        names = [row["name"] for row in report["candidates"]]
        orders[objective] = [
            "blocks" if "blocks" in name else "static" for name in names if "static" in name or "blocks" in name
        ]
    assert orders["smallest"][0] == "blocks"
    assert orders["fastest"][0] == "static"


@pytest.mark.usefixtures("timed_by_size")
def test_limits_that_a_balance_holds_cost_no_far_search(digits: Model, samples: InputData) -> None:
    """Twice as small is what a balance gives; six times is not, and then everything is tried, once."""
    techniques = ["fuse", "quantize"]
    plain = compress(digits, goal(techniques=techniques), data=samples).report["candidates"]
    held = compress(digits, goal(techniques=techniques, min_ratio=2), data=samples).report["candidates"]
    assert {row["name"] for row in held} == {row["name"] for row in plain}
    further = compress(digits, goal(techniques=techniques, min_ratio=6), data=samples).report
    names = [row["name"] for row in further["candidates"]]
    assert {row["name"] for row in plain} < set(names)
    assert any("priced at" in name for name in names)
    assert len(names) == len(set(names))


@pytest.mark.slow
@pytest.mark.usefixtures("timed_by_size")
def test_what_levers_made_for_a_balance_is_made_further(
    digits: Model, samples: InputData, labelled: EvaluationData
) -> None:
    """With labels a balance prunes a little. Where it misses a limit, levers go as far as they can, and none twice."""
    recipe = goal(techniques=["fuse", "prune", "quantize"], min_ratio=8, max_drop=0.02)
    report = compress(digits, recipe, data=samples, eval_data=labelled).report
    names = [row["name"] for row in report["candidates"]]
    assert sum(name.startswith("prune") for name in names) > 2
    assert len(names) == len(set(names))
