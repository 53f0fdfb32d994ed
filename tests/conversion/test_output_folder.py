"""A folder of files appears whole or not at all, whatever happens, and an old one is never lost."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cogtools.checkpoint.files import SourceFile
from cogtools.conversion import output
from cogtools.conversion.output import AtomicFolder, leftovers, put_back
from cogtools.errors import OutputError
from tests.support.command_line import surroundings

NEW = {"config.json": b"new", "1/weights.pt": b"new weights", "a/b/c": b""}
OLD = {"config.json": b"old", "old-shard": b"old weights"}
OTHER = {"config.json": b"other"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def has_config(folder: Path) -> bool:
    return (folder / "config.json").exists()


def fill(target: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def write(target: Path, files: dict[str, bytes], *, overwrite: bool = False) -> None:
    with AtomicFolder(target, overwrite=overwrite, is_ours=has_config) as folder:
        for name, content in files.items():
            with folder.create(name) as file:
                file.write(content)
        folder.publish()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What appears


def test_all_files_appear_at_once(target: Path, open_files: Callable[[], int]) -> None:
    before = open_files()
    with AtomicFolder(target) as folder:
        for name, data in NEW.items():
            with folder.create(name) as file:
                file.write(data)
        assert not target.exists()
        folder.publish()
        assert content(target) == NEW
    assert (content(target), names(target.parent), open_files()) == (NEW, ["out"], before)


def test_files_may_be_written_side_by_side_and_in_any_order(target: Path) -> None:
    with AtomicFolder(target) as folder:
        with folder.create("a") as a, folder.create("b") as b:
            a.write_at(2, b"34")
            b.write(b"b")
            a.write_at(0, b"12")
            b.write(b"c")
        folder.publish()
    assert content(target) == {"a": b"1234", "b": b"bc"}


def test_a_folder_and_its_files_follow_the_umask(target: Path) -> None:
    before = os.umask(0o027)
    try:
        write(target, NEW)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(target)): path.stat().st_mode & 0o777 for path in [target, *target.rglob("*")]}
    assert modes == {
        ".": 0o750, "config.json": 0o640, "1": 0o750, "1/weights.pt": 0o640, "a": 0o750, "a/b": 0o750, "a/b/c": 0o640
    }  # fmt: skip


@pytest.mark.parametrize("made", ["x/y/out", "out/../out", "out/."])
def test_folders_around_it_are_made(target: Path, made: str) -> None:
    write(target.parent / made, NEW)
    assert content(target.parent / made) == NEW


def test_a_block_that_ends_before_publishing_leaves_nothing(target: Path, open_files: Callable[[], int]) -> None:
    before = open_files()
    with AtomicFolder(target / "a" / "b") as folder:
        folder.create("c/d").write(b"half")
        assert len(list(leftovers(target / "a" / "b"))) == 1
    assert (names(target.parent), open_files()) == ([], before)


def test_an_error_in_a_file_leaves_nothing(target: Path) -> None:
    def write_and_fail() -> None:
        with AtomicFolder(target) as folder, folder.create("a") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    assert names(target.parent) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../../b", "/a"])
def test_files_are_made_in_the_folder_only(target: Path, name: str) -> None:
    with AtomicFolder(target) as folder, pytest.raises(ValueError, match="inside the folder"):
        folder.create(name)


def test_a_file_is_made_once(target: Path) -> None:
    with AtomicFolder(target) as folder:
        folder.create("a")
        with pytest.raises(OutputError, match="File exists"):
            folder.create("a")


def test_a_folder_is_published_once_and_when_its_files_are_closed(target: Path) -> None:
    with AtomicFolder(target) as folder:
        with folder.create("a") as file:
            file.write(b"half")
            with pytest.raises(ValueError, match="when its files are closed"):
                folder.publish()
        folder.publish()
        with pytest.raises(ValueError, match="once"):
            folder.publish()
    with pytest.raises(ValueError, match="inside the with statement"):
        folder.create("b")
    assert content(target) == {"a": b"half"}


def test_everything_is_synced_before_it_has_its_name(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("looks in /proc what is synced")
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def sync(fd: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    def note_rename(path: Path, place: Path) -> Path:
        done.append(f"{path} -> {place}")
        return rename(path, place)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    place = target / "x" / "out"
    with AtomicFolder(place) as folder:
        temporary = str(next(leftovers(place)))
        with folder.create("1/a") as file:
            file.write(b"a")
        folder.publish()
    assert done == [
        f"{temporary}/1/a",
        f"{temporary}/1",
        temporary,
        str(target.parent),
        str(target),
        f"{temporary} -> {place}",
        str(place.parent),
    ]


# What is there already


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(target: Path, overwrite: bool) -> None:
    target.mkdir()
    write(target, NEW, overwrite=overwrite)
    assert (content(target), names(target.parent)) == (NEW, ["out"])


def test_a_folder_is_replaced_as_a_whole_if_it_may_be(target: Path, open_files: Callable[[], int]) -> None:
    before = open_files()
    fill(target, OLD)
    with pytest.raises(OutputError, match="the output exists already"):
        write(target, NEW)
    assert (content(target), names(target.parent)) == (OLD, ["out"])
    write(target, NEW, overwrite=True)
    assert (content(target), names(target.parent), open_files()) == (NEW, ["out"], before)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cogtools_did_not_write_is_not_replaced(target: Path, overwrite: bool) -> None:
    fill(target, {"thesis.tex": b"mine"})
    what = "the output would replace a folder that cogtools did not write" if overwrite else "the output exists already"
    with pytest.raises(OutputError, match=what):
        write(target, NEW, overwrite=overwrite)
    assert (content(target), names(target.parent)) == ({"thesis.tex": b"mine"}, ["out"])


def test_no_folder_is_replaced_unless_its_writer_is_known(target: Path) -> None:
    fill(target, OLD)
    with pytest.raises(OutputError, match="did not write"), AtomicFolder(target, overwrite=True):
        pass
    assert content(target) == OLD


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_its_place_is_not_replaced(target: Path, overwrite: bool) -> None:
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match="there is a file in its place"):
        write(target, NEW, overwrite=overwrite)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("name", [".", "../place"])
def test_the_current_folder_is_not_replaced(target: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(target.parent)
    with pytest.raises(OutputError, match="the output would replace the current folder"):
        write(Path(name), NEW)
    assert (names(target.parent), names(target.parent.parent)) == ([], ["place"])


def test_a_folder_above_the_current_one_has_its_name(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (target / "in").mkdir(parents=True)
    monkeypatch.chdir(target / "in")
    with pytest.raises(OutputError) as caught:
        write(Path(".."), NEW)
    assert (caught.value.what, caught.value.file) == ("the output exists already", "..")


def test_a_link_to_a_folder_stays_and_leads_to_the_new_one(target: Path) -> None:
    real = target.parent.parent / "elsewhere" / "real"
    fill(real, OLD)
    target.symlink_to(real)
    write(target, NEW, overwrite=True)
    assert (target.readlink(), content(real), names(real.parent)) == (real, NEW, ["real"])


def test_a_link_whose_folder_is_missing_is_made_whole_if_the_one_around_it_is_there(target: Path) -> None:
    real = target.parent.parent / "elsewhere" / "real"
    target.symlink_to(real)
    with pytest.raises(OutputError, match="the output cannot be written: No such file or directory"):
        write(target, NEW)
    real.parent.mkdir()
    write(target, NEW)
    assert content(real) == NEW


def test_the_checkpoint_in_a_folder_is_not_replaced_by_what_is_made_of_it(target: Path) -> None:
    fill(target, OLD)
    folder = AtomicFolder(target, overwrite=True, is_ours=has_config)
    with SourceFile.open(target / "old-shard") as source, pytest.raises(OutputError, match="the checkpoint that it is"):
        folder.refuse_source([source])


def test_a_folder_that_appears_meanwhile_is_not_replaced(target: Path) -> None:
    def write_as_another_appears() -> None:
        with AtomicFolder(target) as folder:
            with folder.create("a") as file:
                file.write(b"mine")
            fill(target, OTHER)
            folder.publish()

    with pytest.raises(OutputError, match="the output exists already"):
        write_as_another_appears()
    assert (content(target), names(target.parent)) == (OTHER, ["out"])


def test_runs_that_write_to_one_place_at_once_leave_one_whole_folder(target: Path) -> None:
    def write_often(number: int) -> None:
        files = {"config.json": b"%d" % number, f"{number}": b"x" * number}
        for _ in range(40):
            try:
                write(target, files, overwrite=True)
            except OutputError as error:
                errors.append(error)

    errors: list[OutputError] = []
    threads = [threading.Thread(target=write_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = content(target)
    number = int(found["config.json"])
    assert found == {"config.json": b"%d" % number, f"{number}": b"x" * number}
    assert errors == []
    write(target, NEW, overwrite=True)
    assert (content(target), names(target.parent)) == (NEW, ["out"])


# Errors and kills at every step

STEPS = (
    *((os, name) for name in ("open", "close", "fsync", "pwrite", "mkdir", "rename", "rmdir", "unlink", "scandir")),
    (output, "_lock"),
    (os, "posix_fallocate"),
)
"""What a write asks of the system."""


class Steps:
    """Does something before the step of a given number, and counts the steps."""

    def __init__(self, number: int, do: Callable[[], None]) -> None:
        self.number = number
        self.do = do
        self.count = 0
        self.name = ""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module, name in STEPS:
                patch.setattr(module, name, self._watch(name, getattr(module, name)))
            yield

    def _watch(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.number:
                self.name = name
                if name == "close":  # closes the file even where it reports an error
                    function(*args)
                self.do()
            return function(*args, **kwargs)

        return step


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def write_in_child(target: Path, number: int) -> bool:
    """Write in a process that is killed before a step; whether it came to its end."""
    pid = os.fork()
    if pid == 0:
        with Steps(number, kill).watched():
            write(target, NEW, overwrite=True)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.slow
@pytest.mark.parametrize("there", [{}, OLD], ids=["nothing", "old"])
def test_a_kill_at_any_step_leaves_the_old_the_new_or_what_the_next_run_puts_back(
    target: Path, there: dict[str, bytes]
) -> None:
    found: set[str] = set()
    for number in range(1, 1000):
        place = target / str(number)
        fill(place, there)
        is_done = write_in_child(place, number)
        if not place.exists():
            found.add("absent")
        put_back(place)
        now = content(place) if place.exists() else {}
        assert now in (there, NEW), f"killed before step {number}"
        found.add("new" if now == NEW else "old")
        write(place, OTHER, overwrite=True)
        assert content(place) == OTHER
        assert [name for name in names(target) if name.startswith(".")] == []
        if is_done:
            break
    assert found == {"absent", "old", "new"}


@pytest.mark.parametrize("there", [{}, OLD], ids=["nothing", "old"])
def test_an_error_at_any_step_leaves_the_old_or_the_new_and_nothing_else(
    target: Path, there: dict[str, bytes], open_files: Callable[[], int]
) -> None:
    before = open_files()
    for number in range(1, 1000):
        place = target / str(number)
        fill(place, there)
        steps = Steps(number, fail)
        error = None
        with steps.watched():
            try:
                write(place, NEW, overwrite=True)
            except OutputError as caught:
                error = caught
        if not steps.name:
            break
        where = f"{steps.name}, step {number}"
        now = content(place) if place.exists() else {}
        assert now in (there, NEW), where
        assert error is not None or now == NEW, where
        write(place, OTHER, overwrite=True)
        assert [name for name in names(target) if name.startswith(".")] == [], where
    assert number > 20
    assert open_files() == before


def test_an_interruption_between_the_two_renames_comes_after_them(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(target, OLD)
    rename = Path.rename

    def rename_and_interrupt(path: Path, place: Path) -> Path:
        renamed = rename(path, place)
        os.kill(os.getpid(), signal.SIGINT)
        return renamed

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Path, "rename", rename_and_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            write(target, NEW, overwrite=True)
    finally:
        monkeypatch.undo()
        signal.signal(signal.SIGINT, before)
    assert content(target) == NEW


def test_the_newest_of_several_folders_that_were_moved_aside_is_put_back(target: Path) -> None:
    for number in range(3):
        fill(target.with_name(f".out.1-{number}.cogtools-old"), {"number": b"%d" % number})
        os.utime(target.with_name(f".out.1-{number}.cogtools-old"), (1000 - number, 1000 - number))
    put_back(target)
    assert (content(target), names(target.parent)) == ({"number": b"2"}, ["out"])
    put_back(target)
    assert content(target) == {"number": b"2"}


# What killed runs leave

WRITE_SLOWLY = """
    import sys, time
    from pathlib import Path
    from cogtools.conversion.output import AtomicFolder
    with AtomicFolder(Path(sys.argv[1])) as folder, folder.create("a/b") as file:
        file.write(b"half")
        print("writing", flush=True)
        time.sleep(600)
