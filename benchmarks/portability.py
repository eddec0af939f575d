"""Where results answer as they do here: docs/portability.md, a row for each result and a column for each place.

    python benchmarks/portability.py --models DIR --cache DIR [--page FILE] [--only NAME ...] [--form FORM ...]
                                     [--samples N] [--qemu NAME ...] [--built] [--onnxruntime VERSION ...]
                                     [--cpu CPU ...]

Results are those of portability_results.py, kept in the folder `--cache`, as the environments are and what was seen in
each place; --built takes those results that lie there and makes none. docs/portability.json keeps what the page says:
what is not run stays as it is there, unless a result is another file now. --qemu: models whose results are run under
QEMU's Haswell besides, to hold the one way of standing in for a CPU against the other; it takes minutes for each. Needs
modelpress[verify], qemu-user, pip and apt.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modelpress_compression.portability import Wanted, verify
from portability_results import CASES, FORMS, Case, build, path_of, samples_of

KEPT = Path(__file__).parents[1] / "docs" / "portability.json"
VERSIONS = ("1.18.1", "1.20.1", "1.22.1", "1.24.4", "1.27.0", "latest")
CPUS = ("haswell", "skylake-x", "ice-lake", "aarch64")
PLACE = ("place", "kind", "verdict", "detail", "sqnr_db", "top1_agreement")  # what the page has of one
PAGE = """# Portability

Whether a result answers on another machine as it did where it was made. One file can answer otherwise there for two
reasons: kernels add up in another order, which moves floats by their last digits, and, on x86 CPUs without VNNI, sums
of two products of 8 bits saturate at 16 bits, which changes answers. Against the second 8-bit layers carry a
certificate, or give up resolution until they can ([quantization.md](quantization.md)); this page is the test of it.

```
compress-client verify model.optimized.onnx --data samples.npz
```

runs a file in other versions of onnxruntime and on other CPUs, and exits with 6 where it answers otherwise. It asks
no server: a result is yours to run. `pip install 'modelpress[verify]'` where it runs.

| verdict | means |
|---|---|
| equal | the same numbers, bit for bit but for the signs of zeros |
| close | no further apart than rounding takes it (see below) |
| differs | further apart |
| refused | onnxruntime does not load or run the file there |
| not had | there is no such place here; the command says what is missing |

Rounding may move a float by 0.1 % of itself and 0.01 % of the output's largest; in models that compute in 8 bits by 3
% of the largest, since a sum that is rounded the other way is one step in 255 away, and that goes on through the
layers.

## Places

- **Versions**: `--onnxruntime VERSION`, each installed by pip for this Python in an environment of its own, which is
  kept in the user's cache.
- **x86 CPUs**: onnxruntime chooses its kernels by the instruction `cpuid`. In a copy of it `cpuid` is replaced by an
  instruction that traps, and answered without the features that the other CPU lacks. The same kernels then run as
  there, at full speed: Haswell (AVX2), Skylake-X (AVX-512 without VNNI) and Ice Lake (with VNNI), as far as this CPU
  has what they have. QEMU, which translates instructions, knows no AVX-512 up to today: its Skylake and Ice Lake
  models are AVX2 CPUs. `--qemu` takes it all the same, for Haswell.
- **AArch64**: a Neoverse N1 by qemu-aarch64, with a Python from Debian's packages and onnxruntime's wheel, unpacked
  and not installed. It is slow: a run takes tens of times as long. (onnxruntime reads `/proc/cpuinfo` there and
  crashes on that of an x86 host; the environment has one of its own.)

A product whose pairs saturate (255 · 127 + 255 · 127) is told by these means: equal on Ice Lake, other numbers on
Haswell and Skylake-X, and the same numbers under QEMU's Haswell.

## Results

"""


def cell(place: dict[str, Any]) -> str:
    """A verdict, with its distance where answers are not equal."""
    verdict = str(place["verdict"])
    if verdict not in ("close", "differs"):
        return verdict
    far = "" if place["sqnr_db"] is None else f" {place['sqnr_db']:.0f} dB"
    changed = place["top1_agreement"]
    classes = "" if changed in (None, 1.0) else f", {1 - changed:.1%} other classes"
    return f"{verdict}{far}{classes}"


def documents(options: argparse.Namespace) -> Iterator[tuple[Case, str, dict[str, Any]]]:
    """What `verify` says of each result; kept beside it."""
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        if not options.built:
            for problem in build(case, options.models.resolve(), options.cache, options.form):
                print(problem, flush=True)
        for form in options.form:
            path = path_of(options.cache, case, form)
            if path.exists():
                yield case, form, seen(case, path, options)


def seen(case: Case, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The document of a result. What was seen in a place is kept beside the file, and not run again."""
    kept = path.with_suffix(".verified.json")
    document: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.exists() else {"rows": {}}
    for emulated in (False, True) if case.name in options.qemu else (False,):
        places = {"versions": options.onnxruntime, "levels": options.cpu}
        if emulated:
            places = {"versions": (), "levels": ("haswell",)}
        end = " emulated" if emulated else ""
        missing = {
            kind: tuple(name for name in names if f"{kind} {name}{end}" not in document["rows"])
            for kind, names in places.items()
        }
        if not any(missing.values()):
            continue
        wanted = Wanted(**missing, emulated=emulated, samples=options.samples)
        found = verify(path, samples_of(options.cache, case), wanted, options.cache / "environments")
        keys = [f"{kind} {name}{end}" for kind, names in missing.items() for name in names]
        rows = dict(zip(keys, found.pop("places"), strict=True))
        document = {**document, **found, "rows": document["rows"] | rows}
        kept.write_text(json.dumps(document, indent=1), "utf-8")
    rows, order = document["rows"], [f"versions {name}" for name in VERSIONS] + [f"levels {name}" for name in CPUS]
    order += [key for key in rows if key not in order]
    return {**document, "places": [rows[key] for key in order if key in rows]}


