"""Finds the model that a goal asks for, among candidates that are all built and measured."""
