"""Scales of channels that move between activations and weights before either is quantized."""
