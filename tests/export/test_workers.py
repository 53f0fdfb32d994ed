"""Processes as an executor: one that dies costs its own job only, and all of them end when they should."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed
from pathlib import Path
from typing import Any

import pytest

from cogtools.errors import KilledError, OptionError
from cogtools.export import workers
from cogtools.export.workers import WorkerPool
from tests.support.command_line import surroundings


def no_processes() -> bool:
    return multiprocessing.active_children() == []


def square(number: int, *, plus: int = 0) -> int:
    return number * number + plus


def own_pid(_: object = None) -> int:
    return os.getpid()


def wait_for(path: Path) -> str:
    while not path.exists():
        time.sleep(0.005)
    return path.name


def mark_and_wait(folder: Path) -> None:
    """Say that it has begun, wait to be ended, and clean up behind itself."""
    (folder / "begun").touch()
    try:
        while True:
            time.sleep(0.01)
    finally:
        (folder / "cleaned").touch()


def die(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "ended":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    os._exit(3)


def refuse(what: str) -> None:
    raise OptionError(what, found="this", hint="not that")


class UnpicklableError(Exception):
    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


def raise_unpicklable() -> None:
    raise UnpicklableError("lost")


def give_unpicklable() -> object:
    return threading.Lock()


@pytest.fixture(autouse=True)
def processes_end() -> Iterator[None]:
    yield
    assert no_processes()


def test_functions_are_carried_out_in_other_processes() -> None:
    with WorkerPool(2) as pool:
        futures = [pool.submit(square, number, plus=1) for number in range(20)]
        assert [future.result() for future in futures] == [number * number + 1 for number in range(20)]
        assert os.getpid() not in pool.map(own_pid, range(20))


def test_results_come_as_they_end(tmp_path: Path) -> None:
    with WorkerPool(2) as pool:
        futures: list[Future[Any]] = [pool.submit(wait_for, tmp_path / "go"), pool.submit(square, 3)]
        order = as_completed(futures)
        assert next(order) is futures[1]
        (tmp_path / "go").touch()
        assert next(order) is futures[0]


def test_an_exception_is_raised_by_its_future_with_its_fields() -> None:
    with WorkerPool(1) as pool:
        pid = pool.submit(own_pid).result()
        error = pool.submit(refuse, "no").exception()
        assert isinstance(error, OptionError)
        assert (error.what, error.found, str(error.hint)) == ("no", "this", "not that")
        assert pool.submit(own_pid).result() == pid


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (raise_unpicklable, RuntimeError, "UnpicklableError: lost"),
        (give_unpicklable, TypeError, "cannot pickle '_thread.lock' object"),
        (lambda: 1, (pickle.PicklingError, AttributeError), "pickle"),
    ],
    ids=["error", "result", "function"],
)
def test_what_cannot_be_pickled_is_an_error_of_its_future(
    function: Callable[[], object], error: type[Exception], message: str
) -> None:
    with WorkerPool(1) as pool:
        pid = pool.submit(own_pid).result()
        with pytest.raises(error, match=message):
            pool.submit(function).result()
        assert pool.submit(own_pid).result() == pid


@pytest.mark.parametrize(
    ("how", "found"), [("killed", "signal 9 (SIGKILL)"), ("ended", "signal 15 (SIGTERM)"), ("exit", "exit code 3")]
)
def test_a_process_that_dies_costs_its_own_job_and_is_replaced(how: str, found: str) -> None:
    with WorkerPool(2) as pool:
        dying = [pool.submit(die, how) for _ in range(3)]
        living = [pool.submit(square, number) for number in range(10)]
        assert [future.result() for future in living] == [number * number for number in range(10)]
        for future in dying:
            error = future.exception()
            assert isinstance(error, KilledError)
            assert error.found == found
        assert len(multiprocessing.active_children()) == 2


def test_an_idle_process_that_dies_costs_one_job_at_most(open_files: Callable[[], int]) -> None:
    before = open_files()
    with WorkerPool(1) as pool:
        os.kill(pool.submit(own_pid).result(), signal.SIGKILL)
        assert isinstance(pool.submit(square, 2).exception(), KilledError)
        assert pool.submit(square, 2).result() == 4
    assert open_files() == before


def test_a_block_that_ends_with_an_exception_ends_what_is_running(tmp_path: Path) -> None:
    def begin_and_fail() -> None:
        with WorkerPool(1) as pool:
            futures.append(pool.submit(mark_and_wait, tmp_path))
            futures.append(pool.submit(square, 1))
            wait_for(tmp_path / "begun")
            raise KeyboardInterrupt

    futures: list[Future[Any]] = []
    with pytest.raises(KeyboardInterrupt):
        begin_and_fail()
    assert (tmp_path / "cleaned").exists()
    running, waiting = futures
    assert isinstance(running.exception(), KilledError)
    with pytest.raises(CancelledError):
        waiting.result()


def test_shutting_down_waits_for_what_was_submitted_and_takes_no_more() -> None:
    pool = WorkerPool(2)
    futures = [pool.submit(square, number) for number in range(10)]
    pool.shutdown()
    assert [future.result() for future in futures] == [number * number for number in range(10)]
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(square, 1)


def test_shutting_down_may_cancel_what_has_not_begun(tmp_path: Path) -> None:
    pool = WorkerPool(1)
    running = pool.submit(wait_for, tmp_path / "go")
    while not running.running():
        time.sleep(0.001)
    waiting = pool.submit(square, 1)
    pool.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    (tmp_path / "go").touch()
    pool.shutdown()
    assert running.result() == "go"


def deaf(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / "begun").touch()
    time.sleep(600)


def test_a_process_that_does_not_react_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_END_SECONDS", 0.5)
    pool = WorkerPool(1)
    future = pool.submit(deaf, tmp_path)
    wait_for(tmp_path / "begun")
    pool.terminate_workers()
    error = future.exception()
    assert isinstance(error, KilledError)
    assert error.found == "signal 9 (SIGKILL)"


def test_a_signal_that_is_lost_once_is_sent_again(tmp_path: Path) -> None:
    # One that arrives just before a system call does not interrupt it: the first is lost here to show that.
    pool = WorkerPool(1)
    future = pool.submit(deaf_once, tmp_path)
    wait_for(tmp_path / "begun")
    pool.terminate_workers()
    assert isinstance(future.exception(), KilledError)
    assert (tmp_path / "cleaned").exists()


def deaf_once(folder: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, handler))
    mark_and_wait(folder)


def fail_after(count: int, error: Exception, function: Callable[..., object]) -> Callable[..., object]:
    calls = []

    def call(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) > count:
            raise error
        return function(*args, **kwargs)

    return call


def test_it_goes_on_with_as_many_processes_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = fail_after(2, BlockingIOError(11, "Resource temporarily unavailable"), os.fork)
    monkeypatch.setattr("os.fork", refused)
    with WorkerPool(5) as pool:
        assert len(multiprocessing.active_children()) == 2
        assert list(pool.map(square, range(10))) == [number * number for number in range(10)]


def test_it_goes_on_with_as_many_threads_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refused = fail_after(2, RuntimeError("can't start new thread"), start)
    monkeypatch.setattr("threading.Thread.start", lambda self: refused(self))
    with WorkerPool(5) as pool:
        assert len(multiprocessing.active_children()) == 2
        assert list(pool.map(square, range(10))) == [number * number for number in range(10)]


@pytest.mark.parametrize("what", ["os.fork", "os.pipe", "threading.Thread.start"])
def test_a_system_that_allows_none_is_an_error(
    what: str, monkeypatch: pytest.MonkeyPatch, open_files: Callable[[], int]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files") if what == "os.pipe" else RuntimeError("can't start new thread")

    def refuse_fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    before = open_files()
    monkeypatch.setattr(what, refuse_fork if what == "os.fork" else refuse)
    with pytest.raises(OSError, match=r"Resource temporarily unavailable|Too many open files"):
        WorkerPool(3)
    monkeypatch.undo()
    assert open_files() <= before + (4 if what == "os.fork" else 0)  # multiprocessing leaves its own pipes open then


def test_a_process_that_cannot_be_replaced_leaves_its_jobs_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkerPool(2) as pool:
        monkeypatch.setattr("os.fork", fail_after(0, BlockingIOError(11, "no"), os.fork))
        busy = pool.submit(wait_for, tmp_path / "go")
        assert isinstance(pool.submit(die, "exit").exception(), KilledError)
        waiting = [pool.submit(square, number) for number in range(5)]
        (tmp_path / "go").touch()
        assert busy.result() == "go"
        assert [future.result() for future in waiting] == [number * number for number in range(5)]
        assert isinstance(pool.submit(die, "exit").exception(), KilledError)
        assert isinstance(pool.submit(square, 1).exception(), BlockingIOError)


ORPHANS = """
    import os, sys, time
    from pathlib import Path
    from cogtools.export.workers import WorkerPool
    from tests.export.test_workers import own_pid, wait_for

    pool = WorkerPool(3)
    pool.submit(wait_for, Path(sys.argv[1]) / "go")
    print(*sorted({pool.submit(own_pid).result() for _ in range(20)}), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("is_busy", [True, False])
def test_processes_whose_main_process_was_killed_go_quietly(tmp_path: Path, is_busy: bool) -> None:
    command = [sys.executable, "-c", textwrap.dedent(ORPHANS), str(tmp_path)]
    if not is_busy:
        (tmp_path / "go").touch()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings()
    ) as main:
        assert main.stdout is not None
        assert main.stdout.readline() != ""
        main.kill()
        (tmp_path / "go").touch()
        assert main.communicate(timeout=60) == ("", "")  # at its end all have ended: they have its stderr open


def test_processes_do_not_print_what_the_main_process_was_just_printing() -> None:
    code = """
        import sys
        from cogtools.export.workers import WorkerPool
        sys.stdout.write("once\\n")
        with WorkerPool(2) as pool:
            pool.submit(abs, -1).result()
        sys.stdout.flush()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings())
    assert (done.stdout, done.stderr) == ("once\n", "")
