"""docs/distillation.md from what `distillation.py` measured: prose, tables, plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]

_HEAD = """# What training from the file alone brings back

`distill` trains a model as it stands, pruned or quantized, with the uploaded model as its teacher. It needs neither the
source code nor labels: the graph runs in torch, the original runs in onnxruntime, and training reduces the distance
between their outputs. Some samples are held out; the state with the smallest loss on them is kept, and the state before
training takes part. Before the written file is taken, it is compared with the original in onnxruntime on the same
samples. So by that loss, a step never ends worse than it began.

{ways}
Augmentation changes each batch at random. Both models see the same changed batch, so that the teacher's outputs fit it:
choose changes that could occur in use. With `labels` in the data file, the loss against them makes half of the whole.

`target: {device: cuda}` trains on a GPU where torch sees one; without one it trains on the CPU, and a warning says so.
The original runs in onnxruntime on the CPU in either case.

The figures below come from `benchmarks/distillation.py`: trained models, task metrics on data that training never sees,
unlabelled training inputs. Times are CPU seconds on one thread for the whole step, including the teacher's outputs and
the proof in onnxruntime; times of trained models include the repair before.
"""

_WAYS = (
    ("`method`, data", "what is trained", "good for"),
    ("---", "---", "---"),
    (
        "`end_to_end`",
        "all weights at once, towards the outputs and the inner values that both models have in common",
        "the most accuracy",
    ),
    (
        "`layerwise`",
        "block after block, towards the original's activations; cut channels are matched by their values",
        "large models",
    ),
    (
        "after `quantize` with scheme `static` or `weight_only`",
        "float weights behind fake quantization, written back as integers",
        "int8 and int4",
    ),
    (
        "without `--data`",
        "either, on inputs optimized for the model's normalization statistics and classes, on token sequences that its "
        "outputs tell apart, or random ones",
        "when there is nothing else",
    ),
)

_LIMITS = """
## Limits

- Layers that compute in integers themselves (`quantize` with scheme `dynamic`, QLinear operators) pass no gradient; the
  report names them. Distill before such a step.
- The scales and zero points of a quantized model stay as calibration chose them; only weights and biases are trained.
- Where `quantize` chose static 8-bit weights that do not saturate on CPUs without VNNI, this holds after training too:
  pairs of weights that would saturate move to the nearest levels that do not, and the report certifies it anew.
- Normalization statistics stay as they are: BatchNormalization is trained in its inference form.
- Inputs made without data are poor beside real ones, and the gain is measured on such inputs alone; the report says
  how they were made, and that confidence is low. Of the six models above two gained 12 and 33 points of their metric
  by such training, and four less than one point or nothing. Making them takes 30 % of the time for training, and a
  minute at most. Images are optimized; those that the time runs out on are left out. Of token sequences some tokens are
  exchanged until the outputs show each class, or of embeddings point apart; a language model writes its own. Where a
  graph has nothing to aim at, inputs are random.
- No other made-up inputs tell whether such training helped. On random ones the distance to the original grew from 0.435
  to 1.90 where the digit classifier went from 0.821 to 0.936, and fell from 1.37 to 0.64 where MiniLM lost 5.6 points.
- On MiniLM, with real sentences at hand, 64 made-up sequences were put in their place (`benchmarks/made_inputs.py`).
  The mean cosine of two outputs is 0.37 for random tokens, 0.24 with different lengths, 0.03 with exchanged tokens; of
  sentences it is 0.08. In static 8 bits with ranges from them, real sentences keep 17.2, 17.0 and 15.9 dB, where the
  inputs themselves say 15.1, 14.6 and 13.1 dB. With everything else fitted to them as well (SmoothQuant, bias
  correction, ranges by the outputs) it is 15.4, 15.4 and 19.6 dB, where they say 20.6, 20.1 and 22.6 dB. With 64
  sentences in their place 16.2 and 19.0 dB are kept: exchanged tokens are as good to fit to as those, and random ones
  are not, but no made-up inputs are within 2 dB of the truth on what they cost. As that is one model, only
  real inputs are fitted to outside of training. Training on too few made-up sequences harms: 32 of them brought the
  pruned MiniLM from 0.478 to 0.422.
- `layerwise` cuts a graph at values through which alone the weights before them act. Models with weights in subgraphs,
  or with skip connections from end to end, are one block.
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
