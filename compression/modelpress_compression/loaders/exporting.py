"""Exporters one after the other, until one writes a file that repeats the original's outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from modelpress_compression.errors import CompressionError, ModelNotRunnableError, UnsupportedOperatorError
from modelpress_compression.loaders.finish import finish
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.script_export import ExportRequest
from modelpress_compression.loaders.trials import Trials, first_line
from modelpress_compression.loaders.verify import Disagreement
from modelpress_compression.model import Model, Provenance

Exporter = Callable[[ExportRequest], Path]

_OPERATOR = re.compile(r"(?P<op>(?:aten|prim|quantized|prims|torchvision|[a-z]\w*)::\w+)")


def export_checked(
    exporters: Sequence[Exporter], request: ExportRequest, provenance: Provenance, trials: Trials
) -> Model:
    """The first exporter's result that agrees with `trials`.

    Raises UnsupportedOperatorError or ModelNotRunnableError with what the exporters said.
    """
    failures: list[tuple[str, str]] = []
    for exporter in exporters:
        name = exporter.__name__.removeprefix("export_")
        try:
            with quiet():
                path = exporter(request)
            return finish(path, provenance, request.specs, trials)
        except Disagreement as error:
            failures.append((name, f"the result differs from the original: {error}"))
        except CompressionError as error:
            failures.append((name, error.message))
        except Exception as error:  # noqa: BLE001  exporters raise whatever their own code runs into
            failures.append((name, first_line(error)))
    raise _failed(failures)


def _failed(failures: Sequence[tuple[str, str]]) -> CompressionError:
    said = "; ".join(f"{name}: {text}" for name, text in failures)
    message = f"The model could not be converted to ONNX ({said[:900]}). Export it with torch.onnx.export where its "
    message += "source is, and upload the ONNX file."
    for _, text in failures:
        if ("not supported" in text or "nsupported" in text) and (match := _OPERATOR.search(text)):
            return UnsupportedOperatorError(
                f"The operator {match['op']} cannot be converted to ONNX. {message}", op_type=match["op"]
            )
    return ModelNotRunnableError(message)
