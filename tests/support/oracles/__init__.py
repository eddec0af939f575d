"""Slow, obvious ways to the same answers, which tests and benchmarks hold the engine against."""
