"""`cogtools verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from cogtools.cli.options import WRONG, Ema, Iteration, Json, Quiet
from cogtools.conversion.options import Format
from cogtools.errors import OptionError
from cogtools.layouts.family import SLUGS
from cogtools.render import text

if TYPE_CHECKING:
    from cogtools.verification.model_report import ModelVerifyReport
    from cogtools.verification.report import VerifyReport


def verify_command(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="OUT [LORA]...",
            show_default=False,
            help="A LoRA, or a whole model or parts of it: a folder or a file, or its URL. With --against BASE, the "
            "LoRAs that were merged into it; with --against LORA, the others that were.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="Compare every value, and the scale, with the checkpoint's."),
    ] = None,
    iteration: Iteration = None,
    ema: Ema = False,
    load: Annotated[
        bool, typer.Option("--load", help="Load it with diffusers and PEFT, into a model of the real size.")
    ] = False,
    format: Annotated[  # noqa: A002
        Format | None,
        typer.Option(
            metavar="|".join(get_args(Format)), show_default=False, help="Hold it against this program, not its own."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="|".join(SLUGS), help="The model, if the file does not tell."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="The number of layers of a model that is none of those.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Treat warnings as failures.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a LoRA or a model is complete, equals its checkpoint, and loads.

    Exit code: 0 verified, 1 something is wrong with it, 2 it could not be opened.

    \b
    Examples:
      cogtools verify out
      cogtools verify out --against ckpts/lora-disney --load
      cogtools verify pipeline --against ckpts/sft-disney
      cogtools verify merged --against CogVideoX-2b a.safetensors b.safetensors
    """
    from cogtools.checkpoint.paths import as_path
    from cogtools.render.json_object import report_json
    from cogtools.render.progress import Progress
    from cogtools.render.verify import show_verification
    from cogtools.verification.model_written import holds_model
    from cogtools.verification.verify import verify_lora
    from cogtools.verification.verify_model import verify_model

    out, *loras = paths
    if loras and against is None:
        raise OptionError(
            "verify takes one output, and others only to hold it against",
            found=" ".join(map(str, paths)),
            expected="cogtools verify OUT --against BASE LORA...",
        )
    sources = None if against is None else [against, *loras]
    with Progress("verifying", hidden=quiet or json) as progress:
        report: ModelVerifyReport | VerifyReport
        path = as_path(out)
        if holds_model(path):
            _refuse_for_models(layers, format)
            report = verify_model(
                path,
                against=sources,
                iteration=iteration,
                ema=ema,
                load=load,
                model=model,
                strict=strict,
                progress=progress.update,
                say=progress.say,
            )
        else:
            report = verify_lora(
                path,
                against=sources,
                iteration=iteration,
                ema=ema,
                load=load,
                format=format,
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


def _refuse_for_models(layers: int | None, format_: object) -> None:
    """Refuse the options that are for LoRAs only."""
    if layers is not None:
        raise OptionError("--layers is for LoRAs: a model's tensors say how many it has", hint="leave it out")
    if format_ is not None:
        raise OptionError("--format is for LoRAs: a model is held against the layout that it has", hint="leave it out")
