"""Networks of the library transformers: built from a folder's config.json, and filled by the library's own loader.

The loader knows what each release of the library called its weights, and which of them a file leaves out. It reports
what it did not find and fills that with random numbers; here the report decides.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelpress_compression.errors import InvalidInputsError
from modelpress_compression.loaders.formats.refusals import refused
from modelpress_compression.loaders.formats.weight_files import read_json
from modelpress_compression.loaders.quiet import quiet
from modelpress_compression.loaders.weight_fit import Fit, fit_report
from modelpress_compression.loaders.weight_names import Weights

AUTO = "transformers:auto"


@dataclass(frozen=True)
class Loaded:
    """A network with weights in it. `fit`: what the library found and did not find."""

    module: torch.nn.Module
    fit: Fit


def build_auto(config: Path | None) -> torch.nn.Module:
    """The class that config.json names under `architectures`, in float32. Raises InvalidInputsError."""
    if config is None:
        raise InvalidInputsError(
            f"--architecture {AUTO} needs the config.json of the model beside its weights; give the folder that "
            "save_pretrained wrote."
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on this machine
    try:
        import transformers
    except ImportError as error:
        raise InvalidInputsError(
            f"--architecture {AUTO} needs the library of that name on this machine. Run: pip install transformers"
        ) from error
    settings = read_json(config)
    _no_other_library(settings, config.parent)
    names = settings.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "AutoModel"
    model_class = _class_of(transformers, name)
    if model_class is None:
        custom = (
            "It comes with code of its own (auto_map in config.json), which is not run; "
            if "auto_map" in settings
            else ""
        )
        raise refused("UNKNOWN_CLASS", name=name[:80], version=transformers.__version__, custom=custom)
    try:
        with quiet():
            found = transformers.AutoConfig.from_pretrained(str(config.parent), local_files_only=True)
            build = model_class.from_config if name == "AutoModel" else model_class._from_config
            module: torch.nn.Module = build(found, dtype=torch.float32)
    except Exception as error:  # the library raises whatever a config makes it run into
        raise InvalidInputsError(
            f"transformers {transformers.__version__} cannot build {name} from config.json "
            f"({type(error).__name__}: {str(error)[:300]})."
        ) from error
    return module.float()


def _class_of(transformers: Any, name: str) -> Any:
    """The class of that name, which is imported only now; None where there is none. Raises InvalidInputsError."""
    try:
        return getattr(transformers, name, None)
    except Exception as error:  # what a class needs may be missing here, or not fit this torch, as torchvision
        raise InvalidInputsError(
            f"transformers {transformers.__version__} cannot import {name[:80]} here ({type(error).__name__}: "
            f"{str(error)[:300]}). Try it in Python: from transformers import {name[:80]}"
        ) from error


def _no_other_library(settings: Mapping[str, Any], folder: Path) -> None:
    """Libraries that write a config.json of their own. Raises UnsupportedFormatError with what builds the network."""
    if "model_type" in settings:
        return
    name, library, code = settings.get("_class_name"), "diffusers", f"diffusers:{{}}.from_pretrained({str(folder)!r})"
    if not isinstance(name, str):
        name, library, code = settings.get("architecture"), "timm", "timm:create_model({!r}, num_classes={})"
    if isinstance(name, str):
        code = code.format(name[:80], settings.get("num_classes"))
        raise refused("OTHER_LIBRARY", library=library, name=name[:80], factory=f'"{code}"')


def fit_by_library(module: torch.nn.Module, weights: Weights, ignored: Sequence[str] = ()) -> Loaded | None:
    """The network filled by transformers' loader; None where it is no network of that library, or the loader fails."""
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(module, transformers.PreTrainedModel):
        return None
    try:
        with quiet():
            loaded, report = type(module).from_pretrained(
                None,
                config=module.config,
                state_dict=dict(weights),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                dtype=torch.float32,
            )
    except Exception:  # noqa: BLE001  then what does not fit is said in our own words
        return None
    shapes = [str(item[0]) if isinstance(item, tuple) else str(item) for item in report["mismatched_keys"]]
    fit = fit_report(loaded, weights, report["missing_keys"], report["unexpected_keys"], shapes, ignored)
    return Loaded(loaded, fit)


def without_grouped_products(module: torch.nn.Module) -> None:
    """Mixtures of experts compute with products grouped by expert, an operator that ONNX has not. The library has the
    same with each token's matrices gathered, which exports: so long as the inputs are short, for it holds all of them.
    """
    for inner in module.modules():
        implementation = getattr(getattr(inner, "config", None), "_experts_implementation", None)
        change = getattr(inner, "set_experts_implementation", None)
        if implementation == "grouped_mm" and callable(change):
            change("batched_mm")
