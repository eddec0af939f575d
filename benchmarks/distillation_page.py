"""docs/distillation.md from what `distillation.py` measured: prose, tables, plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]

_HEAD = """# What training from the file alone brings back

`distill` trains a model as it stands, pruned or quantized, with the uploaded model as its teacher. It needs neither the
source code nor labels: the graph runs in torch, the original answers in onnxruntime, and the distance between the
answers is what training lessens. The best state by the samples held out is kept, the start among them, and the written
file is held against the original in onnxruntime before it is taken: a step never ends worse than it began, by that
measure.

{ways}
Augmentation changes each batch at random, and both models see the same batch, so that it is safe wherever the original
can be asked: choose what could occur in use. With `labels` in the data file, half of the loss is theirs.

`target: {device: cuda}` trains on a GPU where torch sees one; without one it trains on the CPU, and a warning says so.
The original answers in onnxruntime on the CPU all the same.

The figures below come from `benchmarks/distillation.py`: trained models, task metrics on data that training never sees,
unlabelled training inputs. Times are CPU seconds on one thread, with everything that the step does (the teacher's
answers and the proof in onnxruntime included); times of trained models include the repair before.
"""

_WAYS = (
    ("`method`, data", "what is trained", "good for"),
    ("---", "---", "---"),
    (
        "`end_to_end`",
        "all weights at once, towards the outputs and what both models have in common between",
        "the most accuracy",
    ),
    (
        "`layerwise`",
        "block after block, towards the original's activations; cut channels are matched by what they do",
        "large models",
    ),
    (
        "after `quantize` with scheme `static` or `weight_only`",
        "float weights behind fake quantization, written back as integers",
        "int8 and int4",
    ),
    (
        "without `--data`",
        "either, on inputs optimized for the model's normalization statistics and classes, or random ones",
        "when there is nothing else",
    ),
)

_LIMITS = """
## Limits

- Layers that compute in integers themselves (`quantize` with scheme `dynamic`, QLinear operators) pass no gradient; the
  report names them. Distill before quantizing so.
- The scales and zero points of a quantized model stay as calibration chose them; the weights and biases move.
- Static 8-bit weights that `quantize` kept from saturating on CPUs without VNNI are kept from it after training too:
  pairs that training moved beyond go to the nearest levels that do not saturate, and the report proves it anew.
- Normalization statistics stay as they are: BatchNormalization is trained in its inference form.
- Inputs made without data are poor beside real ones. Where a graph holds neither BatchNormalization nor class scores
  they are random, and what is learned on random inputs may harm on real ones; the gain is measured on them alone.
- `layerwise` cuts a graph where one value alone carries what weights made; models with weights in subgraphs, or with
  skip connections from end to end, are one block.
- 16-bit float models are trained in their own precision, which may be too coarse for small learning rates.
"""


def render_page(results: Mapping[str, Rows], docs: Path, svg: Callable[..., str]) -> None:
    """Writes docs/distillation.md and docs/images/distillation_NAME.svg."""
    ways = "".join(f"| {' | '.join(row)} |\n" for row in _WAYS)
    parts = [_HEAD.replace("{ways}", ways)]
    for name, rows in results.items():
        (original,) = _of(rows, "original")
        parts.append(
            f"\n## {name}\n\nThe original: {original['metric']:.4f}; {original['samples']:,} training inputs.\n"
        )
        recovery = [*_of(rows, "recovery"), *_of(rows, "blind")]
        if recovery:
            image = docs / "images" / f"distillation_{name}.svg"
            image.write_text(_plot(name, recovery, original["metric"], svg), "utf-8")
            parts += [_recovery(name, recovery), f"\n![Metric against time, {name}](images/{image.name})\n"]
        parts += [_quantized(_of(rows, "quantized")), _criteria(_of(rows, "criteria"))]
    (docs / "distillation.md").write_text("".join([*parts, _LIMITS]), "utf-8")


def _of(rows: Rows, table: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["table"] == table]


def _plot(name: str, rows: Rows, original: float, svg: Callable[..., str]) -> str:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "without data" not in row["method"] or row["method"].startswith("distillation"):
            curves.setdefault(row["method"], []).append((row["cpu_s"], row["metric"]))
    return svg(f"{name}: half of the multiplications gone", "task metric", curves, ("the original", original))


def _recovery(name: str, rows: Rows) -> str:
    share, sparsity = rows[0]["macs_share"], rows[0]["sparsity"]
    lines = [
        f"\nChannels pruned by `activation` at sparsity {sparsity:g}, {share:.0%} of the multiplications left:\n\n",
        "| afterwards | epochs | metric | CPU time |\n| --- | --- | --- | --- |\n",
    ]
    lines += [
        f"| {row['method']} | {row.get('epochs', '')} | {row['metric']:.4f} | {row['cpu_s']:.1f} s |\n" for row in rows
    ]
    return "".join(lines)


def _quantized(rows: Rows) -> str:
    if not rows:
        return ""
    lines = ["\nQuantized after training, and the same file trained:\n\n"]
    lines.append("| form | after training | trained | CPU time of training |\n| --- | --- | --- | --- |\n")
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {before['method']} | {before['metric']:.4f} | {after['metric']:.4f} | {after['cpu_s']:.1f} s |\n"
        )
    return "".join(lines)


def _criteria(rows: Rows) -> str:
    if not rows:
        return ""
    lines = ["\nThe criteria at the same sparsity (`normalize: macs` where the scope is global):\n\n"]
    lines.append("| criterion, scope | multiplications left | cut | repaired | and one epoch | CPU time to choose |\n")
    lines.append("| --- | --- | --- | --- | --- | --- |\n")
    lines += [
        f"| {row['method']} | {row['macs_share']:.0%} | {row['cut']:.4f} | {row['repaired']:.4f} | "
        f"{row['metric']:.4f} | {row['cpu_s']:.1f} s |\n"
        for row in rows
    ]
    return "".join(lines)
