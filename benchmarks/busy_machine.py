"""Whether figures and choices hold on a machine that does other work: against what an idle one gives.

    python benchmarks/busy_machine.py --models DIR [--only NAME ...] [--repeats 20] [--choices 10]
                                      [--loops 2 8]

DIR holds trained models and one `eval_NAME.py` for each, as for real_models.py. For each model all candidates of the
goal `balanced` are built once. Then, with nothing else and with so many busy loops beside it:

- latency: the speed-up of the chosen candidate over the original is measured `--repeats` times, each as a report has
  it (50 rounds). Printed are the largest distance from the idle median, the share of the 95 % intervals that hold it,
  and wall time over CPU time.
- choice: the candidates are timed and chosen from `--choices` times. Printed are how many times the same is taken as
  most often on the idle machine. Building is left out, since nothing in it depends on time.

Run it on an otherwise idle machine. The loops are processes that it starts and ends itself.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from model_evaluation import evaluate
from modelpress_compression import Recipe, load
from modelpress_compression.inputs import InputData
from modelpress_compression.measure.latency import LatencyRow, compare_latency
from modelpress_compression.passes.base import Context
from modelpress_compression.search.goal import GoalSearch
from modelpress_compression.search.judge import Judge
from real_models import CASES, Case

NAMES = ("mnist (TorchScript)", "fashion (ONNX)", "silero_vad (ONNX)", "effnet_lite0 (TorchScript)", "ppocr_rec (ONNX)",
         "minilm (ONNX)")  # fmt: skip
IDLE = 0


def spin() -> None:
    """Keeps one core busy until it is ended."""
    while True:
        pass


@contextlib.contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    processes = [multiprocessing.Process(target=spin, daemon=True) for _ in range(loops)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
            process.join()


@dataclass(frozen=True)
class Built:
    """All candidates of one model. `original`, `chosen`: files."""

    name: str
    search: GoalSearch
    data: InputData

    def choice(self) -> tuple[str, Path]:
        """Times all candidates and takes one: its name and its file."""
        pursuit = self.search.choose()
        taken = next((row["name"] for row in pursuit.candidates if row["chosen"]), "the original")
        return taken, pursuit.records[-1].path if pursuit.records else self.search.path


def built(case: Case, models: Path, work: Path) -> Built:
    """Builds and judges the candidates, with representative inputs."""
    work.mkdir(parents=True, exist_ok=True)
    evaluate(case.evaluation, models, "--make-calib", str(work / "data.npz"))
    model = load(models / case.file, inputs=list(case.inputs)) if case.inputs else load(models / case.file)
    with np.load(work / "data.npz") as arrays:
        data = InputData.from_arrays(dict(arrays), model.inputs)
    path = work / "original" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    model.save(path)
    recipe = Recipe.preset("default")
    if recipe.goal is None:
        raise SystemExit("the preset `default` is no goal")
    context = Context(data, work, original=model)
    search = GoalSearch(
        recipe, recipe.goal, model, path, context, Judge(path, path, context, recipe, None, screens=True)
    )
    search.build()
    return Built(case.name, search, data)


def measured(one: Built, chosen: Path) -> LatencyRow:
    """As a report has it."""
    return compare_latency(one.search.path, chosen, one.data, threads=1, batch_size=1, rounds=50)


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures and choices on a busy machine, against an idle one.")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of the models to run")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--choices", type=int, default=10)
    parser.add_argument("--loops", type=int, nargs="*", default=[2, 8])
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.name in NAMES]
    cases = [case for case in cases if not arguments.only or any(part in case.name for part in arguments.only)]
    print("| model | busy loops | speed-up | furthest | intervals that hold the idle one | wall / CPU | same choice |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            one = built(case, arguments.models.resolve(), Path(folder))
            usual, chosen = Counter(one.choice() for _ in range(3)).most_common(1)[0][0]
            idle = statistics.median(measured(one, chosen).speedup.median for _ in range(5))
            for loops in (IDLE, *arguments.loops):
                with busy(loops):
                    rows = [measured(one, chosen) for _ in range(arguments.repeats)]
                    same = sum(one.choice()[0] == usual for _ in range(arguments.choices))
                speedups = [row.speedup for row in rows]
                furthest = max((abs(speedup.median / idle - 1) for speedup in speedups), default=0.0)
                held = sum(speedup.low <= idle <= speedup.high for speedup in speedups)
                usually = statistics.median(speedup.median for speedup in speedups) if speedups else idle
                contention = max((row.contention for row in rows), default=1.0)
                print(
                    f"| {case.name}: {usual} | {loops} | {usually:.2f} (idle {idle:.2f}) | {furthest:.1%} "
                    f"| {held} of {len(rows)} | {contention:.1f} | {same} of {arguments.choices} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
