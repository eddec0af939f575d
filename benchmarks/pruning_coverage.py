"""Channel pruning on graphs of many architectures: how much goes, whether the cut is right, and what it brings.

    python benchmarks/pruning_coverage.py [--only NAME ...] [--cache DIR] [--no-latency] [--docs]

Every architecture is exported by both torch exporters and loaded as a user's file. Half of the units of every group
are cut, a random half: which ones does not matter to the shares, and a wrong pairing of indices cannot hide as it can
behind the first half. The cut model is compared with the masked one, the full model on whose outputs the units that
are cut have no influence (`oracles.masking`, which shares no code with the cut), and timed against the full one in
interleaved rounds.

`--docs` writes docs/pruning_coverage.md; for all architectures only. Needs timm, torchvision and transformers beside
the engine: `pip install timm transformers` and `pip install --no-deps torchvision`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from architectures import ARCHITECTURES, EXPORTERS, Architecture, Exporter, exported
from modelpress_compression.channels import Analysis, Group, Indices, cut, find_groups
from modelpress_compression.inputs import Feeds, InputData
from modelpress_compression.loaders import load
from modelpress_compression.measure.latency import LatencyRow, compare_latency
from modelpress_compression.measure.stats import model_stats
from modelpress_compression.model import Model
from modelpress_compression.report.environment import environment
from modelpress_compression.runtime import open_session, run
from oracles.masking import masked
from pruning_scale import Scale, measure_scale

SPARSITY = 0.5
RTOL, ATOL = 1e-3, 1e-4
MAX_ERROR_OF_SPREAD = 1e-2
ROUNDS = 30
LATENCY_BUDGET_S = 4.0
DOCS = Path(__file__).resolve().parent.parent / "docs" / "pruning_coverage.md"
# What the project promises.
MIN_MEAN_SHARE = 0.65
MAX_GAP = 0.03
MAX_ANALYSIS_S = 10.0


@dataclass
class Row:
    """One architecture by one exporter. `removed`, `macs_removed`: shares; `error`: why there are no figures.

    `max_error`: between cut and masked model; `spread`: how far the masked model's outputs for two inputs lie apart.
    """

    architecture: Architecture
    exporter: Exporter
    nodes: int = 0
    groups: int = 0
    frozen: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    parameters: int = 0
    removed: float = 0.0
    macs_removed: float | None = None
    analysis_s: float = 0.0
    max_error: float = float("nan")
    spread: float = float("nan")
    equal: bool = False
    latency: LatencyRow | None = None
    error: str = ""


def kept_halves(analysis: Analysis, round_to: int, seed: int = 0) -> dict[str, Indices]:
    """A random half of the units of every group, in rising order; channels are rounded up to `round_to`."""
    return {
        group.id: _kept_half(group, round_to, np.random.default_rng([seed, group.units])) for group in analysis.groups
    }


def _kept_half(group: Group, round_to: int, rng: np.random.Generator) -> Indices:
    # Units of several channels (heads) are rounded only as far as whole units go.
    step = max(1, round_to // group.align)
    wanted = max(1, round(group.units * (1 - SPARSITY)))
    count = min(group.units, -(-wanted // step) * step) if group.units > step else group.units
    return np.sort(rng.choice(group.units, count, replace=False)).astype(np.int64)


def measure(architecture: Architecture, exporter: Exporter, arguments: argparse.Namespace) -> Row:
    """All figures of one row; a failure becomes its `error`."""
    row = Row(architecture, exporter)
    try:
        path, arrays = exported(architecture, exporter, arguments.cache)
        model = load(path)
        data = InputData.from_arrays(arrays, model.inputs)
        row.nodes = sum(1 for _ in model.nodes())
        began = time.perf_counter()
        analysis = find_groups(model)
        row.analysis_s = time.perf_counter() - began
        row.groups = len(analysis.groups)
        row.frozen = sum(frozen.channels for frozen in analysis.frozen)
        row.reasons = _reasons(analysis)
        kept = kept_halves(analysis, arguments.round_to)
        smaller = cut(model, kept)
        _sizes(row, model, smaller)
        with tempfile.TemporaryDirectory() as folder:
            _check(row, model, smaller, masked(model, analysis, kept, _feeds(data)), data, Path(folder))
            if not arguments.no_latency:
                row.latency = compare_latency(
                    Path(folder) / "full.onnx", Path(folder) / "cut.onnx", data, threads=1, batch_size=1,
                    rounds=ROUNDS, budget_s=LATENCY_BUDGET_S,
                )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - one architecture that fails must not hide the others
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return row


def _feeds(data: InputData) -> Feeds:
    return next(data.feeds(len(data)))


def _reasons(analysis: Analysis) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for frozen in analysis.frozen:
        # Without the node's name at the end: reasons are counted over all models.
        reason = re.sub(r" \([^()]*\)$", "", frozen.reason)
        reasons[reason] = reasons.get(reason, 0) + frozen.channels
    return reasons


def _sizes(row: Row, model: Model, smaller: Model) -> None:
    before, after = model_stats(model), model_stats(smaller)
    row.parameters = before.parameters
    row.removed = 1 - after.parameters / before.parameters
    if before.macs and after.macs is not None:
        row.macs_removed = 1 - after.macs / before.macs


def _check(row: Row, model: Model, smaller: Model, reference: Model, data: InputData, folder: Path) -> None:
    """Runs cut and masked model on the same inputs."""
    outputs = {}
    for name, one in (("full", model), ("cut", smaller), ("masked", reference)):
        one.save(folder / f"{name}.onnx")
        outputs[name] = run(open_session(folder / f"{name}.onnx"), _feeds(data))
    got, expected = outputs["cut"], outputs["masked"]
    if [array.shape for array in got.values()] != [array.shape for array in outputs["full"].values()]:
        raise ValueError("the cut model's outputs have other shapes")
    row.max_error = max(float(np.abs(got[name] - expected[name]).max()) for name in expected)
    row.spread = max(float(np.abs(array[0] - array[1]).max()) for array in expected.values())
    # Deep nets may have outputs that hardly depend on the input: small errors alone would prove nothing there.
    row.equal = row.max_error <= MAX_ERROR_OF_SPREAD * row.spread and all(
        np.allclose(got[name], expected[name], rtol=RTOL, atol=ATOL) for name in expected
    )


HEADINGS = ("architecture", "from", "exporter", "nodes", "groups", "frozen", "parameters", "removed", "MACs removed",
            "largest error", "spread", "equal", "analysis", "speed-up [95 %]")  # fmt: skip


def cells(row: Row) -> list[str]:
    """The row as it stands in the table."""
    start = [row.architecture.name, row.architecture.source, row.exporter]
    if row.error:
        return [*start, row.error, *[""] * (len(HEADINGS) - len(start) - 1)]
    speedup = row.latency.speedup if row.latency else None
    return [
        *start,
        f"{row.nodes}",
        f"{row.groups}",
        f"{row.frozen}",
        f"{row.parameters / 1e6:.2f} M",
        f"{row.removed:.1%}",
        "" if row.macs_removed is None else f"{row.macs_removed:.1%}",
        f"{row.max_error:.1e}",
        f"{row.spread:.1e}",
        "yes" if row.equal else "NO",
        f"{row.analysis_s:.2f} s",
        f"{speedup.median:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]" if speedup else "",
    ]


def gaps(rows: Sequence[Row]) -> dict[str, float]:
    """How far the shares of the two exporters lie apart."""
    shares: dict[str, list[float]] = {}
    for row in rows:
        if not row.error:
            shares.setdefault(row.architecture.name, []).append(row.removed)
    return {name: max(found) - min(found) for name, found in shares.items() if len(found) == len(EXPORTERS)}


def summary(rows: Sequence[Row], scale: Sequence[Scale]) -> list[str]:
    """What the rows say together, and whether it is what the project promises."""
    good = [row for row in rows if not row.error]
    if not good:
        return ["Nothing was measured."]
    mean = float(np.mean([row.removed for row in good]))
    by_exporter = {e: float(np.mean([r.removed for r in good if r.exporter == e] or [0.0])) for e in EXPORTERS}
    apart = gaps(rows)
    widest = max(apart, key=lambda name: apart[name], default="")
    slower = [f"{r.architecture.name} ({r.exporter})" for r in good if r.latency and r.latency.speedup.high < 1]
    wrong = [f"{r.architecture.name} ({r.exporter})" for r in good if not r.equal]
    lines = [
        f"Mean share of the parameters removed: {mean:.1%} ("
        + ", ".join(f"{exporter} {share:.1%}" for exporter, share in by_exporter.items())
        + f"); at least {MIN_MEAN_SHARE:.0%} is asked for.",
        f"Outputs that onnxruntime does not load, or other failures: {len(rows) - len(good)} of {len(rows)}.",
        f"Cut models that differ from the masked model (rtol {RTOL:g}, atol {ATOL:g}, and {MAX_ERROR_OF_SPREAD:.0%} "
        f"of the spread between two inputs): {len(wrong)} of {len(good)}"
        + (f": {', '.join(wrong)}." if wrong else "."),
    ]
    if apart:
        lines.append(
            f"The exporters lie at most {max(apart.values()) * 100:.1f} points apart ({widest}); "
            f"{MAX_GAP * 100:.0f} are allowed."
        )
    if any(row.latency for row in good):
        lines.append(f"Slower than before (interval below 1): {', '.join(slower) or 'none'}.")
    lines += [f"Analysis of {one.name}, {one.nodes} nodes: {one.analysis_s:.2f} s." for one in scale]
    return lines


def holds(rows: Sequence[Row], scale: Sequence[Scale]) -> bool:
    """Whether all that is promised holds."""
    return (
        not any(row.error or not row.equal for row in rows)
        and float(np.mean([row.removed for row in rows])) >= MIN_MEAN_SHARE
        and max(gaps(rows).values(), default=0.0) <= MAX_GAP
        and all(one.analysis_s < MAX_ANALYSIS_S for one in scale if one.nodes < 7000)
    )


def document(rows: Sequence[Row], scale: Sequence[Scale]) -> str:
    """The page of the docs."""
    machine = environment()
    table = [HEADINGS, ["---"] * len(HEADINGS), *(cells(row) for row in rows)]
    sizes = [["graph", "nodes", "groups", "analysis"], ["---"] * 4]
    sizes += [[one.name, f"{one.nodes}", f"{one.groups}", f"{one.analysis_s:.2f} s"] for one in scale]
    reasons: dict[str, int] = {}
    for row in rows:
        for reason, channels in row.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + channels
    top = sorted(reasons.items(), key=lambda item: -item[1])[:15]
    return "\n".join(
        [
            "# Channel pruning: coverage",
            "",
            "Written by `python benchmarks/pruning_coverage.py --docs`; do not edit.",
            "",
            *(__doc__ or "").strip().split("\n\n")[2:3],
            "",
            *(f"- {line}" for line in summary(rows, [])),
            "",
            *_markdown(table),
            "",
            "`largest error`: between the outputs of the cut and of the masked model, `spread`: between the outputs "
            "for two inputs. `frozen`: channels that stay because they cannot be traced or are a graph's inputs or "
            "outputs. "
            f"`speed-up`: time before / after, one thread, batch 1, {machine['cpu']}, "
            f"onnxruntime {machine['onnxruntime']}, "
            f"torch {machine['torch']}; interval of the median over interleaved rounds.",
            "",
            "## Time of the analysis",
            "",
            *_markdown(sizes),
            "",
            "## Why channels are frozen",
            "",
            *_markdown([["reason", "channels"], ["---"] * 2, *([reason, f"{count}"] for reason, count in top)]),
            "",
        ]
    )


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["|" + "|".join(row) + "|" for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description="Channel pruning on graphs of many architectures.")
    parser.add_argument("--only", nargs="*", default=[], help="parts of architectures' names")
    parser.add_argument("--exporters", nargs="*", default=list(EXPORTERS), choices=EXPORTERS)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "modelpress-architectures")
    parser.add_argument("--round-to", type=int, default=1, help="kept channels are rounded up to a multiple of this")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--docs", action="store_true", help=f"write {DOCS.name} in docs")
    arguments = parser.parse_args()
    if arguments.docs and (arguments.only or len(arguments.exporters) < len(EXPORTERS)):
        parser.error("--docs is for all architectures and both exporters")
    rows = []
    print(*_markdown([HEADINGS, ["---"] * len(HEADINGS)]), sep="\n", flush=True)
    for architecture in ARCHITECTURES.values():
        if arguments.only and not any(part in architecture.name for part in arguments.only):
            continue
        for exporter in arguments.exporters:
            rows.append(measure(architecture, exporter, arguments))
            print(*_markdown([cells(rows[-1])]), flush=True)
    scale = measure_scale(arguments.cache) if not arguments.only else []
    print("", *summary(rows, scale), sep="\n")
    if arguments.docs:
        DOCS.write_text(document(rows, scale))
    sys.exit(0 if arguments.only or holds(rows, scale) else 1)


if __name__ == "__main__":
    main()
