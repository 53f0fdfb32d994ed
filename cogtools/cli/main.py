"""The app: its commands, and what becomes of their errors."""

from __future__ import annotations

import errno
import signal
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cogtools.cli.export_lora import export_lora_command
from cogtools.cli.inspect import inspect_command
from cogtools.cli.merge import merge_command
from cogtools.cli.options import COULD_NOT, DONE, INTERRUPTED
from cogtools.cli.verify import verify_command
from cogtools.errors import CogtoolsError, InterruptedByUserError, OptionError, PrintError
from cogtools.render import text
from cogtools.version import __version__

if TYPE_CHECKING:
    from types import FrameType

_CANNOT_PRINT = {errno.EBADF, errno.EIO, errno.ENOSPC, errno.EFBIG}

app = typer.Typer(
    name="cogtools",
    help="Export, merge, inspect and verify CogVideoX LoRA checkpoints.",
    rich_markup_mode=None,  # plain help: long names stay whole, and nothing else has to be imported
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("export-lora", short_help="Export a checkpoint's LoRA for diffusers.")(export_lora_command)
app.command("merge", short_help="Merge LoRAs into base weights, or into one LoRA.")(merge_command)
app.command("inspect", short_help="Show what a checkpoint holds.")(inspect_command)
app.command("verify", short_help="Prove that a LoRA is complete, faithful and loads.")(verify_command)


def _show_version(value: bool) -> None:
    if value:
        text.emit(f"cogtools {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Carry out a command line; the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(arguments or ["--help"], prog_name="cogtools", standalone_mode=False)
    except CogtoolsError as error:
        _fail(arguments, error)
        return COULD_NOT
    except typer.TyperException as error:
        _fail(arguments, _usage_error(error))
        return COULD_NOT
    except KeyboardInterrupt:  # Typer answers for one that comes while a command runs, not before
        code = INTERRUPTED
    except OSError as error:
        _fail(arguments, _system_error(error))
        return COULD_NOT
    except ModuleNotFoundError as error:
        _fail(arguments, _missing_library(error))
        return COULD_NOT
    if code == INTERRUPTED:
        _fail(arguments, InterruptedByUserError("interrupted: nothing was left half-written"))
    return code if isinstance(code, int) else DONE


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _system_error(error: OSError) -> CogtoolsError:
    """What can be said of an error of the system that is about no file. Any other is a bug, and raised again."""
    if error.filename is None and error.errno in _CANNOT_PRINT:
        return PrintError(error)  # Typer prints the help itself
    raise error


def _missing_library(error: ModuleNotFoundError) -> CogtoolsError:
    """What can be said where cogtools was installed without all that it needs. A module of its own missing is a bug."""
    library = (error.name or "").partition(".")[0]
    if library in ("", "cogtools"):
        raise error
    return OptionError(f"this needs {library}, which is not installed", hint=f"pip install {library}")


def _usage_error(error: typer.TyperException) -> OptionError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "cogtools"
    return OptionError(error.format_message().rstrip("."), hint=f"{command} --help")


def _fail(arguments: list[str], error: CogtoolsError) -> None:
    if "--json" not in arguments or isinstance(error, PrintError):
        text.error(error)
        return
    from cogtools.render.json_object import error_json

    commands = [command.name for command in app.registered_commands]
    try:
        text.emit(error_json(next((word for word in arguments if word in commands), None), error))
    except PrintError as unprinted:
        text.error(unprinted)
