"""What the system refuses is one clear error with exit code 2, and never looks like a verdict or a bug."""

import errno
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import cogtools
from cogtools import system
from cogtools.errors import CogtoolsError, LibraryError
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.system import as_cogtools_error
from tests.support.command_line import CommandLine, Result, program, run_program, surroundings
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run

MEMORY = ("not enough memory", "free some memory, or raise the limit (ulimit -v, or that of the container)")
FILES = ("too many open files", "raise the limit (ulimit -n)")
THREADS = (
    "the system does not allow another process or thread",
    "raise the limit (ulimit -u, or that of the container), or end other programs",
)


def system_error(number: int, *words: object) -> OSError:
    return OSError(number, os.strerror(number), *words)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), MEMORY),
        (system_error(errno.ENOMEM), MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), MEMORY),
        (ImportError("libx.so: failed to map segment from shared object"), MEMORY),
        (OSError("libx.so: cannot map zero-fill pages: Cannot allocate memory"), MEMORY),
        (system_error(errno.EMFILE, "a.pt"), FILES),
        (system_error(errno.ENFILE), FILES),
        (system_error(errno.EAGAIN), THREADS),
        (RuntimeError("can't start new thread"), THREADS),
    ],
    ids=repr,
)
def test_a_shortage_says_of_what_and_what_to_do(error: Exception, expected: tuple[str, str]) -> None:
    known = as_cogtools_error(error)
    assert known is not None
    assert (known.what, str(known.hint)) == expected
    assert known.found == (f"{type(error).__name__}: {error}" if str(error) else "MemoryError")


@pytest.mark.parametrize("name", ["a.pt", b"a.pt"])
def test_any_other_error_of_the_system_names_its_file(name: object) -> None:
    known = as_cogtools_error(system_error(errno.ESTALE, name))
    assert known is not None
    assert (known.what, known.file) == ("the system reports an error: Stale file handle", "a.pt")
    known = as_cogtools_error(system_error(errno.EIO))
    assert known is not None
    assert (known.what, known.file) == ("the system reports an error: Input/output error", None)


def test_an_error_of_cogtools_is_what_it_is_whoever_wraps_it() -> None:
    error = CogtoolsError("no")
    assert as_cogtools_error(error) is error
    wrapped = ImportError("wrapped")
    wrapped.__cause__ = error
    assert as_cogtools_error(wrapped) is error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad"),
        RuntimeError("bad"),
        ModuleNotFoundError("No module named 'cogtools.nothing'", name="cogtools.nothing"),
        ImportError("cannot import name 'x' from 'cogtools.errors'", name="cogtools.errors"),
    ],
    ids=repr,
)
def test_a_bug_is_not_explained_away(error: Exception) -> None:
    assert as_cogtools_error(error) is None


# Libraries that cannot be imported


def caught(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> CogtoolsError | None:
    monkeypatch.syspath_prepend(str(folder))
    try:
        __import__(name)
    except Exception as error:  # noqa: BLE001 - any
        return as_cogtools_error(error)
    raise AssertionError("it was imported")


def test_a_library_that_is_missing_is_named_as_pip_calls_it() -> None:
    known = as_cogtools_error(ModuleNotFoundError("No module named 'yaml'", name="yaml"))
    assert isinstance(known, LibraryError)
    assert (known.what, str(known.hint)) == ("this needs yaml, which is not installed", "pip install pyyaml")


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise ValueError('bad')", "ValueError: bad"),
        ("from rich import nothing", "ImportError: cannot import name 'nothing' from 'rich' ("),
        ("try:\n    1 / 0\nexcept Exception as error:\n    raise RuntimeError('no') from error",
         "ZeroDivisionError: division by zero"),
    ],
    ids=["error", "import", "cause"],
)  # fmt: skip
def test_a_library_that_cannot_be_imported_is_named_with_the_versions_that_take_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, found: str
) -> None:
    (tmp_path / f"broken_{len(code)}").mkdir()
    (tmp_path / f"broken_{len(code)}" / "__init__.py").write_text("from . import inner")
    (tmp_path / f"broken_{len(code)}" / "inner.py").write_text(code)
    known = caught(f"broken_{len(code)}", tmp_path, monkeypatch)
    assert known is not None
    assert known.what == f"broken_{len(code)} cannot be imported"
    assert known.found is not None
    assert known.found.startswith(found)
    assert str(known.hint) == f"pip install --upgrade broken_{len(code)}"
    if "rich" in code:
        from importlib.metadata import version

        assert known.expected == f"versions that go together; installed: rich {version('rich')}"
    else:
        assert known.expected is None


def test_a_module_that_a_library_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import not_there.at_all")
    known = caught("needy", tmp_path, monkeypatch)
    assert known is not None
    assert (known.what, str(known.hint)) == ("this needs not_there, which is not installed", "pip install not_there")


def test_memory_that_runs_out_in_an_import_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large.py").write_text("bytearray(1 << 60)")
    known = caught("large", tmp_path, monkeypatch)
    assert known is not None
    assert (known.what, known.found) == ("not enough memory", "MemoryError, while large was imported")


