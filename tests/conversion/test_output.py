"""The target of a write is as it was before, or whole: nothing else, whatever happens."""

import contextlib
import errno
import hashlib
import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cogtools.checkpoint.dtypes import DTYPES
from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.formats.safetensors import safetensors_header
from cogtools.conversion import output as writer
from cogtools.conversion.output import AtomicFile, leftovers, refuse_unwritable
from cogtools.conversion.plan import Planned
from cogtools.errors import CheckpointError, OutputError

FLOAT32 = DTYPES["float32"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def write(target: Path, content: bytes, *, overwrite: bool = False) -> None:
    with AtomicFile(target, overwrite=overwrite) as file:
        file.write(content)
        file.sync()
        file.publish()


def write_as_another_appears(target: Path) -> None:
    with AtomicFile(target) as file:
        file.write(b"mine")
        target.write_bytes(b"theirs")
        file.publish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The header


def test_the_header_is_what_the_safetensors_library_writes() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.arange(4.0)}
    header = safetensors_header(
        [Planned("a", FLOAT32, (2, 3), ()), Planned("b.weight", FLOAT32, (4,), ())], {"format": "pt"}
    )
    assert header + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()) == save(tensors, {"format": "pt"})


def test_the_smallest_file_has_these_bytes() -> None:
    header = b'{"__metadata__":{},"x":{"dtype":"F32","shape":[],"data_offsets":[0,4]}} '
    assert safetensors_header([Planned("x", FLOAT32, (), ())], {}) == len(header).to_bytes(8, "little") + header


def test_the_order_of_the_metadata_does_not_change_the_bytes() -> None:
    assert safetensors_header([], {"b": "2", "a": "1"}) == safetensors_header([], {"a": "1", "b": "2"})


# All or nothing


def test_a_block_that_ends_before_publishing_leaves_nothing(target: Path) -> None:
    with AtomicFile(target) as file:
        file.write(b"half")
    assert names(target.parent) == []


def test_an_error_leaves_the_file_that_was_there(target: Path) -> None:
    target.write_bytes(b"old")
    with contextlib.suppress(RuntimeError), AtomicFile(target, overwrite=True) as file:
        file.write(b"half")
        raise RuntimeError
    assert (target.read_bytes(), names(target.parent)) == (b"old", [target.name])


def test_folders_that_were_made_for_a_failed_write_go_again(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "a" / "b" / "out.safetensors") as file:
        file.write(b"half")
        assert names(tmp_path) == ["a"]
    assert names(tmp_path) == []


