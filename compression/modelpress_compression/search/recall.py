"""What earlier jobs on the same model and data have found out, so that another question about them is answered soon.

    candidates     the models that passes made, each by the file that it was made from and what was asked of the pass
    comparisons    how far a file's outputs are from the original's, by the file
    metrics        a file's task metric, by the file and the labels
    orders         which layers go back to float32 first
    prices         times of files, as ratios to the original's in the same rounds

All of it stands below one digest of the original's file, the data, the code of the engine, and the machine with its
libraries: another of any of these, and nothing is found. Limits and goals are no part of it, since they only judge what
was measured. Prices choose; what they have chosen is measured again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from modelpress_compression.backends.base import Backend
from modelpress_compression.measure.accuracy import Evaluation
from modelpress_compression.measure.fidelity import Fidelity
from modelpress_compression.measure.latency import Times
from modelpress_compression.measure.task import Labelled, Task, model_digest
from modelpress_compression.memory import Entry, Memory, key_of
from modelpress_compression.model import data_path_of, read_ir
from modelpress_compression.passes.base import Context, Skip
from modelpress_compression.report.environment import environment
from modelpress_compression.search.steps import StepRecord

Ratios = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Prices:
    """`times_s` [models, rounds]; `remembered`: whether any of them come from an earlier job."""

    times_s: Times
    remembered: bool = False

    def then(self, more: Prices) -> Prices:
        """With the rounds of the same models that followed."""
        return Prices(np.concatenate([self.times_s, more.times_s], axis=1), self.remembered or more.remembered)


@dataclass(frozen=True)
class Recall:
    """`scope`: the digest that everything stands below. `reused`: how much of each kind earlier jobs had found out;
    `own`: keys of what this one has."""

    memory: Memory | None = None
    scope: str = ""
    reused: Counter[str] = field(default_factory=Counter)
    own: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, memory: Memory | None, original: Path, context: Context) -> Recall:
        """What is remembered of the model in the file `original` on the context's data."""
        if memory is None:
            return cls()
        parts = (model_digest(original), context.data.digest, context.target.to_dict())
        return cls(memory, key_of(*parts, _code_digest(), environment()))

    def facts(self, kind: str, parts: Sequence[object], make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """What `make` gives, or gave earlier: what JSON can hold. `parts`: all that it depends on."""
        if self.memory is None:
            return make()
        key = key_of(self.scope, kind, *parts)
        entry = self.memory.get(key)
        if entry is not None:
            self.reused[kind] += key not in self.own
            return entry.facts
        found = make()
        self.memory.put(key, found)
        self.own.add(key)
        return found

    def step(
        self, before: StepRecord, parts: Sequence[object], target: Path, make: Callable[[], StepRecord]
    ) -> StepRecord:
        """The record that `make` gives for the model of `before`, with its file in `target` where it was changed.

        `parts`: all that the result depends on, besides that model and the configuration of the step.
        """
        if self.memory is None:
            return make()
        step = before.step
        key = key_of(self.scope, "step", model_digest(before.path), step.technique, step.config.to_dict(), *parts)
        entry = self.memory.get(key)
        if entry is not None and (record := _restored(entry, before, target)) is not None:
            self.reused["candidates"] += key not in self.own
            return record
        record = make()
        self.own.add(key)
        self.memory.put(key, _facts_of(record), _files_of(target) if record.path == target else ())
        return record

    def fidelity(self, path: Path, parts: Sequence[object], make: Callable[[], Fidelity]) -> tuple[Fidelity, bool]:
        """How far the outputs of the model in `path` are from the original's, and whether that was remembered.

        `parts`: the samples and limits.
        """
        if self.memory is None:
            return make(), False
        before = self.reused["comparisons"]
        found = self.facts("comparisons", [model_digest(path), *parts], lambda: asdict(make()))
        return Fidelity.from_facts(found), self.reused["comparisons"] > before

    def evaluation(self, task: Task, path: Path, backend: Backend) -> Evaluation:
        """The figure of the model in `path`; that of a user's own metric, of which nothing is known, is not kept."""
        if self.memory is None or not isinstance(task, Labelled):
            return task.evaluate(path, backend)
        parts = [model_digest(path), task.data.digest, task.metric, backend.label]
        return Evaluation(**self.facts("metrics", parts, lambda: asdict(task.evaluate(path, backend))))

    def prices(
        self,
        paths: Sequence[Path],
        parts: Sequence[object],
        timed: Callable[[Sequence[Path]], Times],
        *,
        anew: bool = False,
    ) -> Prices:
        """Times of the original, at place 0, and of the models in `paths`.

        `timed`: times of the original and of some of them, in the same rounds. Those that ran in earlier rounds stand
        with their ratio to the original there; the others run now. `anew`: what was remembered does not count.
        """
        if self.memory is None:
            return Prices(timed(paths))
        key = key_of(self.scope, "prices", *parts)
        entry = None if anew else self.memory.get(key)
        known: dict[str, Times] = {} if entry is None else _ratios(entry.facts)
        digests = [model_digest(path) for path in paths]
        new = [place for place, digest in enumerate(digests) if digest not in known]
        if entry is not None and not new:
            original_s = np.asarray(entry.facts["original_s"], np.float64)
        else:
            times_s = timed([paths[place] for place in new])
            original_s = times_s[0]
            known |= {digests[place]: one_s / original_s for place, one_s in zip(new, times_s[1:], strict=True)}
            ratios = {digest: ratio.tolist() for digest, ratio in known.items()}
            self.memory.put(key, {"original_s": original_s.tolist(), "ratios": ratios})
        if len(new) < len(paths):
            self.reused["prices"] += len(paths) - len(new)
        rounds = min([len(original_s), *(len(known[digest]) for digest in digests)])
        rows = [original_s[:rounds], *(known[digest][:rounds] * original_s[:rounds] for digest in digests)]
        return Prices(np.asarray(rows, np.float64), len(new) < len(paths))


def _ratios(facts: Mapping[str, Any]) -> dict[str, Times]:
    return {digest: np.asarray(ratio, np.float64) for digest, ratio in facts["ratios"].items()}


def _files_of(path: Path) -> list[Path]:
    return [file for file in (path, data_path_of(path)) if file.exists()]


def _facts_of(record: StepRecord) -> dict[str, Any]:
    return {
        "changes": record.changes,
        "skipped": [[skip.node, skip.reason] for skip in record.skipped],
        "warnings": list(record.warnings),
        "details": [dict(row) for row in record.details],
        "notes": list(record.notes),
        "has_model": bool(record.changes),
    }


def _restored(entry: Entry, before: StepRecord, target: Path) -> StepRecord | None:
    """The record as it was; None: its model is damaged."""
    facts = entry.facts
    record = replace(
        before,
        changes=dict(facts["changes"]),
        skipped=tuple(Skip(*skip) for skip in facts["skipped"]),
        warnings=tuple(facts["warnings"]),
        details=tuple(facts["details"]),
        notes=tuple(facts["notes"]),
    )
    if not facts["has_model"]:
        return record
    if not entry.extract(target.parent) or not target.exists():
        return None
    return replace(record, model=replace(before.model, ir=read_ir(target)), path=target)


@cache
def _code_digest() -> str:
    """Of all that the engine is: what other code found out is not what this one would."""
    digest = hashlib.sha256()
    for path in sorted(_sources(files("modelpress_compression")), key=str):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(folder: Traversable) -> list[Traversable]:
    found = []
    for item in folder.iterdir():
        if item.is_dir():
            found += _sources(item)
        elif item.name.endswith(".py"):
            found.append(item)
    return found
