"""Exporting many checkpoints at once, LoRAs or whole models, each into a folder of its own.

One that fails does not stop the others. Outputs of an earlier run that still verify against their checkpoints are
skipped, so that an interrupted batch can simply be started again.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from cogtools.checkpoint.folder import find_file, find_save_folder, has_pattern, iterations_in, matching
from cogtools.checkpoint.names import TRAINER_FILES
from cogtools.checkpoint.paths import RemotePath, as_path
from cogtools.checkpoint.places import is_file, is_folder, store_of
from cogtools.conversion.options import ExportOptions
from cogtools.errors import CheckpointError, CogtoolsError, KilledError, OptionError
from cogtools.export.names import run_name
from cogtools.system import as_cogtools_error

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from concurrent.futures import Executor, Future

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.run import Iteration
    from cogtools.conversion.options import ModelOptions
    from cogtools.export.export import ExportReport
    from cogtools.export.model_report import ModelExportReport
    from cogtools.export.names import Target

    BatchOptions = ExportOptions | ModelOptions


class Work(Protocol):
    """What a batch does with each of its checkpoints."""

    def target(self, folder: AnyPath, file: AnyPath, /) -> Target:
        """Where the output of a checkpoint is written, in a folder of its own."""

    def is_done(self, file: AnyPath, target: Target) -> bool:
        """Whether that is there already, and right.

        Raises:
            OutputError: if it is there, and is not right.
        """

    def export(self, file: AnyPath, target: Target) -> ExportReport | ModelExportReport:
        """Write it."""


def work_of(options: BatchOptions) -> Work:
    """What a batch with these options does."""
    if isinstance(options, ExportOptions):
        from cogtools.export.batch_lora import LoraWork

        return LoraWork(options)
    from cogtools.export.batch_model import ModelWork

    return ModelWork(options)


class Job(NamedTuple):
    """One checkpoint of a batch.

    Attributes:
        given: the path that the user gave.
        file: the checkpoint file that it stands for; None if there is none.
        target: where it is written.
        error: why there is no checkpoint.
        reason: why it is skipped.
    """

    given: str
    file: AnyPath | None = None
    target: Target | None = None
    error: CogtoolsError | None = None
    reason: str | None = None

    @property
    def output(self) -> AnyPath | None:
        """The file of tensors to write, or the folder of a model."""
        return None if self.target is None else self.target.file


@dataclass(frozen=True, slots=True)
class BatchItem:
    """The result for one checkpoint.

    Attributes:
        checkpoint: the file, or the path that the user gave if that is not a checkpoint.
        output: the file for its LoRA, or the folder for its model; None if there is no checkpoint, or it is the output
            folder.
        status: "done", "skipped" or "failed".
        report: of an export that was done.
        error: why it failed.
        reason: why it was skipped.
    """

    checkpoint: str
    output: AnyPath | None
    status: Literal["done", "skipped", "failed"]
    report: ExportReport | ModelExportReport | None = None
    error: CogtoolsError | None = None
    reason: str | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether what was written was checked and found wrong."""
        verification = getattr(self.report, "verification", None)
        return verification is not None and verification.verdict == "fail"


@dataclass(frozen=True, slots=True)
class BatchReport:
    """The results for all checkpoints."""

    exports: tuple[BatchItem, ...]
    done: int
    skipped: int
    failed: int

    @property
    def status(self) -> Literal["ok", "wrong", "error"]:
        """The worst that came of one of them."""
        if self.failed:
            return "error"
        return "wrong" if any(item.is_wrong for item in self.exports) else "ok"


def batch_report(items: Sequence[BatchItem]) -> BatchReport:
    """Count the results."""
    counts = Counter(item.status for item in items)
    return BatchReport(tuple(items), counts["done"], counts["skipped"], counts["failed"])


def plan_batch(sources: Sequence[str], out: AnyPath, options: BatchOptions, *, every: bool = False) -> list[Job]:
    """Find the checkpoint that each source stands for, and the folder in `out` that its output goes to.

    Args:
        sources: checkpoint files and folders; URLs may have patterns.
        out: the folder for all of them.
        options: those of an export of LoRAs, or of whole models; among them, which iteration of a save folder to take.
        every: take every iteration of a save folder.

    Raises:
        OptionError: if two of them would be written to one place, or `out` cannot be the output folder.
    """
    if every and options.iteration is not None:
        raise OptionError("--all takes every iteration: --iteration does not go with it", hint="leave one of them out")
    _refuse_as_output(out)
    jobs: list[Job] = []
    taken: dict[object, Job] = {}
    for source, path in chain.from_iterable(map(_expanded, sources)):
        for job in _jobs(source, path, out, options, every=every):
            name, folder = _place(job)
            other = taken.get(folder) or taken.get(name)
            if other is None or _are_two_folders(folder, _place(other)[1]):
                jobs.append(job)
                taken.update({name: job, folder: job})
            elif job.output is not None and not _is_same(as_path(job.given), as_path(other.given)):
                raise _one_place(job, other, is_one=folder == _place(other)[1])
    return jobs


