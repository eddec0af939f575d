"""Holds two models against each other: latency, fidelity, a task metric. All figures are measured, none estimated."""
