"""Prints one of README.md's copyable command lines, so that CI runs what people are told to run.

python3 .ci/readme_line.py test
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def readme_line(name: str, text: str) -> str:
    """The command in the `sh` block after `<!-- one-liner: NAME -->`. Raises SystemExit when it is not one line."""
    match = re.search(rf"<!-- one-liner: {re.escape(name)} -->\n```sh\n([^\n]+)\n```", text)
    if match is None:
        raise SystemExit(f"README.md has no one-line sh block after '<!-- one-liner: {name} -->'")
    return match[1]


if __name__ == "__main__":
    print(readme_line(sys.argv[1], README.read_text("utf-8")))