def _place(job: Job) -> tuple[str, object]:
    """Where a job writes to: its folder's name, as file systems that ignore case compare it, and which folder that is.

    Where there is no such folder yet, the second is the path; without an output, both are what was given.
    """
    if job.target is None:
        return job.given, job.given
    folder = job.target.folder
    name = unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(folder)).casefold())
    if isinstance(folder, RemotePath):
        return str(folder), folder
    try:
        status = folder.stat()
    except (OSError, ValueError):
        return name, str(folder)
    return name, (status.st_dev, status.st_ino)


def _are_two_folders(one: object, other: object) -> bool:
    """Whether they are known to be different: where one of them is there, the other name would lead to it too."""
    return one != other and (isinstance(one, tuple) or isinstance(other, tuple))


def _one_place(job: Job, other: Job, *, is_one: bool) -> OptionError:
    what = "two checkpoints would be written to one place"
    if not is_one:
        what = "two outputs have names that are the same on file systems that ignore case"
    return OptionError(
        what,
        file=job.output,
        found=f"{other.given} and {job.given}",
        hint="export one of them on its own, into another folder",
    )


def _refuse_as_output(out: AnyPath) -> None:
    """Raise if the last argument cannot be the output folder: it is a file, or holds a training."""
    if is_file(out) or (out.suffix == ".safetensors" and not is_folder(out)):
        raise OptionError(
            "the last argument is the output folder, but this is a file",
            file=out,
            hint="name a folder as the last argument",
        )
    folders = [out, *(item.folder for item in iterations_in(out))] if is_folder(out) else []
    found = [folder / name for folder in folders for name in TRAINER_FILES if is_file(folder / name)]
    if found:
        raise OptionError(
            "the last argument is the output folder, but this folder holds a training",
            file=out,
            found=str(found[0]),
            expected="CHECKPOINT... OUT_DIR",
            hint="name the folder to write to as the last argument",
        )


def _expanded(source: str) -> list[tuple[str, AnyPath | CheckpointError]]:
    """The paths that a pattern in a URL fits, as text too; of a path of this machine a shell has done that."""
    path = as_path(source)
    if not isinstance(path, RemotePath):
        return [(source, path)]
    if not has_pattern(path):
        return [(str(path), path)]
    try:
        return [(str(found), found) for found in matching(path)]
    except CheckpointError as error:
        return [(str(path), error)]


def _jobs(
    source: str, path: AnyPath | CheckpointError, out: AnyPath, options: BatchOptions, *, every: bool
) -> list[Job]:
    if isinstance(path, CheckpointError):
        return [Job(source, error=path)]
    try:
        is_one_file = not is_folder(path)
    except CheckpointError as error:  # a server that does not answer
        return [Job(source, error=error)]
    if is_one_file:
        return [_job(source, out, options, lambda: path)]
    if every and isinstance(path, RemotePath) and not store_of(path).lists:
        raise OptionError(
            f"{path.scheme}:// lists nothing: --all needs a store that lists",
            found=source,
            hint="name the iterations one by one",
        )
    if _is_same(path, out):  # `*/ out/` names it, from the second time on
        return [Job(source, reason="this is the output folder")]
    try:
        chosen = [item.folder for item in _all_iterations(path) if item.ema == options.ema] if every else []
    except CheckpointError as error:
        return [Job(source, error=error)]
    if chosen:
        return [_job(str(folder), out, options, partial(find_file, folder)) for folder in chosen]
    return [_job(source, out, options, lambda: find_file(path, iteration=options.iteration, ema=options.ema))]


def _all_iterations(folder: AnyPath) -> list[Iteration]:
    """The iterations in a save folder, which is listed once, or in the only save folder in a folder."""
    iterations = iterations_in(folder)
    if iterations:
        return iterations
    save_folder = find_save_folder(folder)
    return [] if save_folder is None else iterations_in(save_folder)


def _job(given: str, out: AnyPath, options: BatchOptions, find: Callable[[], AnyPath]) -> Job:
    try:
        file = find()
        return Job(str(file), file, work_of(options).target(out / run_name(file), file))
    except CheckpointError as error:
        return Job(given, error=error)


def _is_same(one: AnyPath, other: AnyPath) -> bool:
    """Whether two paths lead to the same file or folder."""
    try:
        return one == other or (isinstance(one, Path) and isinstance(other, Path) and one.samefile(other))
    except OSError:
        return False


