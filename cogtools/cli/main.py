"""The app: its commands, and how their errors are shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from cogtools.cli.export_lora import export_lora_command
from cogtools.cli.export_model import export_model_command
from cogtools.cli.inspect import inspect_command
from cogtools.cli.merge import merge_command
from cogtools.cli.options import COULD_NOT, DONE, INTERRUPTED
from cogtools.cli.verify import verify_command
from cogtools.errors import CogtoolsError, InterruptedByUserError, OptionError, PrintError
from cogtools.render import text
from cogtools.system import as_cogtools_error, prepare_libraries
from cogtools.version import __version__


def _show_help(context: Any, _option: object, value: bool) -> None:
    """Print the help as results are printed: Typer's own way ends with exit code 1 if the reader closes the pipe."""
    if value and not context.resilient_parsing:
        text.emit(context.get_help())
        raise typer.Exit


class _Command(TyperCommand):
    def get_help_option(self, ctx: Any) -> Any:
        return _shown_by_us(super().get_help_option(ctx))


class _Group(TyperGroup):
    def get_help_option(self, ctx: Any) -> Any:
        return _shown_by_us(super().get_help_option(ctx))


def _shown_by_us(help_option: TyperOption | None) -> TyperOption | None:
    if help_option is not None:
        help_option.callback = _show_help
    return help_option


app = typer.Typer(
    name="cogtools",
    cls=_Group,
    help="Export, merge, inspect and verify CogVideoX checkpoints: LoRAs and whole models.",
    rich_markup_mode=None,  # plain help: long names stay whole, and nothing else has to be imported
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("export-lora", cls=_Command, short_help="Export a LoRA for diffusers, ComfyUI and others.")(
    export_lora_command
)
app.command("export-model", cls=_Command, short_help="Export a whole model for diffusers, or back for SAT.")(
    export_model_command
)
app.command("merge", cls=_Command, short_help="Merge LoRAs into base weights, or into one LoRA.")(merge_command)
app.command("inspect", cls=_Command, short_help="Show what a checkpoint holds.")(inspect_command)
app.command("verify", cls=_Command, short_help="Prove that a LoRA or a model is whole and loads.")(verify_command)


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
    try:
        prepare_libraries()
        code = app(arguments or ["--help"], prog_name="cogtools", standalone_mode=False)
    except KeyboardInterrupt:  # Typer catches one that comes while a command runs, not before
        code = INTERRUPTED
    except (Exception, SystemExit) as error:
        known = _known(arguments, error)
        if known is None:
            raise
        _fail(arguments, known)
        return COULD_NOT
    if code == INTERRUPTED:
        _fail(arguments, InterruptedByUserError("interrupted: nothing was left half-written"))
    return code if isinstance(code, int) else DONE


def _known(arguments: list[str], error: Exception | SystemExit) -> CogtoolsError | None:
    """What to tell of an exception; None if it is a bug, or just the end."""
    if isinstance(error, typer.TyperException):
        return _usage_error(arguments, error)
    if isinstance(error, SystemExit):
        # Typer answers a broken pipe, whichever it is, with exit code 1: that a file was checked and found wrong.
        pipe = error.__context__
        return as_cogtools_error(pipe) if isinstance(pipe, BrokenPipeError) else None
    return as_cogtools_error(error)


def _usage_error(arguments: list[str], error: typer.TyperException) -> OptionError:
    command = " ".join(filter(None, ["cogtools", _command_in(arguments)]))
    return OptionError(error.format_message().rstrip("."), hint=f"{command} --help")


def _command_in(arguments: list[str]) -> str | None:
    commands = [command.name for command in app.registered_commands]
    return next((word for word in arguments if word in commands), None)


def _fail(arguments: list[str], error: CogtoolsError) -> None:
    if "--json" not in arguments or isinstance(error, PrintError):
        text.error(error)
        return
    from cogtools.render.json_object import error_json

    try:
        text.emit(error_json(_command_in(arguments), error))
    except PrintError as unprinted:
        text.error(unprinted)
