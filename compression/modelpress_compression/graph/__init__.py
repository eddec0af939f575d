"""Reads a graph: figures, shapes, multiply-accumulates, inputs that make it run."""
