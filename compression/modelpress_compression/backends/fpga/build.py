"""From a network to a design that is proven and measured: what `Fpga.build` does, step by step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from modelpress_compression.backends.base import BuildRequest, Built
from modelpress_compression.backends.fpga import forms, hls, project
from modelpress_compression.backends.fpga.choice import Chosen, DropOf, choose
from modelpress_compression.backends.fpga.emulator import Design, check_exact, run, sum_bits
from modelpress_compression.backends.fpga.estimate import Estimate, estimate
from modelpress_compression.backends.fpga.folded import FoldedDesign, build_folded, stream_through
from modelpress_compression.backends.fpga.formats import Reals
from modelpress_compression.backends.fpga.gates import Netlist
from modelpress_compression.backends.fpga.network import Network, read_network
from modelpress_compression.backends.fpga.parallel import ParallelDesign, build_parallel
from modelpress_compression.backends.fpga.parts import PARTS, Part
from modelpress_compression.backends.fpga.search import (
    LEAST_SAMPLES,
    Loss,
    cost,
    is_large,
    loss_of,
)
from modelpress_compression.backends.fpga.synthesis import (
    Resources,
    Routed,
    gates_as_written,
    gates_synthesized,
    place_and_route,
    stream,
    synthesize,
    unstream,
    write_sources,
)
from modelpress_compression.backends.fpga.tools import YOSYS, ToolError, is_ready
from modelpress_compression.errors import InvalidDataError, TimeLimitError, UnsupportedOperatorError
from modelpress_compression.target import Target

TOP = "network_wrapper"
CHECKED_SAMPLES = 1000
HLS_SAMPLES = 256  # of the test bench for high-level synthesis
LANES = 64
# What a part takes at once of what da4ml expects: synthesis finds more to share, or less.
_HOPE = 1.5
# Of `search.cost`, for each lookup table that da4ml makes of it: found on dense networks of 16 to 784 inputs.
_COST_PER_LUT = 1.5
# Of the time that is left, kept back from routing for what comes after it: a share, and seconds at least.
_TO_FINISH, _TO_FINISH_S = 0.1, 30.0

Hardware = ParallelDesign | FoldedDesign | Estimate


@dataclass(frozen=True)
class _Checked:
    """Samples, and how many of them a netlist answered exactly as the emulator; None: not simulated. `latency`,
    `interval`: in cycles."""

    samples: int
    as_written: int
    synthesized: int | None
    latency: int
    interval: int

    def exact(self) -> dict[str, int | None]:
        """The report's `bit_exact`."""
        return {"samples": self.samples, "as_written": self.as_written, "synthesized": self.synthesized}


def build(request: BuildRequest, target: Target) -> Built:
    """See `base.Builder`. What has no room on the part is estimated: see `estimate`."""
    part = PARTS[target.part]
    given = read_network(request.path)
    output = onnx.load(str(request.path), load_external_data=False).graph.output[0].name
    samples = samples_of(request, given)
    request.progress(0.0, "choosing bits for each layer")
    chosen = choose(
        given,
        samples,
        request.max_drop,
        _judge(request, output),
        vouch=request.data.vouches,
        tick=request.check_time,
    )
    network, design = chosen.network, chosen.design
    check_exact(network, design)
    judged = samples[: LEAST_SAMPLES if is_large(network) else None]
    loss = loss_of(run(network, judged, design), run(given, judged))
    how = f"judged by {chosen.judge}" + (", with weights trained for it" if chosen.trained else "")
    request.log(f"fixed point: {loss.sqnr_db:.1f} dB, {_agreement(loss)}; {how}")
    hardware = _hardware(network, design, part, target, request)
    section: dict[str, Any] = {
        "device": "fpga",
        "part": part.name,
        "part_title": part.title,
        "fidelity": {"sqnr_db": loss.sqnr_db, "agreement": loss.agreement},
        "input_bits": design.values[network.input].width,
    }
    if isinstance(hardware, Estimate):
        figures, warnings = _estimated(hardware), [hardware.words()]
    else:
        figures, warnings = _made(network, design, hardware, part, samples, target, request)
    section |= figures
    hls = _for_hls(network, design, hardware, part, target, samples, request, section)
    if not request.data.provided:
        warnings.append("Bits were chosen on synthetic inputs: give --data, or ranges may not be those of real inputs.")
    plain = request.folder / "fixed_point.onnx"
    onnx.save(forms.plain_onnx(network, design, output), str(plain))
    archive = project.write(
        request.folder, network, design, hardware, part, target.clock_mhz, section, samples, output, hls
    )
    routed = section["routed"]
    return Built(
        model=plain,
        project=archive,
        changes={"layers_in_fixed_point": len(network.linear())},
        section=section,
        headline=_headline(section),
        latency_ms=None if routed is None else routed["latency_us"] / 1e3,
        details=tuple(layer_rows(network, design)),
        notes=(_chosen_words(chosen), *_notes(section, network)),
        warnings=tuple(warnings),
    )


