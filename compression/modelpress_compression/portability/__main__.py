"""The command: `python -m modelpress_compression.portability FILE [--data FILE.npz] ...`.

One JSON document is printed on stdout: what `verify` gives, or `{"error": {"reason", "message"}}` with exit code 2.
What is being done goes to stderr, a line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from modelpress_compression.errors import CompressionError
from modelpress_compression.portability.levels import LEVELS
from modelpress_compression.portability.verify import DEFAULT_SAMPLES, DEFAULT_VERSIONS, Wanted, verify

EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    wanted = Wanted(
        tuple(options.onnxruntime or DEFAULT_VERSIONS),
        tuple(options.cpu or LEVELS),
        options.qemu,
        options.samples,
        options.place_limit,
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tell = partial(print, flush=True)
            document = verify(options.path, options.data, wanted, options.cache, tell)
    except CompressionError as error:
        print(json.dumps({"error": {"reason": error.reason, "message": error.message}}))
        return EXIT_USAGE
    except OSError as error:
        message = f"{error.strerror or error}: {error.filename or ''}"
        print(json.dumps({"error": {"reason": "INVALID_INPUTS", "message": message}}))
        return EXIT_USAGE
    print(json.dumps(document))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m modelpress_compression.portability",
        description="Runs an ONNX file in other versions of onnxruntime and on other CPUs, and compares the answers.",
    )
    parser.add_argument("path", type=Path, metavar="FILE")
    parser.add_argument("--data", type=Path, metavar="FILE.npz", help="representative inputs; else made-up ones")
    parser.add_argument("--onnxruntime", action="append", metavar="VERSION", help="a version, or latest; repeatable")
    parser.add_argument("--cpu", action="append", choices=list(LEVELS), help="a CPU; repeatable")
    parser.add_argument("--qemu", action="store_true", help="emulate even what this CPU can stand in for")
    parser.add_argument("--samples", type=int, default=DEFAULT_SAMPLES, metavar="N")
    parser.add_argument("--place-limit", type=float, default=Wanted.place_limit_s, metavar="SECONDS")
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where environments are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
