"""What a job will take, told before the long work: from one run of the model, its size and the plan.

    time      runs of the model that the plan makes * (the time of one run + what each run costs besides)
    memory    what the process holds + copies of the weights + what a run works in + the activations that are looked
              at, and what gradients hold, which are found from the shapes of all values and are bounded however large
              a sample is (graph/watch/portions); weights of large models stay on the disk, so that sessions alone hold
              copies of them (runtime.fit_together)
    disk      copies of the model in the work folder

How many runs and copies a plan makes was found by `benchmarks/preflight.py`, which prints estimates beside what was
taken. Times are CPU seconds: a machine that does other work takes longer. What cannot fit is refused; what may not is
said.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modelpress_compression.errors import DiskSpaceError, MemoryLimitError
from modelpress_compression.graph.shapes import sample_shapes
from modelpress_compression.graph.watch.portions import (
    GRADIENT_COPIES,
    MAX_GRADIENT_BYTES,
    WATCHED_BYTES,
    made_bytes,
)
from modelpress_compression.inputs import InputData
from modelpress_compression.mapped import is_large
from modelpress_compression.model import Model, file_size_bytes
from modelpress_compression.parallel import workers_within
from modelpress_compression.passes.base import Context
from modelpress_compression.passes.hessians import Hessians
from modelpress_compression.passes.quantize.reconstruction.rounders import METHODS
from modelpress_compression.passes.quantize.rounding.gptq import rounds_by_data
from modelpress_compression.passes.quantize.scaling.streams import find_streams
from modelpress_compression.passes.quantize.static import bias_correction, full_bias_correction
from modelpress_compression.passes.repair import least_squares, paired
from modelpress_compression.recipe import Recipe, Step
from modelpress_compression.report.formats import duration, plain_size
from modelpress_compression.runtime import SPARE_BYTES, fit_together, open_session, run
from modelpress_compression.search.grounds import can_hold_out
from modelpress_compression.search.levers import EPOCHS, TRAINING_SHARE
from modelpress_compression.search.search_time import USUAL_S

# Samples beyond these are not looked at by the passes and the judge.
MOST_SAMPLES = 128
OVERHEAD_S = 0.00025  # of one run, beside the model's own time
RUNS_TIMED = 3
SESSIONS_BYTES = 40 * 1024**2  # of onnxruntime and this process, whatever the model
# Of torch, where it is not loaded yet: sensitivities and training need it. Workers have it from the start.
TORCH_BYTES, TORCH_S = 130 * 1024**2, 2.0
# What a pass has made of the weights, before it is in a file.
NEW_WEIGHTS = 0.3
# The estimates err by less than this factor, either way.
UNCERTAINTY = 2.0
# Of what one run works in: so much is held besides, for the runs side by side.
RUNS_HELD = 4.0
# Of activations that are looked at: onnxruntime's, and those that it hands out.
WATCHED_COPIES = 2.0
# Of a model whose streams are rotated where they gain: static quantization is prepared without and with it.
ROTATED_FORMS, ROTATED_COPIES = 2, 2.0


@dataclass(frozen=True)
class Cost:
    """Of a step or a goal: `runs` of the model and `runs_per_sample`; copies of the weights in `memory` and on `disk`.

    `streams`: of a large model no more copies are held than sessions need. `gradients`: whether it needs gradients of
    the outputs, for which the activations of whole samples are held. `watches`: whether it looks at activations.
    `keeps`: of how many samples it keeps activations to go on from, and how many bytes of them at the most.
    `holds`: bytes besides, of what it has found of the data. `large`: copies in `memory` where the model is large and
    `streams` does not hold; None: the same. `makes`: copies of a large model's weights that it writes besides.

    Runs are those of the float model that take as long: an unoptimized or instrumented model counts for several.
    """

    runs: float
    runs_per_sample: float
    memory: float
    disk: float
    gradients: bool = False
    streams: bool = True
    watches: bool = False
    keeps: tuple[int, int] = (0, 0)
    holds: int = 0
    large: float | None = None
    makes: float = 0.0


# Of two models, or twice of one: while a piece runs, what it starts from and what it makes.
_KEPT_COPIES = 2
_CORRECTION = bias_correction.MAX_SAMPLES, _KEPT_COPIES * full_bias_correction.MAX_KEPT_BYTES
_REPAIR = least_squares.MAX_SAMPLES, _KEPT_COPIES * paired.MAX_KEPT_BYTES
GOAL = Cost(100, 60, 10.0, 3.0, gradients=True, watches=True, keeps=_CORRECTION, makes=3.0)
MEASURING = Cost(300, 4, 4.0, 0.0)
# Of a goal that searches as far as it can: some ten models are cut and judged, and two of them quantized.
LEVERS = Cost(800, 500, 10.0, 8.0, gradients=True, watches=True, keeps=_REPAIR)
TRAININGS = 5  # of cut models, in such a search
TRIED_CUTS = 4  # by `prune` with `min_cosine`; more where layers bear little
_LIGHT = Cost(20, 1, 4.0, 1.0)
_STEPS = {
    "quantize auto": Cost(100, 45, 10.0, 4.0, gradients=True, watches=True, keeps=_CORRECTION, makes=2.0),
    # Large: numbers and gradients of the weights, their 8 bits, and a session.
    "quantize static": Cost(
        100, 25, 10.0, 2.0, gradients=True, streams=False, watches=True, keeps=_CORRECTION, large=4.0, makes=2.0
    ),
    "prune channel": Cost(100, 30, 6.0, 2.0, streams=False, watches=True, keeps=_REPAIR),
    "factorize": Cost(100, 30, 8.0, 2.0, streams=False, watches=True, keeps=_REPAIR),
}
# Of training, for each sample of each epoch: the teacher's answer, the student's, and its gradients.
TRAINING_RUNS = 12.0
# Of learned rounding, for each step: samples, and what their answers and gradients cost in runs.
LEARNING_RUNS = 16 * 4.0
# What it keeps of activations at most: of one block, and of two models to go on from, twice while a piece runs.
LEARNING_BYTES = 1280 * 1024**2  # 1.25 GiB
_LEARNING_SAMPLES, _LEARNING_COPIES = 256, 5


@dataclass(frozen=True)
class Needs:
    """What a job will take. `memory_bytes`: of the whole process at its peak."""

    time_s: float
    memory_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        """'about 2 min, 1.20 GB of memory, 400 MB of disk'."""
        memory, disk = plain_size(self.memory_bytes), plain_size(self.disk_bytes)
        return f"about {duration(self.time_s)}, {memory} of memory, {disk} of disk"


def needs(recipe: Recipe, model: Model, path: Path, data: InputData, *, judged: bool = False) -> Needs:
    """The estimate for the `model` in the file `path`, whose cost is measured in a few runs.

    `judged`: labels or a metric of the user's own say what an answer is worth, so that all data may be fitted to.

    Raises ModelNotRunnableError.
    """
    run_s, working_bytes = _one_run(path, data)
    samples = min(MOST_SAMPLES, len(data))
    pulled = data.vouches if judged else can_hold_out(data)
    levers = pulled and recipe.searches_far and not recipe.steps
    costs = [*_costs(recipe, model, data), *([LEVERS] if levers else ())]
    runs = sum(cost.runs + cost.runs_per_sample * samples for cost in costs)
    runs += sum(TRAINING_RUNS * epochs * len(data) for epochs in map(_epochs, recipe.steps))
    learned = [step.config for step in recipe.steps if _learns(step)]
    runs += sum(LEARNING_RUNS * config.rounding_steps for config in learned) if data.provided else 0
    model_bytes = file_size_bytes(path)
    torch = "torch" not in sys.modules
    fixed_bytes = SESSIONS_BYTES + torch * TORCH_BYTES
    copies_bytes = max(_copies(cost, model_bytes) for cost in costs) * model_bytes
    learns = bool(learned) and data.provided
    made = made_bytes(model, data) if learns or any(cost.watches for cost in costs) else []
    # Models are compared in runs side by side, and looked into one sample at a time.
    looked_at = max(held_activations(cost, made, len(data)) for cost in costs)
    copies_bytes += max(RUNS_HELD * working_bytes, working_bytes + looked_at)
    if learns:
        copies_bytes += min(LEARNING_BYTES, _LEARNING_COPIES * min(_LEARNING_SAMPLES, len(data)) * sum(made))
    memory_bytes = held_bytes() + fixed_bytes + copies_bytes
    # What weights in fewer bits of a large model stand for is in a file while a session opens (see `prefold`).
    disk = 1 + sum(cost.disk for cost in costs)
    disk += is_large(model_bytes) * (1 + sum(cost.makes for cost in costs))
    disk_bytes = model_bytes * disk
    time_s = runs * (run_s + OVERHEAD_S)
    if levers:
        training_s = TRAINING_RUNS * EPOCHS * len(data) * (run_s + OVERHEAD_S)
        limit_s = (recipe.goal and recipe.goal.search_time_s) or max(USUAL_S, time_s)
        time_s = min(limit_s, time_s + TRAININGS * min(training_s, TRAINING_SHARE * limit_s))
    return Needs(torch * TORCH_S + time_s, round(memory_bytes), round(disk_bytes))


def check_room(needs: Needs, work_directory: Path, memory_limit_bytes: int | None) -> list[str]:
    """Sentences on what may not suffice. `memory_limit_bytes` None: what the machine has free.

    Raises MemoryLimitError, DiskSpaceError where the job cannot fit.
    """
    memory = _available_memory_bytes() if memory_limit_bytes is None else memory_limit_bytes
    disk = shutil.disk_usage(work_directory).free
    found = []
    for what, needed, there, error in (
        ("memory", needs.memory_bytes, memory, MemoryLimitError),
        ("disk space", needs.disk_bytes, disk, DiskSpaceError),
    ):
        text = f"about {plain_size(needed)} of {what}, and {plain_size(there)} are there"
        if needed > UNCERTAINTY * there:
            raise error(f"The job would need {text}. Take a smaller model or fewer techniques, or give it more room.")
        if needed > there:
            found.append(f"The job may need {text}: it may not be able to end.")
    return found


def held_activations(cost: Cost, made: Sequence[int], samples: int) -> float:
    """Bytes of activations, and of their gradients, that are held at the most. `made`: of each value of a sample."""
    if not cost.watches:
        return float(cost.holds)
    total, largest = sum(made), max(made, default=0)
    watched = WATCHED_COPIES * min(total, max(WATCHED_BYTES, largest))
    kept_samples, kept_bytes = cost.keeps
    kept = min(kept_bytes, _KEPT_COPIES * min(kept_samples, samples) * largest)
    one = GRADIENT_COPIES * total if cost.gradients else 0.0
    gradients = one * workers_within(MAX_GRADIENT_BYTES, one) if one <= MAX_GRADIENT_BYTES else 0.0
    return max(watched + kept, gradients, cost.holds)


def _costs(recipe: Recipe, model: Model, data: InputData) -> Iterator[Cost]:
    yield MEASURING
    if recipe.goal is not None and not recipe.steps:
        yield GOAL
    for step in recipe.steps:
        cost, count = _STEPS.get(_kind(step), _LIGHT), _rounds(step)
        tried = count * (TRIED_CUTS if step.technique == "prune" and step.config.min_cosine else 1)
        rotated = _may_rotate(step, model, data)
        tried *= ROTATED_FORMS if rotated else 1
        yield replace(
            cost,
            runs=tried * cost.runs,
            runs_per_sample=tried * cost.runs_per_sample,
            memory=cost.memory + rotated * ROTATED_COPIES,
            disk=count * cost.disk,
            makes=cost.makes + rotated * ROTATED_COPIES,
            holds=_held_by_rounding(step, model, data),
        )


def _held_by_rounding(step: Step, model: Model, data: InputData) -> int:
    """Where weights are rounded by the products of their inputs: of these, which are gathered batch by batch."""
    if step.technique != "quantize" or not rounds_by_data(step.config) or not data.can_be_fitted:
        return 0
    return Hessians(model, Context(data, Path()), holds_out=True).held_bytes


def _may_rotate(step: Step, model: Model, data: InputData) -> bool:
    """Whether both forms of the model may be prepared in full: where its streams can be rotated, and may gain by it."""
    if _kind(step) != "quantize static" or step.config.rotate != "auto" or not data.can_be_fitted:
        return False
    streams, _ = find_streams(model.clone(), sample_shapes(data))
    return bool(streams)


def _rounds(step: Step) -> int:
    """How often the step runs its pass."""
    return step.config.rounds if step.technique == "prune" and step.config.in_rounds else 1


def _epochs(step: Step) -> int:
    """Of training, in all."""
    if step.technique == "distill":
        return int(step.config.epochs)
    return int(step.config.epochs) * _rounds(step) if _rounds(step) > 1 else 0


def _learns(step: Step) -> bool:
    return step.technique == "quantize" and step.config.rounding in METHODS


def _copies(cost: Cost, model_bytes: int) -> float:
    """Of the weights, at the most."""
    if not is_large(model_bytes):
        return cost.memory
    if not cost.streams:
        return cost.memory if cost.large is None else cost.large
    pairs = fit_together((model_bytes, model_bytes))
    return min(cost.memory, 1.5 + SPARE_BYTES / model_bytes if pairs else 1.0 + NEW_WEIGHTS)


def _kind(step: Step) -> str:
    detail = getattr(step.config, "scheme", None) or getattr(step.config, "structure", "")
    return f"{step.technique} {detail}".rstrip()


def _one_run(path: Path, data: InputData) -> tuple[float, int]:
    """CPU seconds of one run for one sample, and bytes that it works in."""
    session = open_session(path)
    before = held_bytes()
    times_s = []
    for feed in list(data.feeds(1, limit=RUNS_TIMED * data.feed_size)) * RUNS_TIMED:
        began = time.thread_time()
        run(session, feed)
        times_s.append(time.thread_time() - began)
        if sum(times_s) > 5.0:
            break
    return min(times_s) / data.feed_size, max(0, held_bytes() - before)


def held_bytes() -> int:
    """What this process holds in memory now, mapped files not included."""
    try:
        _, resident, mapped = map(int, Path("/proc/self/statm").read_text("ascii").split()[:3])
        return (resident - mapped) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available_memory_bytes() -> int:
    """Of the machine, with what this process holds already."""
    pages = os.sysconf("SC_AVPHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        free = pages * os.sysconf("SC_PAGE_SIZE")
    return free + held_bytes()
