"""Formats that need their own Python code: refused here, with the way out."""

from __future__ import annotations

from modelpress_compression.errors import CompressionError, RejectedModelError, UnsupportedFormatError

_ARCHITECTURE = (
    "Give the function that builds the model, on the machine where its code lives: "
    "--architecture package.module:factory (it is converted there, and needs torch there), "
    "or export the model with torch.onnx.export, torch.export.save or torch.jit.save."
)


def refuse(model_format: str) -> CompressionError:
    """The error for a format that is recognized, but cannot be loaded from the file alone."""
    if model_format == "pickled_module":
        return RejectedModelError(
            "The file is a pickled Python module: loading it executes whatever it contains, so it is refused here. "
            "Convert it on your own machine with --trust-pickle (needs torch and the module's code there), "
            "or export it with torch.onnx.export, torch.export.save or torch.jit.save.",
            finding="PICKLED_MODULE",
        )
    if model_format == "safetensors":
        return UnsupportedFormatError(
            f"The file holds weights (safetensors), but no model. {_ARCHITECTURE}", format=model_format
        )
    return UnsupportedFormatError(
        f"The file holds weights (a state dict), but no model. {_ARCHITECTURE}", format=model_format
    )
