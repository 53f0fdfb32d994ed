"""The program: `cogtools`, or `python -m cogtools`."""

from __future__ import annotations

import sys
from typing import NoReturn

from cogtools.interruption import ignore_signals, raise_on_signals


def main() -> NoReturn:
    """Run the command line. Ctrl-C or SIGTERM ends it with one line and 130, also while it starts or has just printed.

    An exception that is not a `CogtoolsError`, and not what the system refuses, is a bug. Its traceback is shown, and
    the exit code is 2: Python's own, 1, would say that a file was checked and found wrong.
    """
    try:
        raise_on_signals()
        code = _run()
        ignore_signals()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    ignore_signals()
    sys.exit(code)


def _run() -> int:
    try:
        from cogtools.cli import run

        return run(sys.argv[1:])
    except Exception as error:  # noqa: BLE001 - whatever it is, it ends with exit code 2
        try:
            _show(error)
        except Exception:  # noqa: BLE001 - no memory is left for more
            sys.stderr.write(f"error: {error!r}\n")
        return 2


def _show(error: Exception) -> None:
    from cogtools.system import as_cogtools_error

    known = as_cogtools_error(error)
    if known is not None:
        sys.stderr.write(f"error: {known}\n")
        return
    import traceback

    traceback.print_exception(error)
    sys.stderr.write("This is a bug in cogtools. Please report it with the lines above.\n")


if __name__ == "__main__":
    main()
