"""The program: `cogtools`, or `python -m cogtools`."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. Ctrl-C ends it with one line, also while it is still starting.

    An exception that is no `CogtoolsError` is a bug. It is shown whole and ends with exit code 2, since Python's own,
    1, would say that a file was checked and found wrong.
    """
    try:
        from cogtools.cli import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = 130
    except Exception:  # noqa: BLE001 - whatever it is, its traceback is printed
        import traceback

        traceback.print_exc()
        sys.stderr.write("This is a bug in cogtools. Please report it with the lines above.\n")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
