"""Recipes as the service sees them: presets, and one canonical form for the result cache."""

from __future__ import annotations

from functools import cache

from modelpress_compression.recipe import Recipe as EngineRecipe
from modelpress_compression.recipe import presets
from modelpress_protos.recipe import from_dict, to_dict
from modelpress_protos.v1 import recipe_pb2, server_service_pb2

DEFAULT_PRESET = "default"


@cache
def preset(name: str) -> recipe_pb2.Recipe:
    """A preset as a message; treat it as read-only."""
    return from_dict(EngineRecipe.preset(name).to_dict())


@cache
def preset_messages() -> tuple[server_service_pb2.Preset, ...]:
    """All presets; treat them as read-only."""
    return tuple(
        server_service_pb2.Preset(name=name, summary=summary, recipe=preset(name))
        for name, summary in presets().items()
    )


def canonical(recipe: recipe_pb2.Recipe) -> recipe_pb2.Recipe:
    """The recipe with every default written out, so that leaving one out or stating it hits the same cached result."""
    return from_dict(EngineRecipe.from_dict(to_dict(recipe)).to_dict())
