"""Exporting many checkpoints at once: each into a folder of its own, side by side in processes.

One that fails does not stop the others. What is there already from an earlier run is left as it is if it still
verifies against its checkpoint, so that an interrupted batch can simply be started again.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from cogtools.checkpoint.files import is_file, is_folder
from cogtools.checkpoint.folder import (
    TRAINER_FILES,
    WEIGHTS_FILES,
    find_file,
    find_run,
    find_save_folder,
    iterations_in,
)
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.shards import PIPELINE_INDEX, SHARD_INDEX_SUFFIXES
from cogtools.conversion.options import CASTS
from cogtools.conversion.record import ExportRecord, read_record
from cogtools.errors import CheckpointError, CogtoolsError, KilledError, OptionError, OutputError, command
from cogtools.export.export import ExportReport, export_checkpoint
from cogtools.export.workers import Death, run_side_by_side
from cogtools.layouts import diffusers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cogtools.conversion.options import ExportOptions
    from cogtools.verification.report import VerifyReport


class Job(NamedTuple):
    """One checkpoint of a batch.

    Attributes:
        given: what the user gave.
        file: the checkpoint file that it stands for; None if there is none.
        output: the file to write.
        error: why there is no checkpoint.
        reason: why it is left out.
    """

    given: str
    file: Path | None = None
    output: Path | None = None
    error: CogtoolsError | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class BatchItem:
    """What became of one checkpoint.

    Attributes:
        checkpoint: the file, or what the user gave if that is no checkpoint.
        output: the file for its LoRA; None if there is no checkpoint, or it is the folder for the outputs.
        status: "done", "skipped" or "failed".
        report: of an export that was done.
        error: why it failed.
        reason: why it was skipped.
    """

    checkpoint: str
    output: Path | None
    status: Literal["done", "skipped", "failed"]
    report: ExportReport | None = None
    error: CogtoolsError | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What became of all of them."""

    exports: tuple[BatchItem, ...]
    done: int
    skipped: int
    failed: int


def batch_report(items: Sequence[BatchItem]) -> BatchReport:
    """Count what became of the checkpoints."""
    counts = Counter(item.status for item in items)
    return BatchReport(tuple(items), counts["done"], counts["skipped"], counts["failed"])


def plan_batch(sources: Sequence[str], out: Path, options: ExportOptions, *, every: bool = False) -> list[Job]:
    """Find the checkpoint that each source stands for, and the folder in `out` that its LoRA goes to.

    Args:
        sources: checkpoint files and folders.
        out: the folder for all of them.
        options: among them, which iteration of a save folder is meant.
        every: take every iteration of a save folder.

    Raises:
        OptionError: if two of them would be written to one place, or `out` is no place to write to.
    """
    if every and options.iteration is not None:
        raise OptionError("--all takes every iteration: --iteration does not go with it", hint="leave one of them out")
    _refuse_as_output(out)
    jobs: list[Job] = []
    taken: dict[Path | str, Job] = {}
    for source in sources:
        for job in _jobs(source, out, options, every=every):
            other = taken.setdefault(job.output or job.given, job)
            if other is job:
                jobs.append(job)
            elif job.output is not None and not _is_same(Path(job.given), Path(other.given)):
                raise OptionError(
                    "two checkpoints would be written to one place",
                    file=job.output,
                    found=f"{other.given} and {job.given}",
                    hint="export one of them on its own, into another folder",
                )
    return jobs


def _refuse_as_output(out: Path) -> None:
    """Raise if the last argument is no folder to write to, because there is a file, or a training in it."""
    if is_file(out) or (out.suffix == ".safetensors" and not is_folder(out)):
        raise OptionError(
            "the last argument is the folder for all outputs, and this is a file",
            file=out,
            hint="name a folder as the last argument",
        )
    folders = [out, *(item.folder for item in iterations_in(out))] if is_folder(out) else []
    found = [folder / name for folder in folders for name in TRAINER_FILES if is_file(folder / name)]
    if found:
        raise OptionError(
            "the last argument is the folder for all outputs, and this is a trainer's",
            file=out,
            found=str(found[0]),
            expected="cogtools export-lora CHECKPOINT... OUT_DIR",
            hint="name the folder to write to as the last argument",
        )


def _jobs(source: str, out: Path, options: ExportOptions, *, every: bool) -> list[Job]:
    path = Path(source)
    if not is_folder(path):
        return [_job(source, out, lambda: path)]
    if _is_same(path, out):  # `*/ out/` names it, from the second time on
        return [Job(source, reason="this is the folder for the outputs")]
    try:
        save_folder = find_save_folder(path) if every else None
        chosen = [item.folder for item in iterations_in(save_folder) if item.ema == options.ema] if save_folder else []
    except CheckpointError as error:
        return [Job(source, error=error)]
    if chosen:
        return [_job(str(folder), out, partial(find_file, folder)) for folder in chosen]
    return [_job(source, out, lambda: find_file(path, iteration=options.iteration, ema=options.ema))]


