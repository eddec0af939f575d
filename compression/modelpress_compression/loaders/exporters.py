"""Ways from a torch module to an ONNX file. Of a TorchScript module they are tried in this order:

1. torch.onnx's exporter for TorchScript, on the frozen module: keeps control flow and dynamic dimensions. Writes into
   parts of tensors are written anew (`script_parts`).
2. The same on the module as it is: freezing refuses some modules.
3. TorchScript -> torch.export program -> ONNX.
4. The exporter for TorchScript on what torch traces when Python runs the graph (`script_replay`): control flow is that
   of one run, sizes stay dynamic. Detectors with objects, dicts and growing lists go this way.
5. One run recorded operator by operator -> ONNX: control flow and sizes are those of that run, so it can only pass the
   check where no dimension is dynamic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.onnx import utils

from modelpress_compression.inputs import Feeds
from modelpress_compression.loaders.expert_ops import translations
from modelpress_compression.loaders.script_graph import in_plain_operators
from modelpress_compression.loaders.script_parts import write_anew
from modelpress_compression.loaders.script_replay import Replay
from modelpress_compression.loaders.symbolics import SYMBOLICS
from modelpress_compression.loaders.torch_run import to_tensors
from modelpress_compression.model import EXTERNAL_DATA_THRESHOLD_BYTES
from modelpress_compression.specs import TensorSpec

LEGACY_OPSET = 18
DYNAMO_OPSET = 20


@dataclass(frozen=True)
class ExportRequest:
    """What an exporter is given. `module()`: a fresh module in evaluation mode that takes `feeds` in order."""

    module: Callable[[], Any]
    feeds: Feeds
    specs: tuple[TensorSpec, ...]
    output_names: Sequence[str]
    folder: Path

    def args(self) -> tuple[torch.Tensor, ...]:
        return tuple(to_tensors(self.feeds).values())


def export_frozen(request: ExportRequest) -> Path:
    """Way 1."""
    module = request.module()
    frozen = module if not hasattr(module, "training") else torch.jit.freeze(module)
    write_anew(frozen.graph)
    return _legacy(frozen, request, "frozen.onnx")


def export_plain(request: ExportRequest) -> Path:
    """Way 2; also for `nn.Module`s, which are traced."""
    return _legacy(request.module(), request, "plain.onnx")


def _legacy(module: Any, request: ExportRequest, name: str) -> Path:
    path = request.folder / name
    axes = {
        spec.name: {
            axis: dim or f"{spec.name}_{axis}" for axis, dim in enumerate(spec.shape) if not isinstance(dim, int)
        }
        for spec in request.specs
    }
    with torch.no_grad(), _extra_symbolics():
        torch.onnx.export(
            module,
            request.args(),
            str(path),
            dynamo=False,
            opset_version=LEGACY_OPSET,
            input_names=[spec.name for spec in request.specs],
            output_names=list(request.output_names),
            dynamic_axes={key: value for key, value in axes.items() if value},
            do_constant_folding=True,
        )
    return path


def export_converted(request: ExportRequest) -> Path:
    """Way 3."""
    from torch._export.converter import TS2EPConverter

    program = TS2EPConverter(request.module(), request.args(), {}).convert()
    return export_program(program, request, "converted.onnx")


def export_replayed(request: ExportRequest) -> Path:
    """Way 4."""
    replay = Replay(request.module())
    with torch.no_grad():
        replay(*request.args())
        traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
            replay, request.args(), check_trace=False
        )
    return _legacy(torch.jit.freeze(in_plain_operators(traced.eval())), request, "replayed.onnx")


def export_recorded(request: ExportRequest) -> Path:
    """Way 5."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        graph = make_fx(request.module(), tracing_mode="real")(*request.args())
        program = torch.export.export(graph, request.args())
    return export_program(program, request, "recorded.onnx")


def export_program(program: torch.export.ExportedProgram, request: ExportRequest, name: str) -> Path:
    """A torch.export program as ONNX, weights beyond 1.5 GiB in a file of their own."""
    path = request.folder / name
    weights = sum(
        value.nbytes
        for value in (*program.state_dict.values(), *program.constants.values())
        if isinstance(value, torch.Tensor)
    )
    torch.onnx.export(
        program,
        (),
        str(path),
        dynamo=True,
        opset_version=DYNAMO_OPSET,
        input_names=[spec.name for spec in request.specs],
        output_names=list(request.output_names),
        external_data=weights > EXTERNAL_DATA_THRESHOLD_BYTES,
        verify=False,
        optimize=True,
        custom_translation_table=translations(),
    )
    return path


SCRIPT_EXPORTERS: tuple[Callable[[ExportRequest], Path], ...] = (
    export_frozen, export_plain, export_converted, export_replayed, export_recorded,
)  # fmt: skip
# Those whose results have the branches and loops of one run.
OF_ONE_RUN = (export_converted, export_replayed, export_recorded)


@contextlib.contextmanager
def _extra_symbolics() -> Iterator[None]:
    """For one export: operators that the exporter for TorchScript lacks, or converts too narrowly."""
    for name, symbolic in SYMBOLICS.items():
        utils.register_custom_op_symbolic(name, symbolic, LEGACY_OPSET)
    log = torch._C._jit_onnx_log
    # The exporter prints whole graphs when it fails, whatever its own switch says.
    torch._C._jit_onnx_log = _silent
    try:
        yield
    finally:
        torch._C._jit_onnx_log = log
        for name in SYMBOLICS:
            utils.unregister_custom_op_symbolic(name, LEGACY_OPSET)


def _silent(*_: object) -> None:
    """Takes the place of a log."""
