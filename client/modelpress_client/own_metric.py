"""A metric of the user's own, computed on this machine: FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.

Each model is scored in a process of its own, so that a metric may hang, crash or take all memory and no more than that
one score is lost. Scores are kept between commands: who was interrupted does not score a model twice.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import importlib.util
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import platformdirs

from modelpress_client.errors import UsageError

DEFAULT_TIMEOUT_S = 600.0
_SHOWN_CHARS = 2000


class ScoreError(UsageError):
    """The metric gave no score for a model."""

    default_reason = "METRIC_FAILED"


@dataclass(frozen=True)
class Score:
    """What the metric says of one model."""

    value: float
    lower_is_better: bool

    def drop_from(self, original: Score) -> float:
        """By how much it is worse than the original; below 0: it is better."""
        return (self.value - original.value) * (1 if self.lower_is_better else -1)


@dataclass(frozen=True)
class OwnMetric:
    """`spec`: where the function is. `evaluation`: an .npz for it. `timeout_s`: for one model."""

    spec: str
    evaluation: Path | None = None
    timeout_s: float = DEFAULT_TIMEOUT_S

    @staticmethod
    def names_one(metric: str | None) -> bool:
        """Whether `--metric` means a function, not one of the server's metrics."""
        return metric is not None and ":" in metric

    def check(self) -> None:
        """Raises UsageError where there is no such file, function in it, or module, before anything is sent."""
        place, _, function = self.spec.rpartition(":")
        if not place or not function.isidentifier():
            raise UsageError(f"--metric {self.spec}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION.")
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise UsageError(f"--metric {self.spec}: there is no file {place}.")
            _check_defines(Path(place), function, f"--metric {self.spec}")
        elif _module_spec(place) is None:
            raise UsageError(f"--metric {self.spec}: there is no module {place} in this Python ({sys.executable}).")

    @property
    def name(self) -> str:
        """What reports call it: without folders."""
        place, _, function = self.spec.rpartition(":")
        return f"{Path(place).name if place.endswith('.py') else place}:{function}"

    @cached_property
    def _store(self) -> _Store:
        """Found once: the evaluation, which its name stands on, may be gigabytes."""
        return _Store.of(self)

    def known(self, digest: str) -> Score | None:
        """What it said of the model with this digest, in this command or an earlier one."""
        found = self._store.read().get(digest)
        return None if found is None else Score(**found)

    async def score(self, model: Path, digest: str) -> Score:
        """Of the ONNX file `model`, whose digest the server told. Raises ScoreError."""
        found = await self._run(model)
        if "error" in found:
            raise ScoreError(f"The metric {self.name} gave no score: {found['error']}.")
        score = Score(float(found["score"]), bool(found["lower_is_better"]))
        self._store.add(digest, score)
        return score

    def _arguments(self, model: Path, answer: Path) -> list[str]:
        evaluation = str(self.evaluation.absolute()) if self.evaluation else ""
        return [self.spec, str(model.absolute()), evaluation, str(answer)]

    async def _run(self, model: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="modelpress-metric-") as folder:
            answer = Path(folder) / "answer.json"
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "modelpress_client.scoring",
                *self._arguments(model, answer),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                async with asyncio.timeout(self.timeout_s):
                    printed, _ = await process.communicate()
            except TimeoutError:
                return {"error": f"it took more than {self.timeout_s:g} s (--metric-timeout)"}
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            if not answer.exists():
                shown = printed.decode(errors="replace")[-_SHOWN_CHARS:].strip()
                said = f"; the last that it printed: {shown}" if shown else ""
                return {"error": f"its process ended with code {process.returncode}{said}"}
            found: dict[str, Any] = json.loads(answer.read_text("utf-8"))
            return found


@dataclass(frozen=True)
class _Store:
    """Scores of one metric on one evaluation, in the user's cache."""

    path: Path

    @classmethod
    def of(cls, metric: OwnMetric) -> _Store:
        """A change of the metric's file, or of the evaluation, begins anew; what the file imports is not looked at."""
        place = metric.spec.rpartition(":")[0]
        digest = hashlib.sha256(metric.spec.encode())
        for file in (Path(place) if place.endswith(".py") else _module_file(place), metric.evaluation):
            digest.update(b"-" if file is None else hashlib.sha256(file.read_bytes()).digest())
        folder = platformdirs.user_cache_path("modelpress") / "scores"
        return cls(folder / f"{digest.hexdigest()[:32]}.json")

    def read(self) -> dict[str, Any]:
        """By the models' digests; a damaged file counts as none."""
        try:
            found = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def add(self, digest: str, score: Score) -> None:
        """Keeps a score; a cache that cannot be written costs time later, nothing else."""
        content = json.dumps(self.read() | {digest: {"value": score.value, "lower_is_better": score.lower_is_better}})
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(content, "utf-8")
            temporary.replace(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)


def _check_defines(file: Path, function: str, option: str) -> None:
    """Whether the file is Python, and has such a name in it; nothing in it is run. Raises UsageError."""
    try:
        content = file.read_bytes()
        tree = ast.parse(content)
    except (OSError, SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise UsageError(f"{option}: {file}{line} cannot be read as Python: {getattr(error, 'msg', error)}.") from None
    if not re.search(rf"\b{function}\b|import \*", content.decode(errors="replace")):
        there = ", ".join(item.name for item in tree.body if isinstance(item, ast.FunctionDef))
        raise UsageError(f"{option}: {file} has no function {function}; it has {there or 'none'}.")


def _module_spec(name: str) -> ModuleSpec | None:
    """Where the module is, looked for in the current folder first; None: nowhere."""
    sys.path.insert(0, "")
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    finally:
        sys.path.remove("")


def _module_file(name: str) -> Path | None:
    found = _module_spec(name)
    return Path(found.origin) if found is not None and found.origin and Path(found.origin).is_file() else None
