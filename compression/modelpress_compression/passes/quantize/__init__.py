"""Quantization: `config` says how, `quantize` is the pass."""
