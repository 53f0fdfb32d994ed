"""What libraries say while they load a file, by their loggers and by `warnings`."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_LINE = 300
"""How much of what a library says is kept."""

LIBRARIES = ("diffusers", "peft", "transformers", "huggingface_hub", "accelerate")


@contextlib.contextmanager
def everything_said() -> Iterator[list[tuple[str, str]]]:
    """Collect (library, text) of what the libraries warn of, by their loggers and by `warnings`; print nothing.

    Their log level is that which they have by default, whatever the environment says.
    """
    said: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.name.split(".")[0], record.getMessage()))

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [listener], False
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
        said += [(_library(warning.filename), str(warning.message)) for warning in warned]
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def _library(filename: str) -> str:
    """The library that a source file belongs to."""
    return next((name for name in (*LIBRARIES, "torch") if name in Path(filename).parts), Path(filename).name)


def one_line(text: str) -> str:
    """As much of a text as a line holds."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_LINE else line[: _MAX_LINE - 1] + "…"
