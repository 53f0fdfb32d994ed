"""docs/cli.md, made from the app itself.

python -m tools.cli_pages            write the page
python -m tools.cli_pages --check    fail if the page is not what the app says
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cogtools.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

_HEAD = """\
# Command line

This page is made from the program by `make docs`. `cogtools COMMAND --help` shows the same.

Results go to standard output, notes and errors to standard error. Exit codes: **0** done or verified, **1** `verify`
found something wrong, **2** it could not be done, **130** interrupted.
"""


def page() -> str:
    """The page."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("cogtools", ["--help-is-not-asked"], resilient_parsing=True)
    sections = [
        _HEAD,
        *("\n".join(_section(name, command.commands[name], context)) for name in sorted(command.commands)),
    ]
    return "\n".join(sections).rstrip() + "\n"


def _section(name: str, command: Any, parent: Any) -> Iterator[str]:
    arguments = " ".join(parameter.make_metavar(parent) for parameter in command.params if _is_argument(parameter))
    yield f"## {name}\n"
    yield f"    cogtools {name} {arguments} [OPTIONS]\n"
    text, examples = _help(command)
    yield f"{text}\n"
    if examples:
        yield "```\n" + "\n".join(examples) + "\n```\n"
    for parameter in filter(_is_argument, command.params):
        if parameter.help:
            yield f"`{parameter.make_metavar(parent)}`: {_in_cell(parameter.help)}\n"
    yield "| option | |"
    yield "|---|---|"
    for parameter in command.params:
        if not _is_argument(parameter) and not parameter.hidden:
            yield f"| {_names(parameter)} | {_in_cell(parameter.help or '')} |"
    yield ""


def _help(command: Any) -> tuple[str, list[str]]:
    """The text of a command's help, and its examples."""
    text, _, examples = inspect.cleandoc(command.help or "").partition("\b\nExamples:\n")
    return text.strip().replace("\n\n", "\n\n"), [line.strip() for line in examples.splitlines() if line.strip()]


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    if option.is_flag:
        return names
    value = option.metavar or option.type.name.upper()
    return f"{names} `{value}`".replace("|", "\\|")


def _in_cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def main(arguments: list[str]) -> int:
    """Write the page, or say whether it is up to date."""
    made = page()
    if "--check" not in arguments:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == made:
        return 0
    sys.stderr.write(f"{PAGE.name} is not what the app says: run make docs\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
