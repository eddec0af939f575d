"""Distillation: `config` says how, `distill` is the pass."""