def export_many(
    jobs: Sequence[Job], options: BatchOptions, executor: Executor | None = None
) -> Generator[BatchItem, None, None]:
    """Export the jobs' checkpoints side by side; yields each as it ends.

    A worker that is killed takes its own job with it only. Whatever ends the iteration before its end, Ctrl-C or
    `close` for example, cancels the other jobs, and none leaves a half-written file.

    Args:
        jobs: what to export.
        options: how.
        executor: carries out `export_one(job, options)`; None starts as many processes as there are processors.
    """
    for job in jobs:
        if job.error is not None:
            yield _failed(job, job.error)
        elif job.reason is not None:
            yield BatchItem(job.given, None, "skipped", reason=job.reason)
    todo = [job for job in jobs if job.file is not None]
    if executor is not None:
        yield from _side_by_side(todo, options, executor)
        return
    pool = _worker_pool(min(len(todo), os.cpu_count() or 1))
    if pool is None:
        yield from (export_one(job, options) for job in todo)
        return
    with pool:
        yield from _side_by_side(todo, options, pool)


def _worker_pool(processes: int) -> Executor | None:
    """So many processes, or fewer; None if this one does as well, or the system does not allow others."""
    if processes < 2:
        return None
    from cogtools.export.workers import WorkerPool

    try:
        return WorkerPool(processes)
    except OSError:
        return None


_HEARD_SECONDS = 1.0
"""How late a signal is heard at most that arrives just before the wait for the next result begins."""


def _side_by_side(jobs: Sequence[Job], options: BatchOptions, executor: Executor) -> Iterator[BatchItem]:
    from concurrent.futures import as_completed

    running: dict[Future[BatchItem], Job] = {}
    options = _on_any_machine(options)

    def outcomes(jobs: Sequence[Job]) -> Iterator[tuple[Job, BatchItem]]:
        for job in jobs:
            running[_submitted(executor, _absolute(job), options)] = job
        while running:
            with contextlib.suppress(TimeoutError):
                for future in as_completed(running, timeout=_HEARD_SECONDS):
                    job = running.pop(future)
                    yield job, _outcome(job, future)

    lost: list[tuple[Job, BatchItem]] = []
    try:
        for job, item in outcomes(jobs):
            if isinstance(item.error, _LostError):
                lost.append((job, item))
            else:
                yield item
        if len(lost) == 1:
            yield lost[0][1]
        else:  # a worker that one of them ends takes others with it: who fails alone fails by itself
            for job, first in lost:
                for _, item in outcomes([job]):
                    yield first if isinstance(item.error, _LostError) else item
    finally:
        for future in running:
            future.cancel()


class _LostError(KilledError):
    """A worker was gone, through this job or through another that it had."""


def _absolute(job: Job) -> Job:
    """The same job for whoever carries it out: on another machine, another folder is the current one."""
    if job.file is None or job.target is None:
        return job
    target = job.target._replace(folder=job.target.folder.absolute(), file=job.target.file.absolute())
    return job._replace(file=job.file.absolute(), target=target)


def _on_any_machine(options: BatchOptions) -> BatchOptions:
    """The same options, for the same reason."""
    base = None if options.base is None else str(as_path(options.base).absolute())
    if isinstance(options, ExportOptions):
        return replace(options, base=base)
    return replace(options, base=base, vae=None if options.vae is None else str(as_path(options.vae).absolute()))


def _submitted(executor: Executor, job: Job, options: BatchOptions) -> Future[BatchItem]:
    try:
        return executor.submit(export_one, job, options)
    except Exception as error:  # noqa: BLE001 - an executor that is broken fails the jobs that it does not take
        from concurrent.futures import Future

        failed: Future[BatchItem] = Future()
        failed.set_exception(error)
        return failed


def _outcome(job: Job, future: Future[BatchItem]) -> BatchItem:
    try:
        return future.result()
    except KilledError as error:
        error.file = str(job.file)
        return _failed(job, error)
    except Exception as error:  # noqa: BLE001 - every executor has its own for a worker that is gone
        return _failed(
            job,
            _LostError(
                "the worker that exported it did not return a result",
                file=job.file,
                found=f"{type(error).__name__}: {error}",
                hint="run the same command again: outputs that exist and verify are skipped",
            ),
        )


def _failed(job: Job, error: CogtoolsError) -> BatchItem:
    return BatchItem(job.given, job.output, "failed", error=error)


def export_one(job: Job, options: BatchOptions) -> BatchItem:
    """Export one checkpoint of a batch. An error is in the result, not raised."""
    if job.file is None or job.target is None:
        raise ValueError("this job has no checkpoint")
    try:
        work = work_of(options)
        if not options.overwrite and work.is_done(job.file, job.target):
            return BatchItem(job.given, job.output, "skipped", reason="exists already and verifies")
        report = work.export(job.file, job.target)
    except Exception as error:  # noqa: BLE001 - a bug, or no memory: that ends this job, and not the others
        known = as_cogtools_error(error) or _bug(error)
        known.file = known.file or str(job.file)
        return _failed(job, known)
    return BatchItem(job.given, job.output, "done", report=report)


def _bug(error: Exception) -> CogtoolsError:
    found = f"{type(error).__name__}: {error}"
    return CogtoolsError("it failed unexpectedly", found=found, hint="export this one on its own to see more")