def merged(found: Sequence[tuple[Case, str, dict[str, Any]]]) -> list[tuple[Case, str, dict[str, Any]]]:
    """With what the file has of results and places that were not run now; the file has all of it then."""
    kept: dict[str, dict[str, Any]] = json.loads(KEPT.read_text("utf-8"))
    for case, form, document in found:
        key = f"{case.name}, {form}"
        before = kept.get(key, document)
        same = before["sha256"] == document["sha256"]
        places = {place["place"]: place for place in (before["places"] if same else [])}
        places |= {place["place"]: place for place in document["places"]}
        kept[key] = {name: document[name] for name in ("sha256", "samples", "here")} | {
            "places": [{name: place[name] for name in PLACE} for place in places.values()]
        }
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    names = [(case, form, f"{case.name}, {form}") for case in CASES for form in FORMS]
    return [(case, form, kept[key]) for case, form, key in names if key in kept]


def table(found: Sequence[tuple[Case, str, dict[str, Any]]]) -> Iterator[str]:
    """The matrix; a place that one result alone was run in has an empty cell for the others."""
    names = sorted({place["place"] for _, _, document in found for place in document["places"]}, key=_order)
    yield "| result | " + " | ".join(name.replace("onnxruntime ", "ort ") for name in names) + " |"
    yield "|---" * (len(names) + 1) + "|"
    for case, form, document in found:
        cells = {place["place"]: cell(place) for place in document["places"]}
        yield f"| {case.name}, {form} | " + " | ".join(cells.get(name, "") for name in names) + " |"


def _order(name: str) -> tuple[bool, list[int], int]:
    """Versions by number, then CPUs as they are listed, then what else there is."""
    numbers = [int(part) for part in name.removeprefix("onnxruntime ").split(".") if part.isdecimal()]
    return not name.startswith("onnxruntime"), numbers, CPUS.index(name) if name in CPUS else len(CPUS)


def summary(found: Sequence[tuple[Case, str, dict[str, Any]]]) -> str:
    """What the table says, counted."""
    lines = []
    for name, title in (("version", "versions of onnxruntime"), ("cpu", "other CPUs")):
        verdicts = [
            place["verdict"] for _, _, document in found for place in document["places"] if place["kind"] == name
        ]
        counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(sorted(verdicts)))
        lines.append(f"Runs in {title}: {counts}.")
    return " ".join(lines)


def remarks(found: Sequence[tuple[Case, str, dict[str, Any]]]) -> Iterator[str]:
    """Reasons of cells that are neither equal nor close, each once."""
    said: set[str] = set()
    for case, form, document in found:
        for place in document["places"]:
            text = f"{place['place']}: {place['verdict']}: {place['detail']}"
            if place["verdict"] in ("differs", "refused", "not had") and text not in said:
                said.add(text)
                yield f"- {case.name}, {form}, {text}"


def page(found: Sequence[tuple[Case, str, dict[str, Any]]]) -> str:
    """docs/portability.md."""
    here = found[0][2]["here"]
    samples = sorted({document["samples"] for _, _, document in found})
    intro = (
        f"Compared with onnxruntime {here['onnxruntime']} on {here['cpu']} ({', '.join(here['instructions'])}), on "
        f"{' or '.join(map(str, samples))} representative samples of each model. `float32` is the model with its "
        "operators fused alone: how far places are apart whatever is done. `static` and `weight_only` are those "
        "schemes of 8 bits, `goal` is what a job gives that asks for nothing. dB: the signal over the difference, of "
        "the worst output. A place that a result was not run in has an empty cell."
    )
    notes = "\n".join(remarks(found))
    reasons = f"\nWhat stands behind other verdicts:\n\n{notes}\n" if notes else ""
    made = "\nMade by `python benchmarks/portability.py`.\n"
    intro = textwrap.fill(intro, 118, break_long_words=False, break_on_hyphens=False)
    return f"{PAGE}{intro}\n\n" + "\n".join(table(found)) + f"\n\n{summary(found)}\n{reasons}{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Where results answer as they do here.")
    parser.add_argument("--models", type=Path, required=True, help="folder with the models and their eval_NAME.py")
    parser.add_argument("--cache", type=Path, required=True, help="folder for results and environments")
    parser.add_argument("--page", type=Path, help="where the page goes; without it the table is printed alone")
    parser.add_argument("--only", nargs="*", default=[], help="names of the models")
    parser.add_argument("--form", nargs="*", default=list(FORMS), choices=FORMS, help="the results of each model")
    parser.add_argument("--qemu", nargs="*", default=[], help="names of models to run under QEMU's Haswell, too")
    parser.add_argument("--onnxruntime", nargs="*", default=VERSIONS, help="versions to run in")
    parser.add_argument("--cpu", nargs="*", default=CPUS, choices=CPUS, help="CPUs to run on")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--built", action="store_true", help="make no results")
    options = parser.parse_args()
    found = list(documents(options))
    print("\n".join(table(found)))
    if options.page:
        options.page.write_text(page(merged(found)), "utf-8")


if __name__ == "__main__":
    main()
