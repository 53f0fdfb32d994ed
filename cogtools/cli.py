"""The command line: it parses the words, calls the library, shows the report, and chooses the exit code."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cogtools import __version__
from cogtools.errors import CogtoolsError, InterruptedByUserError, OptionError, PrintError
from cogtools.layouts.cogvideox import MODELS
from cogtools.options import Cast, ExportOptions, Scale, Sort, WriteOptions
from cogtools.render import text

if TYPE_CHECKING:
    from types import FrameType

    from cogtools.batch import BatchChoice

DONE = 0
WRONG = 1
COULD_NOT = 2
INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt

_CANNOT_PRINT = {errno.EBADF, errno.EIO, errno.ENOSPC, errno.EFBIG}

app = typer.Typer(
    name="cogtools",
    help="Export, inspect and verify CogVideoX LoRA checkpoints.",
    rich_markup_mode=None,  # plain help: long names stay whole, and nothing else has to be imported
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Iteration = Annotated[
    int | None, typer.Option(metavar="N", help="Take this iteration of a save folder, not the latest.")
]
Ema = Annotated[bool, typer.Option("--ema", help="Take the EMA weights (the folder N-ema).")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]


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


@app.command("export-lora", short_help="Export a checkpoint's LoRA for diffusers.")
def export_lora_command(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CHECKPOINT... OUT_DIR",
            show_default=False,
            help="A checkpoint (a file, an iteration's folder or the trainer's save folder), and where to write: a "
            "folder, or a file named .safetensors. With several checkpoints, or a folder and an OUT_DIR that ends "
            "in a slash, each gets a folder of its own in OUT_DIR.",
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(metavar="A", help="The training's lora_alpha, if training_config.yaml does not say.")
    ] = None,
    scale: Annotated[
        Scale,
        typer.Option(
            metavar="metadata|fold|none",
            help="How alpha/rank travels: stated in the header (for diffusers >= 0.34), multiplied into the weights "
            "(for everything else), or not at all.",
        ),
    ] = "metadata",
    dtype: Annotated[Cast, typer.Option(metavar="keep|fp32|fp16|bf16", help="Cast the tensors.")] = "keep",
    iteration: Iteration = None,
    ema: Ema = False,
    every: Annotated[bool, typer.Option("--all", help="Export every iteration of a save folder.")] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Accept a LoRA of some layers.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")] = False,
    sha256: Annotated[bool, typer.Option("--sha256", help="Print the output's SHA-256.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    sat_pt_path: Annotated[str | None, typer.Option("--sat_pt_path", hidden=True)] = None,
    lora_save_directory: Annotated[str | None, typer.Option("--lora_save_directory", hidden=True)] = None,
) -> None:
    """Export the LoRA of a SAT checkpoint as a file that diffusers loads at the right strength.

    \b
    Examples:
      cogtools export-lora ckpts/lora-disney out
      cogtools export-lora mp_rank_00_model_states.pt a.safetensors --scale fold
      cogtools export-lora ckpts/*/ loras/
    """
    from cogtools.checkpoint.storage import is_folder
    from cogtools.convert import export_lora
    from cogtools.render.export import show_export
    from cogtools.render.progress import Progress
    from cogtools.report import report_json

    *sources, out = _sources_and_output(paths or [], sat_pt_path, lora_save_directory)
    options = ExportOptions(
        alpha=alpha,
        scale=scale,
        dtype=dtype,
        allow_partial=allow_partial,
    )
    writing = WriteOptions(overwrite=overwrite, dry_run=dry_run, sha256=sha256)
    # As `cp` has it: a folder that goes into another one keeps a name of its own there.
    if len(sources) > 1 or every or (is_folder(Path(sources[0])) and out.endswith(("/", os.sep))):
        from cogtools.batch import BatchChoice

        chosen = BatchChoice(iteration=iteration, ema=ema, every=every)
        _export_many(sources, out, options, writing, chosen, json=json, quiet=quiet)
        return
    with Progress("writing", hidden=quiet or json) as progress:
        report = export_lora(
            sources[0],
            out,
            **options,
            **writing,
            iteration=iteration,
            ema=ema,
            progress=progress.update,
        )
    if json:
        text.emit(report_json("export-lora", "ok", report))
    elif not quiet:
        show_export(report)


def _sources_and_output(paths: list[str], sat_pt_path: str | None, lora_save_directory: str | None) -> list[str]:
    """The checkpoints and, last, the output, given as arguments or by the flags of CogVideo's own exporter."""
    words = [*filter(None, [sat_pt_path]), *paths, *filter(None, [lora_save_directory])]
    by_flags = sat_pt_path is not None or lora_save_directory is not None
    if len(words) < 2 or (by_flags and len(words) > 2):
        raise OptionError(
            "export-lora takes a checkpoint and a place for the output",
            found=" ".join(words) or "neither",
            expected="cogtools export-lora CHECKPOINT OUT_DIR",
            hint="cogtools export-lora --help",
        )
    return words


def _export_many(
    sources: list[str],
    out: str,
    options: ExportOptions,
    writing: WriteOptions,
    chosen: BatchChoice,
    *,
    json: bool,
    quiet: bool,
) -> None:
    from cogtools.batch import batch_report, export_many, plan_batch
    from cogtools.render.export import show_batch, show_batch_item
    from cogtools.report import report_json

    items = []
    for item in export_many(plan_batch(sources, Path(out), **chosen), options, writing):
        items.append(item)
        if not json:
            show_batch_item(item, quiet=quiet)
    report = batch_report(items)
    if json:
        text.emit(report_json("export-lora", "error" if report.failed else "ok", report))
    elif not quiet:
        show_batch(report)
    if report.failed:
        raise typer.Exit(COULD_NOT)


@app.command("inspect", short_help="Show what a checkpoint holds.")
def inspect_command(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="CHECKPOINT...", show_default=False, help="Files or folders."),
    ],
    keys: Annotated[
        list[str] | None,
        typer.Option("--keys", metavar="GLOB", help="List keys that match as a whole, or contain the text."),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="List only the LoRA.")] = False,
    section: Annotated[
        str | None, typer.Option(metavar="NAME", help="List only this section, such as transformer or vae.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Fold equal layers, so that all keys fit a screen.")] = False,
    sort: Annotated[Sort, typer.Option(metavar="key|size|offset", help="Sort the list.")] = "key",
    limit: Annotated[int | None, typer.Option(metavar="N", help="List at most N tensors.")] = None,
    offsets: Annotated[bool, typer.Option("--offsets", help="Show where in the file each tensor begins.")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the listed tensors: min, max, mean, std, norm, zeros, NaN, Inf.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the strength of a LoRA's updates (.png, .svg), or of two LoRAs."),
    ] = None,
    iteration: Iteration = None,
    ema: Ema = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds. No code in it is run; weights are read only for --stats and --plot.

    \b
    Examples:
      cogtools inspect ckpts/lora-disney --tree
      cogtools inspect mp_rank_00_model_states.pt --keys layers.0. --offsets
      cogtools inspect lora-disney/500 lora-disney/1000 --lora --plot moved.png
    """
    from cogtools.inspection.command import inspect_checkpoints
    from cogtools.inspection.selection import Selection
    from cogtools.render.progress import Progress

    selection = Selection(
        keys=tuple(keys or ()),
        lora=lora,
        section=section,
        sort=sort,
        limit=limit,
        offsets=offsets,
        statistics=stats,
        tree=tree,
    )
    with Progress("reading", hidden=json) as progress:
        report = inspect_checkpoints(
            paths, selection, iteration=iteration, ema=ema, plot=plot, progress=progress.update
        )
    if json:
        from cogtools.report import report_json

        text.emit(report_json("inspect", "ok", report))
    else:
        from cogtools.render.inspect import show_inspection

        show_inspection(report, tree=tree)


@app.command("verify", short_help="Prove that a LoRA is complete, faithful and loads.")
def verify_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="The LoRA: a folder or a file.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="CHECKPOINT", help="Compare every value, and the scale, with the checkpoint's."),
    ] = None,
    iteration: Iteration = None,
    ema: Ema = False,
    load: Annotated[
        bool, typer.Option("--load", help="Load it with diffusers and PEFT, into a model of the real size.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="|".join(model.slug for model in MODELS), help="The model, if the file does not tell."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="The number of layers of a model that is none of those.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as failures.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a LoRA is complete, equals its checkpoint, and loads at the right strength.

    Exit code: 0 verified, 1 something is wrong with it, 2 it could not be opened.

    \b
    Examples:
      cogtools verify out
      cogtools verify out --against ckpts/lora-disney --load
    """
    from cogtools.render.progress import Progress
    from cogtools.render.verify import show_verification
    from cogtools.report import report_json
    from cogtools.verification.verify import verify_lora

    with Progress("verifying", hidden=quiet or json) as progress:
        report = verify_lora(
            out,
            against=against,
            iteration=iteration,
            ema=ema,
            load=load,
            model=model,
            layers=layers,
            strict=strict,
            progress=progress.update,
            say=progress.say,
        )
    wrong = report.verdict == "fail"
    if json:
        text.emit(report_json("verify", "wrong" if wrong else "ok", report))
    else:
        show_verification(report, quiet=quiet)
    if wrong:
        raise typer.Exit(WRONG)


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
    from cogtools.report import error_json

    commands = [command.name for command in app.registered_commands]
    try:
        text.emit(error_json(next((word for word in arguments if word in commands), None), error))
    except PrintError as unprinted:
        text.error(unprinted)
