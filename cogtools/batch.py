"""Exporting many checkpoints at once: each into a folder of its own, side by side in processes.

One that fails does not stop the others. What is there already from an earlier run is left as it is if it still
verifies against its checkpoint, so that an interrupted batch can simply be started again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn, TypedDict

from cogtools.checkpoint.folder import find_file, find_run, iterations_in
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.storage import SourceFile, is_file, is_folder
from cogtools.convert import ExportReport, export_lora, output_path, prepare_export
from cogtools.errors import CheckpointError, CogtoolsError, OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from cogtools.options import ExportOptions, WriteOptions


class BatchChoice(TypedDict):
    """Which iterations of save folders are meant, as `plan_batch` takes it."""

    iteration: int | None
    ema: bool
    every: bool


class Job(NamedTuple):
    """One checkpoint of a batch.

    Attributes:
        given: what the user gave.
        file: the checkpoint file that it stands for; None if there is none.
        output: the file to write.
        error: why there is no checkpoint.
    """

    given: str
    file: Path | None
    output: Path | None
    error: CogtoolsError | None = None


@dataclass(frozen=True, slots=True)
class BatchItem:
    """What became of one checkpoint.

    Attributes:
        checkpoint: the file, or what the user gave if that is no checkpoint.
        output: the file that was written, or was there and is right.
        status: "done", "skipped" (it was there already, and verifies) or "failed".
        report: of an export that was done.
        error: why it failed.
    """

    checkpoint: str
    output: Path | None
    status: Literal["done", "skipped", "failed"]
    report: ExportReport | None = None
    error: dict[str, object] | None = None


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


def plan_batch(
    sources: Sequence[str], out: Path, *, iteration: int | None = None, ema: bool = False, every: bool = False
) -> list[Job]:
    """Find the checkpoint that each source stands for, and the folder in `out` that its LoRA goes to.

    Args:
        sources: checkpoint files and folders.
        out: the folder for all of them.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        every: take every iteration of a save folder.

    Raises:
        OptionError: if two of them would be written to one place.
    """
    found = [job for source in sources for job in _jobs(source, out, iteration, ema=ema, every=every)]
    jobs = list({job.given: job for job in found}.values())  # one that is given twice is exported once
    taken: dict[Path, str] = {}
    for job in jobs:
        if job.output is not None and taken.setdefault(job.output, job.given) != job.given:
            raise OptionError(
                "two checkpoints would be written to one place",
                file=job.output,
                found=f"{taken[job.output]} and {job.given}",
                hint="export one of them on its own, into another folder",
            )
    return jobs


def _jobs(source: str, out: Path, iteration: int | None, *, ema: bool, every: bool) -> list[Job]:
    path = Path(source)
    try:
        if every and is_folder(path) and (found := [item for item in iterations_in(path) if item.ema == ema]):
            files = [find_file(item.folder) for item in found]
        else:
            files = [find_file(path, iteration=iteration, ema=ema) if is_folder(path) else path]
    except CogtoolsError as error:
        return [Job(source, None, None, error)]
    return [Job(str(file), file, output_path(out / _name(file))) for file in files]


def _name(file: Path) -> str:
    """The folder for a checkpoint's LoRA: run and iteration, or what the file or its folder is called."""
    run = find_run(file)
    if run is not None:
        return f"{run.folder.name}-{run.chosen}"
    return file.absolute().parent.name if file.stem.startswith(("mp_rank_", "z3_rank_")) else file.stem


def export_many(jobs: Sequence[Job], options: ExportOptions, writing: WriteOptions) -> Iterator[BatchItem]:
    """Export the jobs' checkpoints, as many side by side as there are processors; yields each as it ends.

    A `KeyboardInterrupt` ends all of them, and none leaves a half-written file.
    """
    import multiprocessing

    todo = [job for job in jobs if job.file is not None]
    for job in jobs:
        if job.error is not None:
            yield BatchItem(job.given, None, "failed", error=job.error.to_dict())
    work = partial(export_one, options=options, writing=writing)
    processes = min(len(todo), os.cpu_count() or 1)
    if processes < 2:
        yield from map(work, todo)
        return
    with _signals_of_workers():
        pool = multiprocessing.Pool(processes, _set_signals_of_worker)
    with pool:
        yield from pool.imap_unordered(work, todo)


@contextlib.contextmanager
def _signals_of_workers() -> Iterator[None]:
    """Set the signals as workers have them, so that one that is just starting has them already."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _set_signals_of_worker()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _set_signals_of_worker() -> None:
    """Leave Ctrl-C to the main process, which ends its workers; they clean up behind themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(1)


def export_one(job: Job, options: ExportOptions, writing: WriteOptions) -> BatchItem:
    """Export one checkpoint of a batch; whatever is wrong with it is told in the result."""
    if job.file is None or job.output is None:
        raise ValueError("a job without a checkpoint")
    try:
        if not writing["overwrite"] and _is_done(job.file, job.output, options):
            return BatchItem(str(job.file), job.output, "skipped")
        report = export_lora(job.file, job.output, **options, **writing)
    except CogtoolsError as error:
        return BatchItem(str(job.file), job.output, "failed", error=error.to_dict())
    return BatchItem(str(job.file), job.output, "done", report=report)


def _is_done(file: Path, output: Path, options: ExportOptions) -> bool:
    """Whether the output is there already, is what these options make of the checkpoint, and verifies against it."""
    if not is_file(output):
        return False
    from cogtools.verification.verify import verify_lora

    with open_checkpoint(file) as checkpoint:
        header = prepare_export(checkpoint, **options).header
    try:
        with SourceFile.open(output) as written:
            if written.read(0, len(header)) != header:
                return False
        return verify_lora(output, against=file).verdict != "fail"
    except CheckpointError:
        return False
