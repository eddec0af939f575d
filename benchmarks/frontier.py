"""The front of our candidates beside the points of other tools, on real models: size, latency and task metric.

    python benchmarks/frontier.py --models DIR [--cache DIR] [--tools DIR] [--labelled DIR] [--only NAME ...]
                                  [--skip TOOL ...] [--jobs NAME ...] [--search-time S] [--without POINT ...]
                                  [--points-only | --time-only | --render]

DIR holds trained models and one `eval_NAME.py` for each, as for real_models.py. Every tool works in an environment of
its own (frontier_tools.py), every point in a process of its own; all take the same ONNX file and the same calibration
inputs. Ours are the models that jobs for each goal let be downloaded (frontier_ours.py); where --labelled has data of a
model, also those of jobs with labels, which the page names as such.

Points and their metrics stay in the cache and are made again only when what they depend on has changed; --points-only
stops there. Times are measured anew, all points of a model in one process and in the same interleaved rounds:
--time-only does just that, with what the cache has, and belongs on an idle machine, as in
`taskset -c 1 python benchmarks/frontier.py --models DIR --time-only`.

Figures are gathered in docs/frontier.json, a model at a time; docs/frontier.md is written from them (`--render`: that
alone).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from frontier_ours import JOBS, OURS, kept_goals, kept_points, our_points
from frontier_page import page
from frontier_times import FLOAT, figures_of
from frontier_tools import TOOLS, Installed, NotInstalledError, Outcome, installed, kept_outcomes, made_by, not_made
from modelpress_compression.measure.latency import MIN_ROUNDS
from modelpress_compression.measure.task import model_digest
from modelpress_compression.model import file_size_bytes
from modelpress_compression.report.environment import environment
from quantization_cases import Case, Prepared, cases, prepare
from quantization_measuring import metric
from quantization_process import GIB, Limits

DOCS = Path(__file__).resolve().parents[1] / "docs"
OUR_TIME = 6  # times the limit of one point: a job makes ten
RESULTS = DOCS / "frontier.json"
PAGE = DOCS / "frontier.md"


def say(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def environments(arguments: argparse.Namespace) -> tuple[list[Installed], dict[str, str]]:
    """The tools that are there, and why the others are not."""
    found, missing = [], {}
    for tool in TOOLS:
        if tool.name in arguments.skip:
            continue
        try:
            found.append(installed(tool, arguments.tools))
        except NotInstalledError as error:
            missing[tool.name] = str(error)
            say(f"{tool.label} could not be installed: {error}")
    return found, missing


def make_points(case: Case, prepared: Prepared, tools: list[Installed], arguments: argparse.Namespace) -> None:
    """All points of a model into the cache, with the metrics that decide."""
    limits = Limits(arguments.timeout, int(arguments.memory * GIB))
    for job in JOBS if OURS not in arguments.skip else ():
        if arguments.jobs and job.name not in arguments.jobs:
            continue
        labelled = arguments.labelled / f"{case.name}.npz" if job.labels and arguments.labelled else None
        if job.labels and not (labelled and labelled.exists()):
            continue
        bounds = Limits(arguments.timeout * OUR_TIME, limits.memory_bytes)
        outcome = our_points(job.within(arguments.search_time), prepared, bounds, labelled)
        say(f"{case.name}: ours, {job.name}: {outcome['outcome']} {outcome['error']} {outcome['wall_s']:.0f} s")
    for one in tools:
        outcomes = made_by(one, prepared, limits, without=arguments.without)
        good = sum(outcome["outcome"] == "ok" for outcome in outcomes)
        say(f"{case.name}: {one.tool.label}: {good} of {len(one.labels)} points")
    # A rough measurement finds out whose metrics are needed: they are then in the cache.
    measure(case, prepared, MIN_ROUNDS, arguments.budget / 10, arguments)


def judged(case: Case, prepared: Prepared, outcome: Outcome, models: Path, *, ask: bool = True) -> Outcome:
    """The outcome with size and metric; "does not run" where the model does not.

    `ask`: whether to evaluate a file that was not evaluated yet, which takes longest of all; else its metric is None.
    """
    if outcome["outcome"] != "ok":
        return outcome
    path = Path(outcome["file"])
    outcome = outcome | {"size_bytes": file_size_bytes(path), "metric": None}
    kept = prepared.folder / "front" / "metrics" / f"{model_digest(path)}.json"
    if not kept.exists():
        if not ask:
            return outcome
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(_evaluated(case, path, models)), "utf-8")
        say(f"{case.name}: {outcome['tool']}, {outcome['name']}: {kept.read_text('utf-8')[:200]}")
    return outcome | json.loads(kept.read_text("utf-8"))


def _evaluated(case: Case, path: Path, models: Path) -> Outcome:
    try:
        return {"metric": metric(case, path, models)}
    except SystemExit as error:
        return {"outcome": "does not run", "error": " ".join(str(error).split())[-300:]}


def measure(case: Case, prepared: Prepared, rounds: int, budget_s: float, arguments: argparse.Namespace) -> Outcome:
    """All figures of one model."""

    def judge(outcome: Outcome) -> Outcome:
        return judged(case, prepared, outcome, arguments.models)

    itself = {"tool": FLOAT, "name": "the model itself", "outcome": "ok", "error": "", "file": str(prepared.model)}
    mine = [judge(outcome) for outcome in (itself, *kept_points(prepared))]
    theirs = [
        judged(case, prepared, outcome, arguments.models, ask=arguments.all_metrics)
        for outcome in kept_outcomes(prepared)
    ]
    say(f"{case.name}: timing {sum(one['outcome'] == 'ok' for one in (*mine, *theirs))} points")
    return {
        "metric_name": case.metric,
        "goals": kept_goals(prepared),
        "not_made": not_made(prepared),
        "environment": environment() | {"measured_on": datetime.date.today().isoformat()},
        **figures_of(
            [*mine, *theirs], prepared.held_out(), rounds, budget_s, int(arguments.session_memory * GIB), judge
        ),
    }


def write(results: dict[str, Any]) -> None:
    """Both files; the page says what the figures in the file say."""
    rounded = _rounded(results)
    RESULTS.write_text(_as_lines(rounded), "utf-8")
    PAGE.write_text(page(rounded), "utf-8")


def _as_lines(results: dict[str, Any]) -> str:
    """JSON with a line for each point."""
    models = []
    for name, model in results["models"].items():
        about = json.dumps({key: value for key, value in model.items() if key != "points"})
        points = ",\n".join(json.dumps(point) for point in model["points"])
        models.append(f'{json.dumps(name)}: {about[:-1]}, "points": [\n{points}\n]}}')
    missing = json.dumps(results.get("missing", {}))
    return f'{{"missing": {missing},\n"models": {{\n' + ",\n".join(models) + "}}\n"


def _rounded(value: Any) -> Any:
    """Five significant digits are more than any of it is worth; whole numbers stay."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our front beside the points of other tools.")
    temporary = Path(tempfile.gettempdir())
    parser.add_argument("--models", type=Path, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--cache", type=Path, default=temporary / "modelpress-frontier")
    parser.add_argument("--tools", type=Path, default=temporary / "modelpress-frontier-tools", help="environments")
    parser.add_argument("--labelled", type=Path, help="folder of NAME.npz, labelled data as for --eval")
    parser.add_argument("--only", nargs="*", default=[], help="parts of models' names")
    parser.add_argument("--skip", nargs="*", default=[], help="tools to leave out, or ours")
    parser.add_argument("--jobs", nargs="*", default=[], help="of ours, if not all")
    parser.add_argument("--search-time", type=float, help="seconds of search for each of our jobs, if not all it takes")
    parser.add_argument("--without", nargs="*", default=[], metavar="TOOL:POINT", help="points of theirs not to make")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one point")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of resident memory for one point")
    parser.add_argument(
        "--session-memory", type=float, default=16.0, help="GiB for all sessions at once; with less they take turns"
    )
    parser.add_argument("--rounds", type=int, default=200, help="most timed rounds")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of timing for a model")
    parser.add_argument("--all-metrics", action="store_true", help="evaluate also what is matched whatever it loses")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--points-only", action="store_true", help="make points and metrics, and stop")
    which.add_argument("--time-only", action="store_true", help="time what the cache has, and make nothing")
    which.add_argument("--render", action="store_true", help="write the page from the gathered figures, and stop")
    arguments = parser.parse_args()
    if not arguments.render and arguments.models is None:
        parser.error("--models is needed")
    arguments.tools = arguments.tools.resolve()
    return arguments


