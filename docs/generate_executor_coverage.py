"""Writes docs/executor_coverage.md: how each operator fares in ONNX's own backend node tests.

python docs/generate_executor_coverage.py            writes it
python docs/generate_executor_coverage.py --check    fails when it is not up to date
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
from modelpress_compression.executor.registry import find, supported_operators
from modelpress_compression.model import MAX_OPSET
from oracles import conformance

PAGE = Path(__file__).resolve().parent / "executor_coverage.md"
FIRST_OPSET = 11
_INTRODUCTION = """# Operators of the differentiable executor

Written by `docs/generate_executor_coverage.py` from the tests that ship in the `onnx` package ({version}): every node
test, with its inputs and its expected outputs, in the tolerances of the test. A case counts for the operator that it is
named after; expanded cases run an operator's function body. Of random operators only type and shape can be compared.
Where a case needs an operator or a version that is not implemented, it counts as unsupported.

| cases | passed | failed | unsupported |
|---|---|---|---|
| {total} | {passed} | {failed} | {unsupported} |

{standard} operators of `ai.onnx` are implemented, for opsets {first} to {last} (many for others as well), and
{microsoft} of `com.microsoft`, which ONNX has no tests for: those are tested against onnxruntime. Gradients are tested
against finite differences, a few cases for each family.
"""


def collect() -> dict[tuple[str, str], Counter[str]]:
    """Outcomes by operator."""
    outcomes: dict[tuple[str, str], Counter[str]] = {}
    for case in conformance.cases():
        outcomes.setdefault(conformance.operator_of(case), Counter())[conformance.check(case).status] += 1
    return outcomes


def render(outcomes: Mapping[tuple[str, str], Counter[str]]) -> str:
    """The page."""
    total: Counter[str] = sum(outcomes.values(), Counter())
    known = supported_operators()
    text = _INTRODUCTION.format(
        version=onnx.__version__,
        total=total.total(),
        passed=total["passed"],
        failed=total["failed"],
        unsupported=total["unsupported"],
        standard=sum(domain == "" for domain, _ in known),
        microsoft=sum(domain == "com.microsoft" for domain, _ in known),
        first=FIRST_OPSET,
        last=MAX_OPSET,
    )
    rows = [
        _row(domain, op_type, outcomes.get((domain, op_type), Counter()))
        for domain, op_type in sorted({*outcomes, *known})
    ]
    header = "| operator | domain | implemented | passed | failed | unsupported |\n|---|---|---|---|---|---|\n"
    return f"{text}\n{header}{''.join(rows)}"


def _row(domain: str, op_type: str, counts: Counter[str]) -> str:
    implemented = (
        "yes" if find(domain, op_type, MAX_OPSET if domain == "" else 1) is not None else _older(domain, op_type)
    )
    numbers = " | ".join(
        str(counts[status]) if counts.total() else "" for status in ("passed", "failed", "unsupported")
    )
    return f"| {op_type} | {domain or 'ai.onnx'} | {implemented} | {numbers} |\n"


def _older(domain: str, op_type: str) -> str:
    """Operators that ONNX has withdrawn: up to which opset they are implemented."""
    versions = [version for version in range(1, MAX_OPSET + 1) if find(domain, op_type, version) is not None]
    return f"to opset {versions[-1]}" if versions else "no"


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the table of the executor's operators.")
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    arguments = parser.parse_args()
    fresh = render(collect())
    if not arguments.check:
        PAGE.write_text(fresh, "utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text("utf-8") != fresh:
        print(
            "docs: executor_coverage.md is out of date; run python docs/generate_executor_coverage.py", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