def _judge(request: BuildRequest, output: str) -> DropOf | None:
    """The request's metric, of the fixed-point network in plain ONNX."""
    measure = request.drop_of
    if measure is None:
        return None
    folder = request.folder / "judged"
    folder.mkdir()
    count = itertools.count()

    def drop_of(network: Network, design: Design) -> float:
        path = folder / f"{next(count)}.onnx"
        onnx.save(forms.plain_onnx(network, design, output), str(path))
        return measure(path)

    return drop_of


def _chosen_words(chosen: Chosen) -> str:
    trained = "Weights were trained for their formats, and the" if chosen.trained else "The"
    return f"{trained} result was judged by {chosen.judge}."


def _made(
    network: Network,
    design: Design,
    hardware: ParallelDesign | FoldedDesign,
    part: Part,
    samples: Reals,
    target: Target,
    request: BuildRequest,
) -> tuple[dict[str, Any], list[str]]:
    """The figures of a design, proven and measured, and warnings."""
    if not is_ready(YOSYS):
        request.log("yosys is being prepared, which takes minutes; see docs/targets.md on how to do it once for all")
    read = write_sources(hardware.sources, request.folder)
    checked, resources = _proven(network, design, hardware, read, part, samples[:CHECKED_SAMPLES], request)
    warnings = list(_warnings(part, resources, checked))
    routed = None
    if part.routed and resources.fits(part):
        request.progress(0.7, f"placing and routing on {part.title}")
        left_s = request.time_left_s()
        limit_s = None if left_s is None else left_s - max(_TO_FINISH * left_s, _TO_FINISH_S)
        try:
            routed = place_and_route(part, TOP, target.clock_mhz, request.folder, limit_s)
        except (ToolError, TimeLimitError) as error:
            request.check_time()
            warnings.append(f"The design was not placed and routed, so that its clock is not known. {error.message}")
    return _section(part, hardware, resources, routed, checked), warnings


def _for_hls(
    network: Network,
    design: Design,
    hardware: Hardware,
    part: Part,
    target: Target,
    samples: Reals,
    request: BuildRequest,
    section: dict[str, Any],
) -> hls.Project | None:
    """The project for high-level synthesis; `section` says what became of it."""
    section["hls"] = None
    if target.hls == "none" or isinstance(hardware, Estimate):
        return None
    title = hls.TOOLS[target.hls].title
    request.progress(0.95, f"writing the project for {title}")
    folder = request.folder / "hls"
    try:
        made = hls.write_project(network, design, target.hls, part, target.clock_mhz, samples[:HLS_SAMPLES], folder)
    except hls.NotTakenError as error:
        section["hls"] = {"tool": title, "part": None, "refused": str(error)}
        return None
    section["hls"] = {"tool": title, "part": made.part, "refused": None}
    return made


def _estimated(found: Estimate) -> dict[str, Any]:
    resources = {"luts": found.luts, "brams": found.brams}
    return {
        "form": "estimated",
        "resources": resources,
        "shares": {"luts": found.luts / found.part.luts, "brams": found.brams / found.part.brams},
        "fits": found.fits,
        "cells": {},
        "latency_cycles": found.latency_cycles,
        "interval_cycles": found.cycles,
        "routed": None,
        "bit_exact": None,
        "units": found.rows(),
    }


