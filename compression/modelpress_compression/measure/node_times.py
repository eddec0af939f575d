"""How long each node of a model takes on this machine, by onnxruntime's profiler.

Nodes are timed as they are written, on one thread, since onnxruntime's own fusions would hide them in each other. Their
sum is therefore more than the model takes; it is for comparing the nodes of several models. The models take turns, so
that other work on the machine disturbs all of them alike; figures are medians over rounds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import onnxruntime as ort

from modelpress_compression.graph.read import label
from modelpress_compression.inputs import Feeds, InputData
from modelpress_compression.model import Model
from modelpress_compression.runtime import open_session, run

ROUNDS = 12
BUDGET_S = 3.0  # no further round begins after this
_WARM_UP_ROUNDS = 3
PROFILED_RUNS = _WARM_UP_ROUNDS + ROUNDS  # of each model, at most
_PROFILE_BYTES = 64 * 1024**2  # 64 MiB: of a loop that runs a great many times

NodeTimes = Mapping[str, float]  # milliseconds of one run, by the node's label


def node_times_ms(
    models: Sequence[Model], data: InputData, folder: Path, check_time: Callable[[], None] = lambda: None
) -> list[NodeTimes]:
    """The node times of each model, on the first sample; files go into `folder`.

    Raises ModelNotRunnableError, and what `check_time` raises.
    """
    feed = next(iter(data.feeds(1)))
    sessions = [_session(model, folder / f"node-times-{number}") for number, model in enumerate(models)]
    return [profile.ms for profile in profiles(sessions, feed, check_time)]


@dataclass(frozen=True)
class Profile:
    """What onnxruntime's profiler says of each kernel, by its name: the milliseconds of one run, and its arguments."""

    ms: NodeTimes
    arguments: Mapping[str, Mapping[str, object]]


def profiles(
    sessions: Sequence[ort.InferenceSession], feed: Feeds, check_time: Callable[[], None] = lambda: None
) -> list[Profile]:
    """Runs sessions that profile in turn. Times are medians over rounds; of a kernel that runs several times in a
    round, times how often it does. A profile that is too large to be read is empty. Raises ModelNotRunnableError, and
    what `check_time` raises."""
    began = time.monotonic()
    rounds = 0
    for number in range(PROFILED_RUNS):
        if number > _WARM_UP_ROUNDS and time.monotonic() - began > BUDGET_S:
            break
        for session in sessions:
            check_time()
            run(session, feed)
        rounds += 1
    return [_profile(Path(session.end_profiling()), rounds) for session in sessions]


def _session(model: Model, folder: Path) -> ort.InferenceSession:
    """A session that profiles, with nodes named as `label` names them."""
    copy = model.clone()
    for node in copy.nodes():
        node.name = label(node)
    folder.mkdir(parents=True, exist_ok=True)
    copy.save(folder / "model.onnx")
    return open_session(folder / "model.onnx", optimize=False, profile=folder / "times")


def _profile(path: Path, rounds: int) -> Profile:
    if path.stat().st_size > _PROFILE_BYTES:
        return Profile({}, {})
    times_us: dict[str, list[float]] = {}
    arguments: dict[str, Mapping[str, object]] = {}
    for event in json.loads(path.read_text("utf-8")):
        name, duration = str(event.get("name", "")), event.get("dur", 0)
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(duration, int | float):
            name = name.removesuffix("_kernel_time")
            times_us.setdefault(name, []).append(float(duration))
            arguments.setdefault(name, event.get("args", {}))
    return Profile({name: _of_a_run(times, rounds) / 1e3 for name, times in times_us.items()}, arguments)


def _of_a_run(times: Sequence[float], rounds: int) -> float:
    a_round = len(times) / rounds
    return median(times[round(_WARM_UP_ROUNDS * a_round) :] or times) * a_round