@pytest.mark.parametrize("words", ["verify {out} --load", "export-lora {run} {out}2 --scale fold"])
def test_a_library_that_cannot_be_imported_is_an_error_of_every_command(
    run_folder: Path, tmp_path: Path, words: str
) -> None:
    cogtools.export_lora(run_folder, tmp_path / "out")
    (tmp_path / "libraries" / "torch").mkdir(parents=True)
    (tmp_path / "libraries" / "torch" / "__init__.py").write_text("raise AttributeError('made for another NumPy')")
    line = words.format(run=run_folder, out=tmp_path / "out")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'libraries')!r}); from cogtools.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings())
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert lines[:2] == ["error: torch cannot be imported", "  found:     AttributeError: made for another NumPy"]
    assert lines[-1] == "  try:       pip install --upgrade torch"


# The program when there is not enough


def under_limit(limit: str, *words: str | Path) -> Result:
    """Run the program in a shell that sets a limit."""
    command = ["sh", "-c", f'{limit} && exec "$@"', "sh", *program(*words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings())
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
@pytest.mark.parametrize(
    ("words", "megabytes"),
    [
        *(("verify {out}", megabytes) for megabytes in (60, 80, 100, 120)),
        ("inspect {run} --stats", 100),
        ("export-lora {run} {out}2 --scale fold", 60),
        ("export-lora {run} {out}2 --scale fold", 300),
        ("verify {out} --load", 400),
    ],
)
def test_too_little_memory_is_never_a_verdict(run_folder: Path, tmp_path: Path, words: str, megabytes: int) -> None:
    cogtools.export_lora(run_folder, tmp_path / "out")
    result = under_limit(f"ulimit -v {megabytes * 1000}", *words.format(run=run_folder, out=tmp_path / "out").split())
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[0] == "error: not enough memory"


@pytest.mark.parametrize("files", [6, 7, 8, 10, 12])
def test_few_open_files_are_enough_or_an_error(run_folder: Path, tmp_path: Path, files: int) -> None:
    other = save_run(tmp_path / "other", sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4)
    result = under_limit(f"ulimit -n {files}", "export-lora", run_folder, other, tmp_path / "out")
    assert result.code in (0, 2)
    found = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert found == [FILE_NAME] * (2 if result.code == 0 else result.out.count("done     "))


def test_without_threads_and_processes_exports_are_made_all_the_same(
    run_folder: Path, tmp_path: Path, cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_run(tmp_path / "other", sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert cogtools_cli("export-lora", run_folder, tmp_path / "one").out.count("CRC-32s") == 1
    assert cogtools_cli("export-lora", run_folder, other, tmp_path / "two").code == 0


@pytest.mark.parametrize("function", ["os.fstat", "os.close"])
def test_an_error_of_the_system_is_not_taken_for_one_of_printing(
    run_folder: Path, cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    real = getattr(os, function.partition(".")[2])

    def fail(fd: int) -> None:
        real(fd)
        raise system_error(errno.EIO)

    file = run_folder / "1000" / "mp_rank_00_model_states.pt"
    with monkeypatch.context() as patch:
        patch.setattr(function, fail)
        result = cogtools_cli("inspect", file)
    assert result.code in (0, 2)
    assert "printed" not in result.err
    if result.code == 2:
        assert "Input/output error" in result.err.splitlines()[0]


def test_libraries_use_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3"})
    monkeypatch.setattr(system, "_address_space_limit", lambda: None)
    system.prepare_libraries()
    assert os.environ == {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "3"}


# Printing, and Typer


@pytest.mark.parametrize("words", [["--help"], [], ["verify", "--help"], ["--version"]])
def test_help_for_a_reader_that_has_gone_is_no_error(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(program(*words), stdout=writer, stderr=subprocess.PIPE, check=False, env=surroundings())
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_broken_pipe_of_any_kind_never_ends_with_1(
    cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("cogtools.verification.verify.verify_lora", fail)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stdout)  # Typer puts something else there
        patch.setattr(sys, "stderr", sys.stderr)
        result = cogtools_cli("verify", tmp_path)
    assert (result.code, result.err) == (2, "error: the system reports an error: Broken pipe\n")


WRAPPED = """
import os, signal, sys

class Struck:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)

class Finder:
    def find_spec(self, name, *_):
        if name == "typer":
            class Owner:  # Python 3.11 raises a RuntimeError for what is raised in __set_name__
                struck = Struck()

sys.meta_path.insert(0, Finder())
from cogtools.__main__ import main
main()
"""


def test_an_interruption_that_was_turned_into_another_error_is_one_still() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WRAPPED], capture_output=True, text=True, check=False, env=surroundings()
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_an_error_without_memory_for_its_words_ends_with_2() -> None:
    code = """
        import sys
        sys.modules["cogtools.system"] = None
        from cogtools.__main__ import main
        main()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=surroundings())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ModuleNotFoundError(")


def test_the_program_starts_as_before() -> None:
    assert run_program("--version").out == f"cogtools {cogtools.__version__}\n"
