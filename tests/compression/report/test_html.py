"""The page: complete, safe, and silent towards the network."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from modelpress_compression.measure.fidelity import Fidelity, OutputFidelity
from modelpress_compression.report.build import ReportInputs, StepRow, build_report
from modelpress_compression.report.formats import change, count, milliseconds, percent, size
from modelpress_compression.report.html import headline, render_html

_VOID = {"meta", "input"}


class Page(HTMLParser):
    """Collects tags, and what is out of balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")  # between number and unit


@pytest.mark.parametrize("name", ["inputs", "bare_inputs"])
def test_the_page_is_well_formed_and_self_contained(name: str, request: pytest.FixtureRequest) -> None:
    """Every element is closed; no script, no image, no address from outside."""
    text = render_html(build_report(request.getfixturevalue(name)))
    page = Page(text)
    assert page.open == []
    assert not {"script", "img", "link", "iframe", "object", "form"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "action") or name.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_the_page_says_everything(inputs: ReportInputs) -> None:
    """Headline, broken constraint, warning, figures, steps, skipped nodes by reason, candidates, recipe."""
    text = Page(render_html(build_report(inputs))).text
    for part in (
        "4.00× smaller, 2.00× as fast; 99.7 % of the answers unchanged on synthetic inputs.",
        "top1 falls by 0.02",
        "calibrated on synthetic inputs",
        "4.00 MB",
        "50.0 % are zero",
        "conv batchnorm 20",
        "Left alone: 41 nodes",
        "40 nodes: depthwise",
        "1 node: excluded",
        "and 10 more",
        "slower than in float32",
        "27.5 dB",
        "95.00 %",
        "scheme: auto",
        "1.80 to 2.20",
    ):
        assert part in text, part
    assert "gelu" not in text  # a rewrite that never fired is no change


def test_what_was_not_measured_is_not_invented(bare_inputs: ReportInputs) -> None:
    """Without latency, fidelity and MACs the page says so."""
    text = Page(render_html(build_report(bare_inputs))).text
    assert "The same size, speed not measured." in text
    assert "not measured" in text
    assert "shapes are not known" in text


def test_strings_of_users_are_escaped(inputs: ReportInputs) -> None:
    """Names and reasons from a hostile model cannot become markup, wherever they stand."""
    evil = "\"><script>alert(1)</script><b onclick='x'>"

    layer = replace(inputs.original.layers[0], name=evil, op_type=evil)
    figures = replace(inputs.original, ops={evil: 1}, layers=(layer,))
    hostile = replace(
        inputs,
        job=evil,
        recipe={evil: evil},
        warnings=[evil],
        violations=[evil],
        candidates=[{"name": evil, "chosen": False, "reason": evil}],
        steps=[StepRow(evil, {evil: evil}, {evil: 1}, [(evil, evil)], 1, 1.0)],
        environment={"cpu": evil, evil: evil},
        original=figures,
    )
    text = render_html(build_report(hostile))
    assert "<script" not in text
    assert "<b onclick" not in text
    assert Page(text).open == []


def said(report: dict[str, Any]) -> str:
    return headline(report).replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("median", "low", "high", "says"),
    [
        (2.19, 2.1, 2.3, "2.19× as fast"),
        (1.1, 1.05, 1.2, "10 % faster"),
        (1.02, 0.97, 1.08, "speed not measurably changed"),
        (0.57, 0.5, 0.6, "but 1.75× slower"),
    ],
)
def test_the_headline_claims_no_more_than_was_measured(
    inputs: ReportInputs, median: float, low: float, high: float, says: str
) -> None:
    """A speedup whose interval holds 1 is no speedup."""
    report = build_report(inputs)
    report["latency"][0]["speedup"] = {"median": median, "low": low, "high": high}
    assert says in said(report)


def test_the_headline_prefers_the_task(inputs: ReportInputs) -> None:
    """With labels the metric stands in the headline; a larger result is called larger."""
    report = build_report(inputs)
    report["accuracy"] = {"metric": "top1", "samples": 9, "original": 0.98, "optimized": 0.97, "drop": 0.01}
    assert said(report).endswith("; top1 98.00 % → 97.00 %.")
    report["accuracy"]["optimized"] = 0.98
    assert said(report).endswith("; top1 stays at 98.00 %.")
    report["size_ratio"] = 0.5
    assert said(report).startswith("100 % larger")


