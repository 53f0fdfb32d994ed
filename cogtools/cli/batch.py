"""One run of a command over many checkpoints: `export-lora` and `export-model` share it."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import typer

from cogtools.cli.options import COULD_NOT, WRONG
from cogtools.errors import OptionError, PrintError
from cogtools.render import text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cogtools.conversion.options import ExportOptions, ModelOptions
    from cogtools.export.batch import BatchItem


def refuse_empty(command: str, words: Sequence[str], expected: str) -> None:
    """Raise an `OptionError` if one of a command's arguments is empty: it would be the current folder."""
    if "" in words:
        raise OptionError(
            f"an argument of {command} is empty",
            found=" ".join(map(repr, words)),
            expected=expected,
            hint="look whether a shell variable in the command has no value",
        )


def refuse_arguments(command: str, words: Sequence[str], expected: str, *, is_wrong: bool = False) -> None:
    """Raise an `OptionError` if these are not checkpoints and an output, or one of them is empty."""
    refuse_empty(command, words, expected)
    if len(words) < 2 or is_wrong:
        raise OptionError(
            f"{command} takes a checkpoint and a place for the output",
            found=" ".join(words) or "neither",
            expected=expected,
            hint=f"cogtools {command} --help",
        )


def is_batch(sources: Sequence[str], *, every: bool, dask: str | None) -> bool:
    """Whether each checkpoint gets a folder of its own in the output."""
    from cogtools.checkpoint.folder import has_pattern
    from cogtools.checkpoint.paths import as_path

    return len(sources) > 1 or every or dask is not None or has_pattern(as_path(sources[0]))


def goes_into(source: str, out: str) -> bool:
    """Whether a folder goes into another one, as `cp` has it: it keeps a name of its own there."""
    from cogtools.checkpoint.paths import as_path
    from cogtools.checkpoint.places import is_folder

    return out.endswith(("/", os.sep)) and is_folder(as_path(source))


def run_batch(
    command: str,
    sources: Sequence[str],
    out: str,
    options: ExportOptions | ModelOptions,
    *,
    every: bool,
    dask: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Export all of them, and print each as it ends."""
    from cogtools.checkpoint.paths import as_path
    from cogtools.export.batch import batch_report, export_many, plan_batch
    from cogtools.render.batch import show_batch, show_batch_item
    from cogtools.render.json_object import report_json

    items: list[BatchItem] = []
    unprinted: PrintError | None = None

    def try_to(show: Callable[..., None], *words: object, **how: bool) -> None:
        """Print, and go on if that fails: the exports are what matters."""
        nonlocal unprinted
        try:
            show(*words, **how)
        except PrintError as error:
            unprinted = unprinted or error

    jobs = plan_batch(sources, as_path(out), options, every=every)
    with ExitStack() as stack:
        executor = None
        if dask is not None:
            from cogtools.export.cluster import dask_executor

            executor = stack.enter_context(dask_executor(dask))
        for item in stack.enter_context(closing(export_many(jobs, options, executor))):
            items.append(item)
            if not json:
                try_to(show_batch_item, item, quiet=quiet)
    report = batch_report(items)
    if json:
        try_to(text.emit, report_json(command, report.status, report))
    elif not quiet:
        try_to(show_batch, report)
    if unprinted is not None:
        raise unprinted
    if report.status != "ok":
        raise typer.Exit(COULD_NOT if report.status == "error" else WRONG)
