"""Lossless rewriting: `config` says what of it, `fuse` is the pass."""
