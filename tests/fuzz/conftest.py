"""Fuzzing of what parses strangers' bytes."""

from __future__ import annotations

import sys
from pathlib import Path

# The targets beside this file, and the writer of hostile archives; in importlib mode pytest puts neither on the path.
for folder in ("fuzz", "hostile", "server"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
