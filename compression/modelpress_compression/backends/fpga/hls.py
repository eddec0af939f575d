"""The fixed-point network as a project of hls4ml: C++ for the vendors' high-level synthesis.

hls4ml (arXiv 1804.06913, 2103.05579) reads the network with Quant nodes and writes templates of C++ with the same
formats: `ap_fixed` or `ac_fixed`, cut off and saturated as the Quant nodes say, with sums wide enough to be exact. Its
emulation of them on a CPU, which g++ compiles, gives the emulator's numbers bit for bit. A worker starts no compiler:
the project has the emulation's source, with samples and the answers that are expected.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import onnx

from modelpress_compression.backends.fpga import forms
from modelpress_compression.backends.fpga.emulator import Design, run
from modelpress_compression.backends.fpga.formats import Reals
from modelpress_compression.backends.fpga.network import Network
from modelpress_compression.backends.fpga.parts import Part

PROJECT = "network"
# A dense layer of more products than this is folded: Vivado's and Vitis' synthesis partitions no larger arrays.
MOST_UNROLLED = 4096
REUSE = 64  # products of a folded layer that share a multiplier, as far as hls4ml can
_STREAMED_RANK = 3
_CONFIG = "hls4ml_config.yml"  # has paths of this machine, and builds nothing


@dataclass(frozen=True)
class Tool:
    """`backend`: hls4ml's name. `part`: one of the vendor's, for designs whose own part the tool does not build for.
    `commands`: of a shell, that simulate and build the project."""

    title: str
    backend: str
    part: str
    amd: bool
    commands: tuple[str, ...]


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        "vitis": Tool(
            "Vitis HLS", "Vitis", "xc7a100tcsg324-1", True, ("cd hls && vitis-run --mode hls --tcl build_prj.tcl",)
        ),
        "vivado": Tool("Vivado HLS", "Vivado", "xc7a100tcsg324-1", True, ("cd hls && vivado_hls -f build_prj.tcl",)),
        "oneapi": Tool(
            "oneAPI",
            "oneAPI",
            "Agilex7",
            False,
            ("cd hls && cmake -B build && cmake --build build --target fpga_emu report",),
        ),
        "catapult": Tool(
            "Catapult", "Catapult", "xcku115-flvb2104-2-i", True, ("cd hls && catapult -shell -file build_prj.tcl",)
        ),
    }
)


class NotTakenError(Exception):
    """hls4ml does not take the network; why."""


@dataclass(frozen=True)
class Project:
    """`files`: by their path in it. `part`: that it is for. `channels_last`: in which order its input and output are;
    hls4ml has no other for images."""

    tool: Tool
    files: Mapping[str, bytes]
    part: str
    channels_last: bool


def write_project(
    network: Network, design: Design, name: str, part: Part, clock_mhz: float, samples: Reals, folder: Path
) -> Project:
    """`name`: of `TOOLS`. `samples`: for its test bench. `folder`: where it may write. Raises NotTakenError."""
    tool = TOOLS[name]
    built_for = part.order_code if tool.amd and part.order_code else tool.part
    images = len(network.input_shape) >= _STREAMED_RANK
    given = design.values[network.input].round_input(samples)
    expected = run(network, samples, design)
    if images:
        given, expected = _channels_last(given), _channels_last(expected)
    folder.mkdir()
    np.save(folder / "given.npy", given.reshape(len(given), -1).astype(np.float32))
    np.save(folder / "expected.npy", expected.reshape(len(expected), -1).astype(np.float32))
    # It says what it does on the standard output, and raises whatever it likes where it does not go on.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            try:
                stamp = _write(network, design, tool, built_for, clock_mhz, folder, images=images)
            except PermissionError:
                with _modes_left_alone():
                    shutil.rmtree(folder / "project")
                    stamp = _write(network, design, tool, built_for, clock_mhz, folder, images=images)
        except Exception as error:
            words = str(error).replace(f"{folder}/", "") or type(error).__name__
            raise NotTakenError(words.splitlines()[0]) from error
    # Its name for the project is random, and for Catapult it writes where its files and the samples lay.
    root = folder / "project"
    ours = {
        str(root): ".",
        stamp: PROJECT,
        str(folder / "given.npy"): "tb_input_features.dat",
        str(folder / "expected.npy"): "tb_output_predictions.dat",
    }
    files = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != _CONFIG):
        content = path.read_bytes()
        for theirs, own in ours.items():
            content = content.replace(theirs.encode(), own.encode())
        files[path.relative_to(root).as_posix()] = content
    return Project(tool, files, built_for, images)


@contextlib.contextmanager
def _modes_left_alone() -> Iterator[None]:
    """Copies get the mode that new files have: a confined worker, which does nothing else meanwhile, may not change
    modes or times of files, and hls4ml copies those of its templates."""
    with contextlib.ExitStack() as stack:
        for name in ("os.chmod", "shutil.copymode", "shutil.copystat"):
            stack.enter_context(mock.patch(name, return_value=None))
        yield


def _write(
    network: Network, design: Design, tool: Tool, part: str, clock_mhz: float, folder: Path, *, images: bool
) -> str:
    """The random letters by which hls4ml tells its projects apart."""
    import hls4ml

    model = _cleaned(forms.qonnx(network, design, "answer"), images=images)
    config = hls4ml.utils.config_from_onnx_model(
        model, granularity="name", backend=tool.backend, default_precision="fixed<32,16>", default_reuse_factor=1
    )
    _choose(config, network, design, images=images)
    converted = hls4ml.converters.convert_from_onnx_model(
        model,
        output_dir=str(folder / "project"),
        project_name=PROJECT,
        backend=tool.backend,
        part=part,
        clock_period=1e3 / clock_mhz,
        io_type="io_stream" if images else "io_parallel",
        hls_config=config,
        input_data_tb=str(folder / "given.npy"),
        output_data_tb=str(folder / "expected.npy"),
    )
    converted.write()
    return str(converted.config.get_config_value("Stamp"))


def _cleaned(proto: onnx.ModelProto, *, images: bool) -> Any:
    """As hls4ml wants it: with shapes, names of its own for all nodes, and channels last."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.util.cleanup import cleanup_model

    model = cleanup_model(ModelWrapper(proto))
    if images:
        model = cleanup_model(model.transform(ConvertToChannelsLastAndClean(make_input_channels_last=True)))
    return model


def _choose(config: dict[str, Any], network: Network, design: Design, *, images: bool) -> None:
    """The format of the input, and how far layers are unrolled."""
    form = design.values[network.input]
    kind = "fixed" if form.signed else "ufixed"
    whole = form.integer + form.signed
    precision = f"{kind}<{form.width},{whole},RND_CONV,SAT>"
    folded = images or any(network.products(layer) > MOST_UNROLLED for layer, _ in network.linear())
    config["Model"]["Strategy"] = "Resource" if folded else "Latency"
    for layer in config["LayerName"].values():
        if folded and "ReuseFactor" in layer:
            layer["ReuseFactor"] = REUSE
    config["LayerName"]["global_in"]["Precision"] = {"result": precision}


def _channels_last(values: Reals) -> Reals:
    return values if values.ndim < _STREAMED_RANK + 1 else np.moveaxis(values, 1, -1)