def _job(given: str, out: Path, find: Callable[[], Path]) -> Job:
    try:
        file = find()
        return Job(str(file), file, out / _name(file) / diffusers.FILE_NAME)
    except CheckpointError as error:
        return Job(given, error=error)


def _is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or folder."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


_NAMED_AFTER_THEIR_FOLDER = ("mp_rank_", "z3_rank_", *WEIGHTS_FILES, PIPELINE_INDEX)


def _name(file: Path) -> str:
    """The folder for a checkpoint's LoRA: run and iteration, or what the file or its folder is called."""
    run = find_run(file)
    if run is not None:
        return f"{_folder_name(run.folder)}-{run.chosen}"
    if file.name.startswith(_NAMED_AFTER_THEIR_FOLDER) or file.name.endswith(SHARD_INDEX_SUFFIXES):
        return _folder_name(file.parent)
    return file.stem


def _folder_name(folder: Path) -> str:
    name = folder.absolute().name
    return folder.resolve().name if name == ".." else name


def export_many(jobs: Sequence[Job], options: ExportOptions) -> Iterator[BatchItem]:
    """Export the jobs' checkpoints, as many side by side as there are processors; yields each as it ends.

    A process that is killed takes its own job with it only. A `KeyboardInterrupt` ends all of them, and none leaves a
    half-written file.
    """
    for job in jobs:
        if job.error is not None:
            yield _failed(job, job.error)
        elif job.reason is not None:
            yield BatchItem(job.given, None, "skipped", reason=job.reason)
    todo = [job for job in jobs if job.file is not None]
    work = partial(export_one, options=options)
    processes = min(len(todo), os.cpu_count() or 1)
    if processes < 2:
        yield from map(work, todo)
        return
    for job, item in run_side_by_side(work, todo, processes):
        yield _killed(job, item) if isinstance(item, Death) else item


def _failed(job: Job, error: CogtoolsError) -> BatchItem:
    return BatchItem(job.given, job.output, "failed", error=error)


def _killed(job: Job, death: Death) -> BatchItem:
    error = KilledError(
        "the process that exported it was killed, perhaps because memory ran out",
        file=job.file,
        found=death.cause,
        hint="free some memory, or export this one on its own",
    )
    return _failed(job, error)


def export_one(job: Job, options: ExportOptions) -> BatchItem:
    """Export one checkpoint of a batch; whatever is wrong with it is in the result."""
    if job.file is None or job.output is None:
        raise ValueError("a job without a checkpoint")
    try:
        if not options.overwrite and _is_done(job.file, job.output, options):
            return BatchItem(job.given, job.output, "skipped", reason="there already, and verifies")
        # The file says which iteration it is.
        report = export_checkpoint(job.file, job.output, replace(options, iteration=None, ema=False))
    except CogtoolsError as error:
        return _failed(job, error)
    except Exception as error:  # noqa: BLE001 - a bug, or no memory: that ends this job, and not the others
        return _failed(
            job,
            CogtoolsError(
                "there was not enough memory" if isinstance(error, MemoryError) else "it failed unexpectedly",
                file=job.file,
                found=f"{type(error).__name__}: {error}",
                hint="export this one on its own to see more",
            ),
        )
    return BatchItem(job.given, job.output, "done", report=report)


class _Made(NamedTuple):
    """The options that an output was made with."""

    scale: str | None
    dtype: str | None
    alpha: float | None

    def __str__(self) -> str:
        return f"scale {self.scale}, dtype {self.dtype}, " + (f"--alpha {self.alpha}" if self.alpha else "no --alpha")


def _is_done(file: Path, output: Path, options: ExportOptions) -> bool:
    """Whether the output is there already, made with these options, and verifies against the checkpoint.

    Raises:
        OutputError: if it is there and is not.
    """
    if not is_file(output):
        return False
    from cogtools.verification.verify import verify_lora

    try:
        with open_checkpoint(output) as written:
            record = read_record(written.metadata)
        found, wanted = _made(record), _wanted(record, options)
        if found != wanted:
            raise OutputError(
                "the output is there already, and was made with other options",
                file=output,
                found=str(found),
                expected=str(wanted),
                hint="replace it with --overwrite, or give another folder",
            )
        report = verify_lora(output, against=file)
    except CheckpointError as error:
        if error.file != str(output):
            raise
        raise _not_right(file, output, error.what) from error
    if report.verdict == "fail":
        raise _not_right(file, output, _first_failure(report))
    return True


def _made(record: ExportRecord) -> _Made:
    return _Made(record.scale, record.dtype, record.alpha_by_hand)


def _wanted(record: ExportRecord, options: ExportOptions) -> _Made:
    dtype = record.source_dtype if options.dtype == "keep" else CASTS.get(options.dtype)
    return _Made(options.scale, dtype, options.alpha)


def _first_failure(report: VerifyReport) -> str:
    return next(f"{check.name}: {check.seen}" for check in report.checks if check.status == "fail")


def _not_right(file: Path, output: Path, found: str) -> OutputError:
    return OutputError(
        "the output is there already, and does not verify",
        file=output,
        found=found,
        hint=command("verify", output, "--against", file, advice="replace it with --overwrite; to see more"),
    )
