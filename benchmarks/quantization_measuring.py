"""Figures of quantized models beside the float one: size, fidelity on held-out samples, task metric, latency."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from model_evaluation import evaluate
from modelpress_compression.errors import CompressionError
from modelpress_compression.inputs import Array, Feeds, InputData
from modelpress_compression.measure.feeds import batches, true_batch_size
from modelpress_compression.measure.fidelity import compare_outputs
from modelpress_compression.measure.latency import MIN_ROUNDS, time_interleaved
from modelpress_compression.runtime import open_session, run
from quantization_cases import Case, Prepared, file_digest
from quantization_contenders import OURS

FLOAT = "float32"
# A second session on the float model, timed as if it were a contender: how far from 1 chance alone goes.
CONTROL = "control"
HOPELESS = 2.5
# Part of the cached figures' names: raise it when anything here changes what they are.
VERSION = 2
Figures = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """`budget_s`: seconds for one model at one batch size, all contenders together."""

    rounds: int
    budget_s: float


def quality(case: Case, prepared: Prepared, path: Path, models: Path) -> Figures:
    """`fidelity` and `metric` of the model in `path`; taken from the cache where the files are the same."""
    pair = f"{VERSION} {prepared.digest} {file_digest(path)}".encode()
    kept = prepared.folder / "figures" / f"{hashlib.sha256(pair).hexdigest()[:32]}.json"
    if kept.exists():
        found: Figures = json.loads(kept.read_text("utf-8"))
        return found
    figures = {"fidelity": _fidelity(case, prepared, path), "metric": metric(case, path, models)}
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(figures), "utf-8")
    return figures


def metric(case: Case, path: Path, models: Path) -> float | None:
    """What the model's evaluation script says; None where there is none. Raises SystemExit where it fails."""
    if not case.metric:
        return None
    return float(evaluate(case.name, models, "--model", str(path), "--threads", "1"))


def _fidelity(case: Case, prepared: Prepared, path: Path) -> Figures:
    """Of the first output; `neighbours`: share of samples with the same nearest neighbour, `iou`: of the masks."""
    data = prepared.held_out()
    compared = compare_outputs(prepared.model, path, data)
    first = next(iter(compared.outputs.values()))
    figures: Figures = {
        **first.to_dict(),
        "top1_agreement": compared.top1_agreement,
        "expected_drop": compared.expected_drop,
        "notes": list(compared.notes),
    }
    if case.embeds:
        nearest = [_nearest(one, data) for one in (prepared.model, path)]
        figures["neighbours"] = float((nearest[0] == nearest[1]).mean())
    if case.classifies:
        top = [[output.argmax() for _, output in _first_output(one, data)] for one in (prepared.model, path)]
        figures["top1_agreement"] = float(np.equal(*top).mean())
    if case.mask_threshold is not None:
        masks = [_masks(one, data, case.mask_threshold) for one in (prepared.model, path)]
        figures["iou"] = float((masks[0] & masks[1]).sum() / max(1, (masks[0] | masks[1]).sum()))
    return figures


def _first_output(path: Path, data: InputData) -> list[tuple[Feeds, Array]]:
    session = open_session(path)
    return [(feed, next(iter(run(session, feed).values()))) for feed in data.feeds(1)]


def _nearest(path: Path, data: InputData) -> np.ndarray:
    """Index of each sample's nearest other one by the cosine of its token vectors' mean."""
    vectors = []
    for feed, tokens in _first_output(path, data):
        mask = feed["attention_mask"][..., None].astype(np.float64)
        vectors.append((tokens.astype(np.float64) * mask).sum(1)[0] / mask.sum())
    matrix = np.stack(vectors)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    similar = matrix @ matrix.T
    np.fill_diagonal(similar, -np.inf)
    nearest: np.ndarray = similar.argmax(1)
    return nearest


def _masks(path: Path, data: InputData, threshold: float) -> np.ndarray:
    return np.stack([np.asarray(output, np.float64) > threshold for _, output in _first_output(path, data)])


def latency(files: Mapping[str, Path], data: InputData, batch_size: int, timing: Timing) -> Figures | None:
    """Times all of `files` (name to model, FLOAT among them) in the same interleaved rounds, one thread each.

    None where the float model does not take batches of this size. `ratio`: time over that of the float model;
    `ours`: our time over theirs. What does not run on such a batch has an `error` instead. What takes more than
    HOPELESS times as long as the float model in each of the first six rounds is left out of the others, which it would
    make few.
    """
    if true_batch_size(data, batch_size) != batch_size:
        return None
    feed = batches(data, batch_size, 1)[0]
    errors = {name: error for name, path in files.items() if (error := _refusal(path, feed))}
    if FLOAT in errors:
        return None
    load_before = os.getloadavg()[0]
    paths = {FLOAT: files[FLOAT], CONTROL: files[FLOAT]}
    paths |= {name: path for name, path in files.items() if name != FLOAT and name not in errors}
    first = _interleaved(paths, data, batch_size, Timing(MIN_ROUNDS, timing.budget_s / 4))
    hopeless = {name for name, figures in first.items() if figures["ratio"]["low"] > HOPELESS and name != OURS}
    rest = {name: path for name, path in paths.items() if name not in hopeless}
    contenders: dict[str, Figures] = {name: {"error": error} for name, error in errors.items()}
    contenders |= first | _interleaved(rest, data, batch_size, timing)
    return {"load": [load_before, os.getloadavg()[0]], "contenders": contenders}


def _interleaved(paths: Mapping[str, Path], data: InputData, batch_size: int, timing: Timing) -> dict[str, Figures]:
    """`ratio` and `ours` of all in the same rounds; the first is the float model."""
    timings = time_interleaved(
        list(paths.values()), data, threads=1, batch_size=batch_size, rounds=timing.rounds, budget_s=timing.budget_s
    )
    names = list(paths)
    found = {}
    for index, name in enumerate(names):
        figures: Figures = {"ratio": asdict(timings.speedup(index, 0)), "p50_ms": timings.quantiles(index).p50_ms}
        figures |= {"rounds": timings.rounds, "runs_per_round": timings.runs_per_round[index]}
        if OURS in names:
            figures["ours"] = asdict(timings.speedup(names.index(OURS), index))
        found[name] = figures
    return found


def _refusal(path: Path, feed: Feeds) -> str:
    """Why the model does not run on this feed; empty where it does."""
    try:
        run(open_session(path), feed)
    except CompressionError as error:
        return str(error)[:300]
    return ""