def samples_of(request: BuildRequest, network: Network) -> Reals:
    """[samples, *shape] of the network's input. Raises InvalidDataError where numbers are not finite."""
    feeds = [feed[network.input] for feed in request.data.feeds(64, limit=4096)]
    samples = np.concatenate(feeds).astype(np.float64).reshape(-1, *network.input_shape)
    if not np.isfinite(samples).all():
        raise InvalidDataError(f"Samples of {network.input!r} have numbers that are not finite; fixed point has none.")
    return samples


def _hardware(network: Network, design: Design, part: Part, target: Target, request: BuildRequest) -> Hardware:
    """All products at once, where the part has room for that; else in turns; else an estimate."""
    luts = cost(network, design) / _COST_PER_LUT
    if luts <= _HOPE * part.luts:
        request.progress(0.1, "building the pipeline")
        pipeline = build_parallel(network, design, target.stage_adders)
        request.log(f"pipeline: {pipeline.latency} cycles, about {pipeline.adders:.0f} lookup tables")
        return pipeline
    request.log(f"all products at once would take about {luts:,.0f} lookup tables; they take turns")
    request.progress(0.1, "folding")
    try:
        return build_folded(network, design, part)
    except UnsupportedOperatorError as error:
        request.log(error.message)
        return estimate(network, design, part)


def _proven(
    network: Network,
    design: Design,
    hardware: ParallelDesign | FoldedDesign,
    read: str,
    part: Part,
    samples: Reals,
    request: BuildRequest,
) -> tuple[_Checked, Resources]:
    """Simulates the design as it was written, and a pipeline as it was synthesized, on the samples."""
    given = design.values[network.input].round_input(samples).reshape(len(samples), -1)
    expected = run(network, samples, design).reshape(len(samples), -1)
    request.progress(0.2, "simulating the design")
    gates = gates_as_written(read, TOP, request.folder, request.time_left_s())
    if isinstance(hardware, FoldedDesign):
        seen = stream_through(gates, hardware, given, request.check_time)
        exact = int((seen.answers == expected).all(axis=1).sum())
        checked = _Checked(len(samples), exact, None, seen.latency, seen.interval)
    else:
        exact = answered(gates, hardware, given, expected)
        checked = _Checked(len(samples), exact, None, hardware.latency, hardware.interval)
    request.progress(0.4, f"synthesizing for {part.title}")
    resources = synthesize(read, TOP, part, request.folder, request.time_left_s())
    if part.family == "ecp5" and isinstance(hardware, ParallelDesign):
        request.progress(0.6, "simulating what was synthesized")
        gates = gates_synthesized(TOP, part, request.folder, request.time_left_s())
        checked = replace(checked, synthesized=answered(gates, hardware, given, expected))
    return checked, resources


def answered(gates: Netlist, hardware: ParallelDesign, given: Reals, expected: Reals) -> int:
    """Of how many samples every bit of the answer is right, one sample in each cycle."""
    bits = stream(hardware.given.bits(given), LANES)
    seen = gates.run({hardware.given.name: bits}, hardware.made.name, len(bits) + hardware.latency)
    answers = hardware.made.values(unstream(seen[hardware.latency :], len(given)))
    return int((answers == expected).all(axis=1).sum())


def layer_rows(network: Network, design: Design) -> list[dict[str, str | int | float]]:
    """A row for each layer with weights."""
    bits = sum_bits(network, design)
    rows: list[dict[str, str | int | float]] = []
    for layer, operation in network.linear():
        weights, output = design.weights[layer.name], design.values[layer.output]
        rounded = design.rounded_weight(layer, operation)
        rows.append(
            {
                "layer": layer.name,
                "input": str(design.values.get(layer.inputs[0], "as before")),
                "weights": str(weights),
                "weight_bits": weights.width,
                "sum_bits": bits[layer.name],
                "output": str(output),
                "output_bits": output.width,
                "zero_weights": float((rounded == 0).mean()),
                "products": network.products(layer),
            }
        )
    return rows


