"""Whatever ends an export, the target is absent, as it was, or whole."""

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cogtools.layouts.diffusers import FILE_NAME
from tests.support.command_line import program
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.interruption import kill_exports

WAITING = """
    import os, signal, time
    from cogtools.conversion import output as writer
    from cogtools.__main__ import main

    def wait(self):
        os.write(2, b"syncing\\n")  # in one piece: workers say it at the same time
        time.sleep(60)

    writer.AtomicFile.sync = wait
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
            out, err = process.communicate(timeout=20)
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


def test_exports_that_are_killed_at_random_leave_the_target_as_it_was_or_whole(tmp_path: Path) -> None:
    kill_exports(tmp_path, rounds=20, seed=1)  # asserts it after each; which of the two it is depends on the machine


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
