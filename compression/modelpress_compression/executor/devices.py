"""Where the executor runs: CUDA where a recipe asks for it and torch sees one, else the CPU."""

from __future__ import annotations

import torch


def device_for(wanted: str) -> torch.device:
    """`wanted`: `target.device` of a recipe, cpu or cuda."""
    return torch.device("cuda" if wanted == "cuda" and torch.cuda.is_available() else "cpu")


def why_not(wanted: str) -> str:
    """Why the wanted device is not the one that is used, for people; empty where it is."""
    if device_for(wanted).type == wanted:
        return ""
    return (
        f"target.device is {wanted}, but torch {torch.__version__} sees no such device here: what needs gradients ran "
        f"on the CPU."
    )
