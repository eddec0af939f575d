"""Keeps third parties quiet: exporters print, warn and log about their own internals, which no user can act on."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

_LOGGERS = ("torch", "onnxscript", "onnx_ir", "onnx", "transformers")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Around calls into torch's exporters and ONNX's converters: no prints, no warnings, no log lines.

    Their failures come as exceptions, and their results are checked by numbers, so that nothing is lost.
    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
