"""How long each node of a model takes on this machine, by onnxruntime's profiler.

Nodes are timed as they are written, on one thread, since onnxruntime's own fusions would hide them in each other. Their
sum is therefore more than the model takes; it is for comparing the nodes of several models. The models take turns, so
that other work on the machine disturbs all of them alike; figures are medians over rounds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import onnxruntime as ort

from modelpress_compression.graph.read import label
from modelpress_compression.inputs import InputData
from modelpress_compression.model import Model
from modelpress_compression.runtime import open_session, run

ROUNDS = 12
BUDGET_S = 3.0  # no further round begins after this
_WARM_UP_ROUNDS = 3

NodeTimes = Mapping[str, float]  # milliseconds of one run, by the node's label


def node_times_ms(
    models: Sequence[Model], data: InputData, folder: Path, check_time: Callable[[], None] = lambda: None
) -> list[NodeTimes]:
    """The node times of each model, on the first sample; files go into `folder`.

    Raises ModelNotRunnableError, and what `check_time` raises.
    """
    feed = next(iter(data.feeds(1)))
    sessions = [_session(model, folder / f"node-times-{number}") for number, model in enumerate(models)]
    began = time.monotonic()
    for number in range(_WARM_UP_ROUNDS + ROUNDS):
        if number > _WARM_UP_ROUNDS and time.monotonic() - began > BUDGET_S:
            break
        for session in sessions:
            check_time()
            run(session, feed)
    return [_medians_ms(json.loads(Path(session.end_profiling()).read_text("utf-8"))) for session in sessions]


def _session(model: Model, folder: Path) -> ort.InferenceSession:
    """A session that profiles, with nodes named as `label` names them."""
    copy = model.clone()
    for node in copy.nodes():
        node.name = label(node)
    folder.mkdir(parents=True, exist_ok=True)
    copy.save(folder / "model.onnx")
    return open_session(folder / "model.onnx", optimize=False, profile=folder / "times")


def _medians_ms(events: Sequence[Mapping[str, object]]) -> NodeTimes:
    times_us: dict[str, list[float]] = {}
    for event in events:
        name, duration = str(event.get("name", "")), event.get("dur", 0)
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(duration, int | float):
            times_us.setdefault(name.removesuffix("_kernel_time"), []).append(float(duration))
    return {name: median(times[_WARM_UP_ROUNDS:] or times) / 1e3 for name, times in times_us.items()}
