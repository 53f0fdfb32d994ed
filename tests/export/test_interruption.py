"""Whatever ends an export, the target is absent, as it was, or whole; and a signal ends it once, with 130."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cogtools
from cogtools.layouts.diffusers import FILE_NAME
from tests.support.command_line import program, surroundings
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.interruption import fault_exports, kill_exports, storm_exports

WAITING = """
    import os, signal, time
    from cogtools.conversion import output
    from cogtools.__main__ import main

    def wait(self):
        os.write(2, b"syncing\\n")  # in one piece: workers say it at the same time
        time.sleep(60)

    output.AtomicFile.sync = wait
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that a shell runs in the background ignore it
    main()
"""


def end_while_syncing(number: signal.Signals, *words: str | Path) -> tuple[int, str, list[str]]:
    """Start an export, send it a signal when all is written but not yet synced: its exit code, output and talk."""
    command = [sys.executable, "-c", textwrap.dedent(WAITING), "export-lora", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "syncing\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode, out, [line for line in err.splitlines() if line != "syncing"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_line_and_130(run_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    ended = end_while_syncing(number, run_folder, tmp_path / "out")
    assert ended == (130, "", ["interrupted: nothing was left half-written"])
    assert not (tmp_path / "out").exists()


def test_an_interruption_is_told_in_json_too(run_folder: Path, tmp_path: Path) -> None:
    code, out, err = end_while_syncing(signal.SIGINT, run_folder, tmp_path / "out", "--json")
    assert (code, json.loads(out)["error"]["kind"], err) == (130, "interrupted", [])


@pytest.mark.slow
def test_exports_that_are_killed_at_random_leave_the_target_as_it_was_or_whole(tmp_path: Path) -> None:
    kill_exports(tmp_path, rounds=20, seed=1)  # asserts it after each; which of the two it is depends on the machine


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks in /proc which signals a process hears")
def test_storms_of_signals_end_exports_once_and_leave_nothing(tmp_path: Path) -> None:
    storm_exports(tmp_path, rounds=12, seed=1)


@pytest.mark.slow
def test_a_system_call_that_fails_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    fault_exports(tmp_path, rounds=40, seed=1)


def test_of_two_exports_to_one_place_one_wins(run_folder: Path, tmp_path: Path) -> None:
    command = program("export-lora", run_folder, tmp_path / "out", "--quiet")
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = sorted((process.wait(), process.communicate()[1].partition("\n")[0]) for process in both)
    assert ends == [(0, ""), (2, "error: the output exists already")]
    assert len(load_file(tmp_path / "out" / FILE_NAME)) == 24


def test_of_two_exports_that_may_overwrite_both_end_well(run_folder: Path, tmp_path: Path) -> None:
    command = program("export-lora", run_folder, tmp_path / "out", "--quiet", "--overwrite")
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_batch_that_is_interrupted_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    for name in "abc":
        save_run(tmp_path / name, sat_checkpoint(sat_state_dict(TOY_2B, 4, torch.float32)), rank=4)
    # It ends when its workers have: they have its stderr open.
    ended = end_while_syncing(number, *(tmp_path / name for name in "abc"), tmp_path / "out")
    assert ended == (130, "", ["interrupted: nothing was left half-written"])
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


# When signals strike

KILL_ME = "os.kill(os.getpid(), signal.SIGTERM)"


def run_main(code: str, *words: str | Path) -> tuple[int, str, str]:
    """Run the program after some code, in a process of its own: its exit code, output and talk."""
    head = "import atexit, os, signal, sys, time\nfrom cogtools import interruption\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings(), timeout=120)
    return done.returncode, done.stdout, done.stderr


WHILE_IMPORTING = f"""
class KillBeforeTyper:
    def find_spec(self, name, *_):
        if name == "typer":
            {KILL_ME}

sys.meta_path.insert(0, KillBeforeTyper())
from cogtools.__main__ import main
main()
"""

BEFORE_THE_RESULT = f"""
from cogtools.__main__ import main
from cogtools.render import text
def emit(_):
    {KILL_ME}
text.emit = emit
main()
"""

AFTER_THE_RESULT = f"""
import cogtools.cli
from cogtools.__main__ import main
run = cogtools.cli.run
def run_and_kill(arguments):
    code = run(arguments)
    {KILL_ME}
    return code
