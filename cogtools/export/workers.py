"""Jobs side by side in processes, any of which may be killed without taking the others with it.

Not multiprocessing.Pool, which waits for ever for the result of a worker that was killed, and not
concurrent.futures.ProcessPoolExecutor, which gives up all workers when one dies, cannot say whose job that was, and
has no way to end them before Python 3.14. Here every worker has a pipe of its own: it ends when the process does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Generic, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection
    from types import FrameType

J = TypeVar("J")
R = TypeVar("R")

_ENDING = (signal.SIGINT, signal.SIGTERM)


class Death(NamedTuple):
    """What stands for the result of a job whose process died; the exit code is that of `multiprocessing.Process`."""

    exit_code: int | None

    @property
    def cause(self) -> str:
        """What ended the process: "signal 9 (SIGKILL)"."""
        if self.exit_code is not None and self.exit_code < 0:
            return f"signal {-self.exit_code} ({signal.Signals(-self.exit_code).name})"
        return f"exit code {self.exit_code}"


def run_side_by_side(work: Callable[[J], R], jobs: Iterable[J], processes: int) -> Iterator[tuple[J, R | Death]]:
    """Do jobs in so many processes; yields each with its result as it ends.

    Whatever ends the iteration before its end, a `KeyboardInterrupt` for one, ends the processes: by SIGTERM, which
    raises SystemExit in them, so that they clean up behind themselves.

    Args:
        work: does a job; it has to answer for its exceptions.
        jobs: what to do.
        processes: how many, at least one.
    """
    waiting = iter(jobs)
    busy: dict[Connection, tuple[_Worker[J, R], J]] = {}

    def occupy(worker: _Worker[J, R]) -> None:
        for job in waiting:
            busy[worker.connection] = worker, job
            worker.begin(job)
            return
        worker.end()

    try:
        for _ in range(processes):
            occupy(_Worker(work))
        while busy:
            for connection in wait(list(busy)):
                worker, job = busy.pop(connection)  # type: ignore[call-overload]  # they are connections, all of them
                result = worker.result()
                occupy(_Worker(work) if isinstance(result, Death) else worker)
                yield job, result
    finally:
        for worker, _ in busy.values():
            worker.process.terminate()
        for worker, _ in busy.values():
            worker.end()


class _Worker(Generic[J, R]):
    """A process that does one job after the other, and the pipe to it."""

    def __init__(self, work: Callable[[J], R]) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(work, theirs, self.connection), daemon=True)
        with _signals_held_back():
            self.process.start()
        theirs.close()

    def begin(self, job: J) -> None:
        with contextlib.suppress(OSError):  # it has died: its result will say so
            self.connection.send(job)

    def result(self) -> R | Death:
        try:
            result: R = self.connection.recv()
        except (EOFError, OSError):
            self.end()
            return Death(self.process.exitcode)
        return result

    def end(self) -> None:
        self.process.terminate()
        self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let signals wait while a process starts: it would not know yet what to do about them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(work: Callable[[J], R], connection: Connection, parents_end: Connection) -> None:
    """What a worker does. Ctrl-C it leaves to the main process, which ends its workers."""
    parents_end.close()  # or the pipe would not end with the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the main process is gone
        while True:
            connection.send(work(connection.recv()))


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(1)
