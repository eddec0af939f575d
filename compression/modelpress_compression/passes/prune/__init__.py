"""Pruning: `config` says of what, `prune` is the pass, `channel` removes whole channels."""