def gathered() -> dict[str, Any]:
    """The figures so far."""
    results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {"models": {}}
    return results


def main() -> None:
    arguments = _parse()
    if not arguments.render:
        run(arguments)
    if not arguments.points_only:
        write(gathered())


def run(arguments: argparse.Namespace) -> None:
    """Points, unless they are only to be timed; then times, unless points are all that is asked for."""
    arguments.models = arguments.models.resolve()
    tools: list[Installed] = []
    if not arguments.time_only:
        tools, missing = environments(arguments)
        (arguments.cache / "missing.json").parent.mkdir(parents=True, exist_ok=True)
        (arguments.cache / "missing.json").write_text(json.dumps(missing), "utf-8")
    for case in cases(["real"], arguments.only, arguments.cache.resolve()):
        prepared = prepare(case, arguments.models, arguments.cache.resolve())
        try:
            if not arguments.time_only:
                make_points(case, prepared, tools, arguments)
            if arguments.points_only:
                continue
            measured = measure(case, prepared, arguments.rounds, arguments.budget, arguments)
        except Exception as error:  # noqa: BLE001 - one model that fails must not hide the others
            say(f"{case.name}: FAILED: {type(error).__name__}: {error}")
            continue
        results = gathered()  # read only now: another run may have gone through another model meanwhile
        results["models"][case.name] = measured
        results["missing"] = json.loads((arguments.cache / "missing.json").read_text("utf-8"))
        write(results)


if __name__ == "__main__":
    main()
