"""How long each node of a model takes on this machine, by onnxruntime's profiler, without its fusions, which would hide
nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import onnxruntime as ort

from modelpress_compression.analysis.graph import label
from modelpress_compression.inputs import Feeds
from modelpress_compression.model import Model
from modelpress_compression.runtime import EXECUTION_PROVIDER, explain

PROFILED_RUNS = 12
_WARM_UP_RUNS = 3


def node_times_ms(model: Model, feed: Feeds, work_directory: Path, runs: int = PROFILED_RUNS) -> dict[str, float]:
    """Median milliseconds of one run of each node on one thread, by its label. Raises ModelNotRunnableError."""
    copy = model.clone()
    for node in copy.nodes():
        node.name = label(node)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.log_severity_level = 4
    with TemporaryDirectory(prefix="profile-", dir=work_directory) as folder:
        path = Path(folder) / "model.onnx"
        copy.save(path)
        options.profile_file_prefix = str(Path(folder) / "times")
        try:
            session = ort.InferenceSession(str(path), options, providers=[EXECUTION_PROVIDER])
            names = {value.name for value in session.get_inputs()}
            for _ in range(_WARM_UP_RUNS + runs):
                session.run(None, {key: array for key, array in feed.items() if key in names})
            profile = Path(session.end_profiling())
        except Exception as error:  # onnxruntime raises a dozen unrelated classes, all mean the same here
            raise explain(error) from error
        return _median_times_ms(json.loads(profile.read_text("utf-8")))


def _median_times_ms(events: Sequence[Mapping[str, object]]) -> dict[str, float]:
    times_us: dict[str, list[float]] = {}
    for event in events:
        name, duration = str(event.get("name", "")), event.get("dur", 0)
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(duration, int | float):
            times_us.setdefault(name.removesuffix("_kernel_time"), []).append(float(duration))
    return {name: median(times[_WARM_UP_RUNS:] or times) / 1e3 for name, times in times_us.items()}