cogtools.cli.run = run_and_kill
main()
"""

AT_THE_END = f"""
from cogtools.__main__ import main
atexit.register(lambda: {KILL_ME})
end = sys.exit
def kill_and_end(code):
    {KILL_ME}
    end(code)
sys.exit = kill_and_end
main()
"""


@pytest.mark.parametrize(
    ("code", "end"),
    [
        pytest.param(WHILE_IMPORTING, (130, "", "interrupted\n"), id="while-importing"),
        pytest.param(
            BEFORE_THE_RESULT, (130, "", "interrupted: nothing was left half-written\n"), id="before-the-result"
        ),
        pytest.param(AFTER_THE_RESULT, (130, "{version}", "interrupted\n"), id="after-the-result"),
        pytest.param(AT_THE_END, (0, "{version}", ""), id="at-the-end"),
    ],
)
def test_one_sigterm_at_any_time_ends_with_an_exit_code_and_at_most_one_line(
    code: str, end: tuple[int, str, str]
) -> None:
    version = f"cogtools {cogtools.__version__}\n"
    assert run_main(code, "--version") == (end[0], end[1].format(version=version), end[2])


def test_only_the_first_signal_is_heard_while_cleaning_up() -> None:
    code = f"""
        interruption.raise_on_signals()
        try:
            {KILL_ME}
        except KeyboardInterrupt:
            for number in (signal.SIGINT, signal.SIGTERM) * 10:
                os.kill(os.getpid(), number)
            print("cleaned up")
    """
    assert run_main(code) == (0, "cleaned up\n", "")


def test_a_cleanup_that_takes_too_long_can_be_ended() -> None:
    code = f"""
        interruption.raise_on_signals()
        interruption.CLEANUP_SECONDS = 0.05
        try:
            {KILL_ME}
        except KeyboardInterrupt:
            try:
                time.sleep(0.1)
                {KILL_ME}
            except KeyboardInterrupt:
                print("again")
    """
    assert run_main(code) == (0, "again\n", "")


def test_an_interruption_that_python_would_lose_is_raised_again() -> None:
    code = f"""
        interruption.raise_on_signals()

        class Struck:
            def __del__(self):
                {KILL_ME}

        try:
            Struck()
            time.sleep(60)
        except KeyboardInterrupt:
            print("raised")
    """
    assert run_main(code) == (0, "raised\n", "")


def test_other_errors_that_python_cannot_raise_are_shown_as_ever() -> None:
    code = """
        interruption.raise_on_signals()

        class Broken:
            def __del__(self):
                raise ZeroDivisionError

        Broken()
    """
    exit_code, out, err = run_main(code)
    assert (exit_code, out) == (0, "")
    assert (err.splitlines()[0][:22], err.splitlines()[-1]) == ("Exception ignored in: ", "ZeroDivisionError: ")


def test_signals_that_are_ignored_stay_ignored() -> None:
    code = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interruption.raise_on_signals()
        {KILL_ME}
        print("still here")
    """
    assert run_main(code) == (0, "still here\n", "")


def test_signals_that_are_held_back_are_raised_at_the_end_of_the_block_or_before_it() -> None:
    code = f"""
        interruption.raise_on_signals()
        try:
            with interruption.signals_held_back():
                {KILL_ME}
                print("not disturbed")
        except KeyboardInterrupt:
            print("raised")
        interruption.raise_on_signals()
        with interruption.signals_held_back():
            pass
        print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    """
    assert run_main(code) == (0, "not disturbed\nraised\nset()\n", "")


def test_signals_that_another_thread_hears_are_held_back_too() -> None:
    code = """
        import threading
        interruption.raise_on_signals()
        thread = threading.Thread(target=time.sleep, args=(0.5,))
        thread.start()
        try:
            with interruption.signals_held_back():
                os.kill(os.getpid(), signal.SIGTERM)
                thread.join()
                print("not disturbed")
        except KeyboardInterrupt:
            print("raised")
        print(signal.getsignal(signal.SIGTERM) is interruption._interrupt)
    """
    assert run_main(code) == (0, "not disturbed\nraised\nTrue\n", "")