def _section(
    part: Part,
    hardware: ParallelDesign | FoldedDesign,
    resources: Resources,
    routed: Routed | None,
    checked: _Checked,
) -> dict[str, Any]:
    section: dict[str, Any] = {
        "form": "parallel" if isinstance(hardware, ParallelDesign) else "folded",
        "resources": {name: getattr(resources, name) for name in ("luts", "flip_flops", "dsps", "brams")},
        "shares": resources.shares(part),
        "fits": resources.fits(part),
        "cells": dict(resources.cells),
        "latency_cycles": checked.latency,
        "interval_cycles": checked.interval,
        "routed": None,
        "bit_exact": checked.exact(),
    }
    if routed is not None:
        section["routed"] = {
            "fmax_mhz": routed.fmax_mhz,
            "latency_us": checked.latency / routed.fmax_mhz,
            "samples_per_s": routed.fmax_mhz * 1e6 / checked.interval,
            "used": dict(routed.used),
            "available": dict(routed.available),
        }
    return section


def _headline(section: Mapping[str, Any]) -> str:
    shares = f"{section['shares']['luts']:.0%} of the lookup tables of {section['part_title']}"
    routed = section["routed"]
    if section["form"] == "estimated":
        return f"not built: by estimate {section['interval_cycles']:,} cycles a sample, {shares}"
    if routed is None:
        return f"{section['latency_cycles']} cycles, {shares}"
    latency_us = routed["latency_us"]
    took = f"{latency_us * 1e3:.0f} ns" if latency_us < 1 else f"{latency_us:.1f} \N{MICRO SIGN}s"
    return f"{took} at {routed['fmax_mhz']:.0f} MHz, {shares}"


def _notes(section: Mapping[str, Any], network: Network) -> Sequence[str]:
    taken = section["resources"]
    shares = section["shares"]
    if section["form"] == "estimated":
        return [
            f"By FINN's cost formulas, on {section['part_title']}: about {taken['luts']:,} lookup tables "
            f"({shares['luts']:.0%}) and {taken['brams']:,} block RAMs ({shares['brams']:.0%}), a sample every "
            f"{section['interval_cycles']:,} cycles. Nothing of this was built."
        ]
    said = [
        f"{section['part_title']}: {taken['luts']:,} lookup tables ({shares['luts']:.1%}), {taken['flip_flops']:,} "
        f"flip-flops ({shares['flip_flops']:.1%}), {taken['dsps']} DSPs, {taken['brams']} block RAMs.",
        f"Latency {section['latency_cycles']} cycles, one sample every {section['interval_cycles']}.",
    ]
    if routed := section["routed"]:
        said.append(
            f"Placed and routed: {routed['fmax_mhz']:.1f} MHz, {routed['latency_us']:.3f} microseconds a sample, "
            f"{routed['samples_per_s']:,.0f} samples a second."
        )
    checked = section["bit_exact"]
    said.append(
        f"Simulated on {checked['samples']} samples: the Verilog answers {checked['as_written']} exactly as the "
        f"fixed-point model"
        + (f", what was synthesized {checked['synthesized']}." if checked["synthesized"] is not None else ".")
    )
    if made := section["hls"]:
        said.append(
            f"hls4ml does not take the network for {made['tool']}: {made['refused']}."
            if made["refused"]
            else f"The project has the network in C++ for {made['tool']} as well, by hls4ml, for {made['part']}."
        )
    if network.host:
        said.append(f"{network.host[0][0]} at the end is left to the host; the hardware gives what goes into it.")
    return said


def _warnings(part: Part, resources: Resources, checked: _Checked) -> Sequence[str]:
    said = []
    if not resources.fits(part):
        said.append(f"The design does not fit on {part.title}; it was synthesized, and not placed and routed.")
    elif not part.routed:
        said.append(f"No open tool places and routes {part.title}: its clock is not known until the vendor's tool did.")
    if checked.as_written < checked.samples or (checked.synthesized or checked.samples) < checked.samples:
        said.append("The hardware does not answer every sample as the fixed-point model does: do not use it.")
    return said


def _agreement(loss: Loss) -> str:
    return "no classes" if loss.agreement is None else f"{loss.agreement:.2%} of the samples in the same class"
