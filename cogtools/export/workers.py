"""Processes that do jobs side by side, as a `concurrent.futures.Executor`: one that dies costs its own job only.

Not concurrent.futures.ProcessPoolExecutor, which fails all jobs when one of its processes dies, and cannot end them
before Python 3.14. Here every process has a pipe of its own, which ends when the process does, and a thread that waits
for it.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import Executor, Future
from multiprocessing.connection import wait
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

from cogtools.errors import KilledError
from cogtools.interruption import ignore_signals, let_signals_in, raise_on_signals, signals_held_back

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from multiprocessing.connection import Connection

P = ParamSpec("P")
T = TypeVar("T")

_END_SECONDS = 5.0
"""How long processes may take to clean up after SIGTERM, before they are killed."""

_ASK_SECONDS = 0.25
"""How often they are asked to end: a signal that arrives just before a system call does not interrupt that call."""

_PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
"""How processes are started. A fork has all modules already that the main process has; elsewhere it is not safe."""

_STARTING = threading.Lock()
"""Held while a process starts: another one that starts meanwhile would inherit both ends of its pipe, which then would
not end with the process."""


class WorkerPool(Executor):
    """Processes that carry out functions. A future whose process was killed raises `KilledError`.

    In a `with` statement, a block that ends well waits for all futures. One that ends with an exception, Ctrl-C for
    one, ends the processes: by SIGTERM, which raises KeyboardInterrupt in them, so that they clean up.

    Args:
        processes: how many processes; fewer if the system does not allow as many.

    Raises:
        OSError: if the system does not allow a single one.
    """

    def __init__(self, processes: int) -> None:
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._workers: set[_Worker] = set()
        self._threads: list[threading.Thread] = []
        self._is_shut_down = False
        self._is_ending = False
        try:
            with signals_held_back():  # not heard by the threads: it is the main thread that a signal has to wake
                self._start(processes)
        except BaseException:
            self.terminate_workers()
            raise

    def _start(self, processes: int) -> None:
        workers: list[_Worker] = []
        for _ in range(processes):
            try:
                workers.append(self._new_worker())
            except OSError:
                if not workers:
                    raise
                break
        for worker in workers:
            thread = threading.Thread(target=self._work, args=(worker,), name="cogtools-worker", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads
                self._end(worker)
            else:
                self._threads.append(thread)
        if not self._threads:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def _new_worker(self) -> _Worker:
        with _STARTING:
            if self._is_ending:
                raise InterruptedError
            worker = _Worker()
            self._workers.add(worker)
            return worker

    def _end(self, worker: _Worker) -> None:
        _end([worker])
        worker.connection.close()
        self._workers.discard(worker)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Let a process carry out a function; it, its arguments and its result have to be picklable."""
        if self._is_shut_down:
            raise RuntimeError("cannot submit to a pool that was shut down")
        future: Future[T] = Future()
        self._tasks.put(_Task(future, (fn, args, kwargs)))
        return future

    def _work(self, worker: _Worker | None) -> None:
        """What a thread does: hand tasks to its process, and replace that if it dies."""
        while (task := self._tasks.get()) is not None:
            if not task.future.set_running_or_notify_cancel():
                continue
            try:
                worker = worker or self._new_worker()
                result = worker.call(task.call)
            except _DiedError as death:
                self._end(death.worker)
                worker = None
                try:
                    worker = self._replacement()
                finally:  # whatever that raises ends this thread: nobody is to wait for ever
                    task.future.set_exception(_killed(death.worker.process.exitcode))
                if worker is None and self._workers:
                    return  # the others go on
            except BaseException as error:  # noqa: BLE001 - raised by the function, and raised again by `result`
                task.future.set_exception(error)
            else:
                task.future.set_result(result)
        if worker is not None:
            self._end(worker)

    def _replacement(self) -> _Worker | None:
        """A new process; None if the system does not allow one now."""
        try:
            return self._new_worker()
        except OSError:
            return None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks, and end the processes when all are done."""
        self._is_shut_down = True
        if cancel_futures:
            self._cancel_waiting()
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                while thread.is_alive():
                    thread.join(1.0)  # a signal that arrives just before this is heard after it

    def terminate_workers(self) -> None:
        """End the processes now, whatever they do: they have a few seconds to clean up."""
        with _STARTING:
            self._is_ending = True
            workers = list(self._workers)
        self._cancel_waiting()
        _end(workers)
        self.shutdown()

    def _cancel_waiting(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                task = self._tasks.get_nowait()
                if task is not None and task.future.cancel():
                    task.future.set_running_or_notify_cancel()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if error is None:
                self.shutdown()
        finally:
            self.terminate_workers()


class _Task(NamedTuple):
    future: Future[Any]
    call: tuple[Callable[..., object], tuple[object, ...], dict[str, object]]


class _DiedError(Exception):
    """A process has ended while it had something to do."""

    def __init__(self, worker: _Worker) -> None:
        super().__init__()
        self.worker = worker


class _Worker:
    """A process that carries out one function after the other, and the pipe to it."""

    def __init__(self) -> None:
        self.connection, theirs = _PROCESSES.Pipe()
        try:
            self.process = _PROCESSES.Process(target=_serve, args=(theirs, self.connection), daemon=True)
            with signals_held_back():  # it would not know yet what to do about them
                self.process.start()
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()

    def call(self, call: object) -> object:
        """What the function returns, or raises.

        Raises:
            _DiedError: if the process ends before that.
        """
        request = pickle.dumps(call)
        try:
            self.connection.send_bytes(request)
            answer = self.connection.recv_bytes()
        except (EOFError, OSError) as error:
            self.process.join(_ASK_SECONDS)
            raise _DiedError(self) from error
        is_result, value = pickle.loads(answer)  # noqa: S301 - of a process of our own
        if not is_result:
            raise value
        return value


def _end(workers: Collection[_Worker]) -> None:
    """End processes: ask them again and again, and kill those that do not react."""
    deadline = time.monotonic() + _END_SECONDS
    alive = [worker for worker in workers if worker.process.is_alive()]
    while alive and time.monotonic() < deadline:
        for worker in alive:
            worker.process.terminate()
        wait([worker.process.sentinel for worker in alive], _ASK_SECONDS)
        alive = [worker for worker in alive if worker.process.is_alive()]
    for worker in alive:
        worker.process.kill()
    for worker in workers:
        worker.process.join(_END_SECONDS)


def _killed(exit_code: int | None) -> KilledError:
    return KilledError(
        "the process was killed, perhaps because memory ran out",
        found=f"exit code {exit_code}" if exit_code is None or exit_code >= 0 else _signal_name(-exit_code),
        hint="free some memory, or export this one on its own",
    )


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:  # one of the real-time signals, most of which have no name
        return f"signal {number}"


_KEPT: list[object] = []
"""What a process inherits of the standard output: let go, it would print again what the main process was printing."""


def _serve(connection: Connection, parents_end: Connection) -> None:
    """What a process does. Ctrl-C it leaves to the main process, which ends its processes."""
    parents_end.close()  # or the pipe would not end with the main process
    _KEPT.append(sys.stdout)
    sys.stdout = None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        raise_on_signals()
        let_signals_in()
        with contextlib.suppress(EOFError, ConnectionError):  # the main process is gone
            while True:
                connection.send_bytes(_answer(connection.recv_bytes()))
        ignore_signals()
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)  # so that it ends as who waits for it expects


def _answer(request: bytes) -> bytes:
    try:
        function, args, kwargs = pickle.loads(request)  # noqa: S301 - of the main process
        return pickle.dumps((True, function(*args, **kwargs)))
    except Exception as error:  # noqa: BLE001 - raised again in the main process
        try:
            return pickle.dumps((False, error))
        except Exception:  # noqa: BLE001 - it holds something that cannot be pickled
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
