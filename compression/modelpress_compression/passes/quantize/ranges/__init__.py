"""Ranges of activations: observed on data, measured by the error that they make at the outputs, and chosen."""
