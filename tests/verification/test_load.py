"""`verify --load` as a command: the process in which the libraries load a file, and what it is not given."""

import os
import signal
import subprocess
import time
from importlib import metadata
from pathlib import Path

import pytest

from cogtools import verify_lora
from cogtools.errors import KilledError, LibraryError
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.verification import child
from cogtools.verification.overheard import LIBRARIES
from tests.support.command_line import CommandLine, program, surroundings
from tests.support.damage import by_file, good_lora, state, write


@pytest.fixture(autouse=True)
def loads_in_this_process() -> None:
    """Not here."""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / FILE_NAME, good_lora())
    return tmp_path / "out"


def stating(folder: Path, **fields: object) -> Path:
    by_file(state(**fields))(folder / FILE_NAME, folder / FILE_NAME)
    return folder


def test_a_good_file_is_loaded_and_run_in_a_process_of_its_own(good: Path) -> None:
    (load,) = [check for check in verify_lora(good, load=True).checks if check.name == "load"]

    assert load.status == "pass"
    assert load.seen.endswith(
        "12 modules of a CogVideoX-2B with 3 layers of hidden size 128 took 24 tensors and ran at scaling 0.25, "
        "without a warning"
    )


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        (
            {"megatron_config": {"a": 1}, "megatron_core": "evil"},
            [
                'invalid: megatron_config (found {"a": 1}: PEFT imports modules by such names, expected null)',
                'invalid: megatron_core (found "evil": PEFT imports modules by such names, expected null)',
            ],
        ),
        *(
            (fields, [f"invalid: {name} (found {shown}, "
                      "expected an expression without nested repetition: this may match for ever)"])
            for name, shown, fields in (
                ("target_modules", r'"(\\w+\\.?)+!"', {"target_modules": r"(\w+\.?)+!"}),
                ("exclude_modules", '"(a|a)*!"', {"exclude_modules": "(a|a)*!"}),
                ("rank_pattern", r'"(\\w+)*!"', {"rank_pattern": {r"(\w+)*!": 4}}),
                ("alpha_pattern", '"a+)+(b"', {"alpha_pattern": {"a+)+(b": 1}}),
                ("layers_pattern", '"(a+){9}"', {"layers_pattern": "(a+){9}", "layers_to_transform": [1]}),
                ("modules_to_save", '"+a"', {"modules_to_save": ["+a"]}),
            )
        ),
    ],
)  # fmt: skip
def test_what_the_libraries_would_import_or_match_for_ever_is_not_handed_on(
    fields: dict[str, object], problems: list[str], good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "ask", None)  # nothing is asked

    report = verify_lora(stating(good, **fields), load=True)

    load = report.checks[-1]
    assert (load.name, load.status) == ("load", "fail")
    assert load.seen == "not loaded: what the file states is not handed on to the libraries"
    assert [str(problem) for problem in load.problems] == problems


def test_a_process_without_an_answer_is_exit_code_2(
    good: Path, cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "TIME_LIMIT_SECONDS", 0.1)

    result = cogtools_cli("verify", good, "--load", "--json")

    assert (result.code, result.json["error"]["kind"]) == (2, KilledError.kind)
    assert result.json["error"]["what"] == (
        "loading the file with diffusers and PEFT was stopped: it had not ended after 0.1 seconds"
    )


@pytest.mark.slow
def test_libraries_that_do_not_go_together_are_one_clear_error(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peft.py").write_text("raise ImportError('cannot import name HybridCache from transformers')\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(LibraryError) as error:
        verify_lora(good, load=True)

    versions = [f"{name} {metadata.version(name)}" for name in ("torch", *LIBRARIES, "safetensors")]
    assert error.value.what == f"these cannot be imported together: {', '.join(versions)}"
    assert error.value.found == "ImportError: cannot import name HybridCache from transformers"


@pytest.mark.slow
def test_a_library_that_is_not_there_is_named(
    good: Path, tmp_path: Path, cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError('not here', name='peft')\n")
    monkeypatch.syspath_prepend(tmp_path)

    result = cogtools_cli("verify", good, "--load", "--json")

    assert (result.code, result.json["error"]["kind"]) == (2, "library")
    assert result.json["error"]["what"] == "this needs peft, which is not installed"
    assert result.json["error"]["hint"] == {"advice": "pip install peft", "command": None}


def test_a_signal_ends_the_process_that_loads(good: Path) -> None:
    # Takes some thousand years to match, and repeats nothing that is repeated.
    slow = stating(good, target_modules=".*" * 12 + "!")
    running = subprocess.Popen(
        program("verify", slow, "--load"), stderr=subprocess.PIPE, env=surroundings(), start_new_session=True
    )
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    deadline = time.monotonic() + 120
    while not (children.exists() and children.read_text().split()):
        if running.poll() is not None or not Path("/proc/self/task").is_dir():
            pytest.skip("there is no /proc that tells a process's children")
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (loading,) = map(int, children.read_text().split())

    running.send_signal(signal.SIGTERM)  # to it alone; a shell lets its jobs in the background ignore SIGINT

    assert running.wait(timeout=120) == 130
    assert running.stderr is not None
    assert running.stderr.read() == b"interrupted: nothing was left half-written\n"
    running.stderr.close()
    while is_running(loading):  # one that was not asked yet ends by itself
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_path_that_is_not_utf_8_cannot_be_loaded_and_is_not_called_wrong(
    good: Path, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    try:
        os.rename(good / FILE_NAME, odd)  # noqa: PTH104
    except OSError:
        pytest.skip("the file system takes no such name")

    plain, loaded = cogtools_cli("verify", odd), cogtools_cli("verify", odd, "--load")

    assert (plain.code, loaded.code) == (0, 2)
    assert loaded.err.startswith("error: a file at this path cannot be loaded with diffusers: the path is not UTF-8\n")
