"""Putting other numbers in the place of a constant: `analysis.tensors`, under the name that pruning uses."""

from modelpress_compression.analysis.tensors import replace_numbers

__all__ = ["replace_numbers"]