def test_a_file_that_appears_meanwhile_is_not_replaced(target: Path) -> None:
    with pytest.raises(OutputError, match="the output exists already"):
        write_as_another_appears(target)
    assert (target.read_bytes(), names(target.parent)) == (b"theirs", [target.name])


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links_is_no_hindrance(
    target: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def no_link(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "link", no_link)
    write(target, b"new")
    with pytest.raises(OutputError, match="the output exists already"):
        write_as_another_appears(target.with_name("b"))
    assert (target.read_bytes(), names(target.parent)) == (b"new", ["b", target.name])


def test_a_second_name_that_cannot_be_removed_does_not_make_the_output_fail(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cannot)
        write(target, b"new")
    assert (target.read_bytes(), len(list(leftovers(target)))) == (b"new", 1)
    with pytest.raises(OutputError, match="the output exists already"):
        write(target, b"newer")
    assert (target.read_bytes(), names(target.parent)) == (b"new", [target.name])


def test_a_link_is_replaced_and_not_what_it_points_to(target: Path) -> None:
    other = target.with_name("other")
    other.write_bytes(b"other")
    target.symlink_to(other)
    write(target, b"new", overwrite=True)
    assert (target.read_bytes(), other.read_bytes(), target.is_symlink()) == (b"new", b"other", False)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/null")


def a_link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [a_pipe, a_socket, a_link_to_a_device, a_link_to_a_pipe])
def test_only_files_are_replaced(
    target: Path, make: Callable[[Path], None], overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(target.parent)  # the path of a socket may not be long
    make(Path(target.name))
    before = names(target.parent)
    with pytest.raises(OutputError, match="the output would replace a pipe, a socket or a device"):
        write(target, b"new", overwrite=overwrite)
    assert names(target.parent) == before


def test_a_link_that_leads_nowhere_is_replaced(target: Path) -> None:
    target.symlink_to("nowhere")
    with pytest.raises(OutputError, match="the output exists already"):
        write(target, b"new")
    write(target, b"new", overwrite=True)
    assert (target.read_bytes(), names(target.parent)) == (b"new", [target.name])


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_the_place_of_the_output_is_refused(target: Path, overwrite: bool) -> None:
    target.mkdir()
    with pytest.raises(OutputError, match="the output would replace a folder"):
        write(target, b"new", overwrite=overwrite)


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the output cannot be written: "):
        write(tmp_path / "file" / "out.safetensors", b"new")


def test_no_file_stays_open(target: Path, open_files: Callable[[], int]) -> None:
    before = open_files()
    write(target, b"new")
    with AtomicFile(target, overwrite=True) as file:
        file.write(b"half")
    assert open_files() == before


def test_a_file_that_another_run_took_for_a_leftover_is_made_anew(
    target: Path, monkeypatch: pytest.MonkeyPatch, open_files: Callable[[], int]
) -> None:
    taken: list[Path] = []

    def lock(fd: int, *, wait: bool) -> bool:
        if not taken:
            taken.extend(leftovers(target))
            taken[0].unlink()
        return writer_lock(fd, wait=wait)

    writer_lock = writer._lock
    monkeypatch.setattr(writer, "_lock", lock)
    before = open_files()
    write(target, b"new")
    assert len(taken) == 1
    assert (target.read_bytes(), names(target.parent), open_files()) == (b"new", [target.name], before)


# What lasts


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced: the paths, in order."""
    paths: list[str] = []
    fsync = os.fsync

    def sync(fd: int) -> None:
        paths.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("looks in /proc what is synced")
    monkeypatch.setattr(os, "fsync", sync)
    return paths


def test_the_file_is_synced_then_new_folders_in_their_parents_then_its_name(tmp_path: Path, synced: list[str]) -> None:
    write(tmp_path / "a" / "b" / "out.safetensors", b"new")
    file, *folders = synced
    assert file.startswith(f"{tmp_path}/a/b/.out.safetensors.")
    assert folders == [str(tmp_path), f"{tmp_path}/a", f"{tmp_path}/a/b"]
    synced.clear()
    write(tmp_path / "a" / "b" / "other.safetensors", b"new")
    assert synced[1:] == [f"{tmp_path}/a/b"]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_no_hindrance(
    target: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    fail_to_sync_folders(monkeypatch, error)
    write(target, b"new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_folder_whose_sync_fails_is_an_error(target: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    fail_to_sync_folders(monkeypatch, error)
    with pytest.raises(OutputError) as caught:
        write(target, b"new")
    assert caught.value.what == f"the folder of the output cannot be synced: {os.strerror(error)}"
    assert caught.value.file == str(target.parent)


def fail_to_sync_folders(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    fsync = os.fsync

    def sync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sync)


def test_an_error_of_closing_what_is_synced_changes_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def close_and_fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with AtomicFile(target) as file:
        file.write(b"new")
        file.sync()
        file.publish()
        monkeypatch.setattr(os, "close", close_and_fail)
    assert target.read_bytes() == b"new"


# Interruption

WRITE_SLOWLY = """
    import sys, time
    from pathlib import Path
    from cogtools.conversion.output import AtomicFile
    with AtomicFile(Path(sys.argv[1])) as file:
        file.write(b"half")
        print("writing", flush=True)
        time.sleep(60)
"""


def start_writing(target: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITE_SLOWLY), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_what_a_killed_run_leaves_is_removed_by_the_next(target: Path) -> None:
    end(start_writing(target))
    assert len(list(leftovers(target))) == 1
    write(target, b"new")
    assert (target.read_bytes(), names(target.parent)) == (b"new", [target.name])


def test_what_is_still_being_written_is_not_removed(target: Path) -> None:
    process = start_writing(target)
    try:
        write(target, b"new")
        assert len(list(leftovers(target))) == 1
    finally:
        end(process)


def test_what_belongs_to_another_target_is_not_removed(target: Path) -> None:
    end(start_writing(target.with_name("other.safetensors")))
    write(target, b"new")
    assert len(list(leftovers(target.with_name("other.safetensors")))) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_with_the_name_of_a_leftover_is_left_alone(target: Path, overwrite: bool) -> None:
    pipe = target.with_name(f".{target.name}.1-00000000.cogtools-tmp")
    os.mkfifo(pipe)
    write(target, b"new", overwrite=overwrite)
    assert names(target.parent) == [pipe.name, target.name]


def test_a_link_with_the_name_of_a_leftover_is_left_alone(target: Path) -> None:
    link = target.with_name(f".{target.name}.1-00000000.cogtools-tmp")
    (target.parent / "mine").write_bytes(b"mine")
    link.symlink_to("mine")
    write(target, b"new")
    assert names(target.parent) == [link.name, "mine", target.name]


LIMITED = """
    import resource, sys
    from pathlib import Path
    from cogtools.errors import OutputError
    from cogtools.conversion.output import AtomicFile
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        with AtomicFile(Path(sys.argv[1])) as file:
            if sys.argv[2] == "reserve":
                file.reserve(2000)
            file.write(b"x" * 2000)
            file.publish()
    except OutputError as error:
        print(error.what)
"""


@pytest.mark.parametrize("how", ["reserve", "write"])
def test_a_limit_that_is_reached_leaves_nothing(target: Path, how: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(target), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("the output cannot be written: File too large\n", "")
    assert names(target.parent) == []


def test_a_disk_that_is_too_full_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not enough disk space for the output"):
        refuse_unwritable(tmp_path / "not" / "there" / "a.safetensors", 1 << 62)
    assert names(tmp_path) == []


def test_a_file_system_that_is_read_only_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(tmp_path)
    read_only = os.statvfs_result((*status[:8], status.f_flag | os.ST_RDONLY, *status[9:]))
    monkeypatch.setattr(os, "statvfs", lambda _: read_only)
    with pytest.raises(OutputError, match="the output cannot be written: Read-only file system"):
        refuse_unwritable(tmp_path / "a.safetensors", 1)


def test_folders_that_were_made_for_an_output_that_cannot_be_are_removed(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long"), AtomicFile(tmp_path / "a" / ("b" * 300) / "c"):
        pass
    assert names(tmp_path) == []


def test_an_interruption_while_it_is_opened_leaves_nothing(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogtools.conversion.output._lock", interrupt)
    with pytest.raises(KeyboardInterrupt), AtomicFile(target):
        pass
    assert names(target.parent) == []


def test_a_leftover_is_removed_by_a_run_that_is_refused_too(target: Path) -> None:
    target.write_bytes(b"there")
    leftover = target.with_name(f".{target.name}.1-00000000.cogtools-tmp")
    leftover.hardlink_to(target)  # killed between taking the name and giving up the old one
    with pytest.raises(OutputError, match="the output exists already"), AtomicFile(target):
        pass
    assert names(target.parent) == [target.name]


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    target = tmp_path / ("x" * 243 + ".safetensors")
    with AtomicFile(target) as file:
        assert len(list(leftovers(target))) == 1
        file.write(b"content")
        file.publish()
    assert names(tmp_path) == [target.name]


# Copying


def test_ranges_of_another_file_are_copied(tmp_path: Path, target: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)))
    with SourceFile.open(tmp_path / "source") as source, AtomicFile(target) as file:
        file.copy(FileRange(source, 250, 6))
        file.copy(FileRange(source, 3, 0))
        file.copy(FileRange(source, 1, 2))
        file.publish()
    assert target.read_bytes() == bytes([250, 251, 252, 253, 254, 255, 1, 2])


def test_bytes_may_be_written_in_any_order(tmp_path: Path, target: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)))
    with SourceFile.open(tmp_path / "source") as source, AtomicFile(target) as file:
        file.reserve(10)
        file.copy_at(6, FileRange(source, 100, 4))
        file.write_at(3, b"abc")
        file.copy_at(0, FileRange(source, 1, 3))
        file.write(b"end")
        assert (file.size_bytes, file.sha256()) == (13, hashlib.sha256(b"\1\2\3abcdefgend").hexdigest())
        file.publish()
    assert target.read_bytes() == b"\1\2\3abcdefgend"


class Remote:
    """A file that is not on this machine: it has no file descriptor, and is read by ranges."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        self.asked.append((offset_bytes, size_bytes))
        return self.content[offset_bytes : offset_bytes + size_bytes]


class RemoteWithoutDescriptor(Remote):
    fd = -1


@pytest.mark.parametrize("kind", [Remote, RemoteWithoutDescriptor])
def test_a_file_without_a_descriptor_is_read_once_in_pieces(
    target: Path, kind: type[Remote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_COPY_BYTES", 4)
    source = kind(bytes(range(100)))
    with AtomicFile(target) as file:
        file.refuse_source([source])  # type: ignore[list-item]
        file.copy_at(2, FileRange(source, 10, 9))  # type: ignore[arg-type]
        file.write_at(0, b"ab")
        file.publish()
    assert target.read_bytes() == b"ab" + bytes(range(10, 19))
    assert source.asked == [(10, 4), (14, 4), (18, 1)]


def test_a_system_without_positioned_writes_writes_the_same(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.delattr(os, "copy_file_range")
    test_bytes_may_be_written_in_any_order(tmp_path, target)


def test_a_source_that_shrinks_while_it_is_copied_is_an_error(tmp_path: Path, target: Path) -> None:
    source_path = tmp_path / "source"
    source_path.write_bytes(bytes(100))
    with SourceFile.open(source_path) as source, AtomicFile(target) as file:
        os.truncate(source_path, 10)
        with pytest.raises(CheckpointError, match="the file is cut short"):
            file.copy(FileRange(source, 0, 100))
    assert names(tmp_path) == ["source"]


def test_files_are_complete_for_whoever_looks_while_they_are_replaced(target: Path) -> None:
    contents = [bytes([value]) * (1 << 20) for value in (1, 2)]
    write(target, contents[0])
    looking, stop = threading.Event(), threading.Event()

    def torn() -> list[str]:
        """Read until told to stop; whatever is not one of the contents, whole."""
        found = []
        while not stop.is_set():
            looking.set()
            content = target.read_bytes()
            if content not in contents:
                found.append(f"{len(content)} bytes: {content.count(1)} of the one, {content.count(2)} of the other")
        return found

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(torn)
        try:
            looking.wait()
            for number in range(60):
                write(target, contents[number % 2], overwrite=True)
        finally:
            stop.set()
    assert reader.result() == []
