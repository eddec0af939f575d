"""The way of a model: steps of the recipe in order, each verified, then everything measured."""

from modelpress_compression.pipeline.progress import stages_of
from modelpress_compression.pipeline.run import Result, compress

__all__ = ["Result", "compress", "stages_of"]
