"""The command line: it parses the words, calls the library, shows the report, and chooses the exit code."""

from cogtools.cli.main import app, run
from cogtools.cli.options import COULD_NOT, DONE, INTERRUPTED, WRONG

__all__ = ["COULD_NOT", "DONE", "INTERRUPTED", "WRONG", "app", "run"]