"""


def start_writing(target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(WRITE_SLOWLY), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=surroundings())
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_run_leaves_is_removed_by_the_next_and_what_is_being_written_is_not(target: Path) -> None:
    with start_writing(target) as process:
        write(target, NEW)
        assert len(list(leftovers(target))) == 1
        process.kill()
    write(target, OTHER, overwrite=True)
    assert (content(target), names(target.parent)) == (OTHER, ["out"])


def test_what_belongs_to_another_target_is_not_removed(target: Path) -> None:
    with start_writing(target.with_name("out2")) as process:
        process.kill()
    write(target, NEW)
    assert len(list(leftovers(target.with_name("out2")))) == 1


def test_a_folder_that_another_run_took_for_a_leftover_is_made_anew(
    target: Path, monkeypatch: pytest.MonkeyPatch, open_files: Callable[[], int]
) -> None:
    taken: list[Path] = []
    lock = output._lock

    def take_and_lock(fd: int, *, wait: bool) -> bool:
        if not taken:
            taken.extend(leftovers(target))
            taken[0].rmdir()
        return lock(fd, wait=wait)

    monkeypatch.setattr(output, "_lock", take_and_lock)
    before = open_files()
    write(target, NEW)
    assert len(taken) == 1
    assert (content(target), names(target.parent), open_files()) == (NEW, ["out"], before)


LIMITED = """
    import resource, sys
    from pathlib import Path
    from cogtools.errors import OutputError
    from cogtools.conversion.output import AtomicFolder
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        with AtomicFolder(Path(sys.argv[1]), overwrite=True, is_ours=lambda _: True) as folder:
            with folder.create("a") as file:
                file.write(b"x")
            with folder.create("b") as file:
                if sys.argv[2] == "reserve":
                    file.reserve(2000)
                file.write(b"x" * 2000)
            folder.publish()
    except OutputError as error:
        print(error.what)
"""


@pytest.mark.parametrize("how", ["reserve", "write"])
def test_a_limit_that_is_reached_leaves_the_old_folder(target: Path, how: str) -> None:
    fill(target, OLD)
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(target), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=surroundings())
    assert (done.stdout, done.stderr) == ("the output cannot be written: File too large\n", "")
    assert (content(target), names(target.parent)) == (OLD, ["out"])


def test_a_full_disk_leaves_the_old_folder(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fill(target, OLD)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError) as caught:
        write(target, NEW, overwrite=True)
    assert (caught.value.what, str(caught.value.hint)) == (
        "the output cannot be written: No space left on device",
        "free some space, or choose another folder",
    )
    assert (content(target), names(target.parent)) == (OLD, ["out"])