def test_numbers_read_well() -> None:
    """Units, digits, and shares that do not round to a claim that is not true."""
    expected = {
        "0 B": size(0),
        "999 B": size(999),
        "10.9 MB": size(10_857_958),
        "–": size(None),
        "21.8 k": count(21_840),
        "9,999": count(9_999),
        "1.43 G": count(1_434_451_968),
        "28.1 µs": milliseconds(0.0281),
        "32.9 ms": milliseconds(32.85),
        "12.0 s": milliseconds(12_000),
        "100 %": percent(1.0),
        "> 99.9 %": percent(0.99999),
        "< 0.1 %": percent(0.00001),
        "−74 %": change(100, 26),
        "+3.0 %": change(100, 103),
        "≈ equal": change(100_000, 100_001),
        "unchanged": change(5, 5),
        "": change(None, 5),
    }
    assert {text: shown.replace("\u00a0", " ") for text, shown in expected.items()} == {text: text for text in expected}


def test_a_model_without_weights_has_no_unknown_figures(inputs: ReportInputs) -> None:
    """No multiply-accumulates are no unknown ones."""
    none = replace(inputs.original, macs=0)
    page = render_html(build_report(replace(inputs, original=none, optimized=none)))
    assert "shapes are not known" not in page
    assert (change(0, 0), change(0, 5)) == ("unchanged", "")


def test_a_damaged_result_is_set_off(inputs: ReportInputs) -> None:
    """In the first words and in red, also where the recipe allowed it; a sound one is not."""
    assert "Damaged" not in render_html(build_report(inputs))
    fidelity = Fidelity("provided", 32, {"y": OutputFidelity(0.51, 1.0, 9.0)}, None, 0.51)
    text = render_html(build_report(replace(inputs, fidelity=fidelity, violations=())))
    assert '<h1 class="damaged">Damaged: ' in text
    assert "no longer resembles the original: cosine 0.51" in text


@pytest.mark.parametrize(
    ("after_ms", "median", "says"), [(3.0, 0.8, True), (5.0, 0.8, False), (5.0, 1.5, True), (3.0, 1.5, False)]
)
def test_times_that_point_the_other_way_get_a_word(
    inputs: ReportInputs, after_ms: float, median: float, says: bool
) -> None:
    """The speed-up comes from rounds side by side, the medians from all runs of each model."""
    report = build_report(inputs)
    row = report["latency"][0]
    row["speedup"] = {"median": median, "low": median - 0.1, "high": median + 0.1}
    row["optimized"]["p50_ms"] = after_ms
    assert ("say otherwise" in render_html(report)) == says


def test_pictures_have_numbers_on_their_axes(inputs: ReportInputs) -> None:
    """Times from 0 up to the slowest p99 (6 ms), bytes up to the largest layer (4 kB)."""
    text = Page(render_html(build_report(inputs))).text
    assert "02 ms4 ms6 ms" in text
    assert "01 kB2 kB3 kB4 kB" in text


def test_candidates_show_interval_and_verdict(inputs: ReportInputs) -> None:
    """Faster, slower, or no clear difference; figures of a damaged one are red."""
    report = build_report(inputs)
    speeds = {"fast": (1.5, 1.4, 1.6), "slow": (0.5, 0.4, 0.6), "even": (1.0, 0.9, 1.1)}
    report["candidates"] = [
        {"name": name, "chosen": False, "cosine": 0.4, "speedup": {"median": median, "low": low, "high": high}}
        for name, (median, low, high) in speeds.items()
    ]
    text = render_html(report)
    shown = Page(text).text
    for words in ("1.50× faster 95 %: 1.40 to 1.60", "2.00× slower 95 %: 0.40 to 0.60", "no clear difference (1.00×)"):
        assert words in shown
    assert '<b class="damaged">0.4000</b>' in text


def test_candidates_are_plotted_by_time_and_size(inputs: ReportInputs) -> None:
    """A mark for each that was timed, leading to its row; one alone is no picture."""
    report = build_report(inputs)
    assert 'class="family"' not in render_html(report)
    report["candidates"][0]["speedup"] = {"median": 0.5, "low": 0.4, "high": 0.6}
    text = render_html(report)
    # Twice the original's time lies at the right end, half of it at a quarter; the larger file lies at the top.
    assert '<a href="#c1" class="beaten">' in text
    assert '<circle cx="98.00%" cy="12.0" r="6"/>' in text
    assert '<a href="#c2" class="chosen">' in text
    assert '<circle cx="24.50%"' in text
    assert 'id="c1"' in text
    assert 'id="c2"' in text
