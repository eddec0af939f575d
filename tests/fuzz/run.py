"""Fuzzes for a while: the targets in turn, each with new examples in every round.

    python tests/fuzz/run.py --seconds 600
    python tests/fuzz/run.py --seconds 60 --target archive

Prints executions and crashes of each target; exit code 1 where there was a crash, after the example that caused it.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import HypothesisWarning

for folder in ("fuzz", "hostile", "server"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
from targets import TARGETS, Target, upload_server  # noqa: E402

ROUND = 100  # examples of a target before it is the next one's turn


def fuzz(target: Target, deadline_s: float) -> tuple[int, str]:
    """Executions of one round, and the traceback of a crash with its smallest example."""
    executions = 0

    @settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        derandomize=False,
    )
    @given(target.values)
    def body(value: object) -> None:
        nonlocal executions
        if time.monotonic() > deadline_s:
            return
        executions += 1
        target.run(value)

    try:
        body()
    except Exception:  # noqa: BLE001  whatever comes out of a target is what this is looking for
        return executions, traceback.format_exc()
    return executions, ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes what parses strangers' bytes.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append")
    options = parser.parse_args()
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", HypothesisWarning)  # of its own pains with printing large examples
    names, deadline_s = options.target or list(TARGETS), time.monotonic() + options.seconds
    executions: Counter[str] = Counter()
    crashes: dict[str, str] = {}
    while time.monotonic() < deadline_s and len(crashes) < len(names):
        for name in names:
            if name not in crashes and time.monotonic() < deadline_s:
                count, crash = fuzz(TARGETS[name], deadline_s)
                executions[name] += count
                if crash:
                    crashes[name] = crash
                    print(f"{name}:\n{crash}", file=sys.stderr)
    for name in names:
        outcome = f"a crash: {crashes[name].strip().splitlines()[-1]}" if name in crashes else "no crash"
        print(f"{name}: {executions[name]} executions, {outcome}")
    print(f"{executions.total()} executions, {len(crashes)} crashes")
    if upload_server.cache_info().currsize:
        upload_server().close()
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
