"""Open files, small files, what lies beside a checkpoint; what the system refuses is an error with its reason."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogtools.checkpoint.files import FolderEntry, SourceFile
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.places import list_folder, read_small_file, size_of
from cogtools.errors import CheckpointError

STALE = "the file cannot be read: Stale file handle"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(3)}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def failing(code: int) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise OSError(code, os.strerror(code))

    return fail


def refused(monkeypatch: pytest.MonkeyPatch, function: str, code: int, ask: Callable[[], object]) -> CheckpointError:
    """The error of what is asked while a function of the system fails."""
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failing(code))
        try:
            ask()
        except CheckpointError as error:
            return error
    pytest.fail("nothing was refused")


# Small files


def test_a_small_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")

    assert read_small_file(tmp_path / "x", 5) == b"12345"
    with pytest.raises(CheckpointError) as caught:
        read_small_file(tmp_path / "x", 4, "this configuration is too long")
    assert str(caught.value) == (
        f"this configuration is too long\n  file:      {tmp_path / 'x'}\n  found:     5 bytes\n  expected:  at most 4"
    )


# What lies beside a checkpoint


def test_a_checkpoint_is_asked_for_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run" / "1000").mkdir(parents=True)
    torch.save({"a": torch.arange(3)}, tmp_path / "run" / "1000" / "x.pt")
    (tmp_path / "run" / "1000" / "near").write_text("in its folder")
    for folder in ("run", "run/1000"):
        (tmp_path / folder / "both").write_text(folder)
    (tmp_path / "run" / "far").write_text("above")

    with open_checkpoint(tmp_path / "run" / "1000" / "x.pt") as checkpoint:
        assert [checkpoint.has_beside(name) for name in ("near", "far", "gone")] == [True, False, False]
        assert checkpoint.read_beside("near", 100) == (tmp_path / "run/1000/near", b"in its folder")
        assert checkpoint.read_beside("both", 100, above=True) == (tmp_path / "run/1000/both", b"run/1000")
        assert checkpoint.read_beside("far", 100) is None
        assert checkpoint.read_beside("far", 100, above=True) == (tmp_path / "run/far", b"above")
        with pytest.raises(CheckpointError, match="the file is too long to be read"):
            checkpoint.read_beside("near", 5)


def test_beside_a_link_comes_before_beside_what_it_leads_to(path: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "best.pt"
    link.symlink_to(path)
    (tmp_path / "there").write_text("there")
    for folder in (tmp_path, tmp_path / "links"):
        (folder / "both").write_text(folder.name)

    with open_checkpoint(link) as checkpoint:
        assert checkpoint.read_beside("there", 100) == (tmp_path / "there", b"there")
        assert checkpoint.read_beside("both", 100) == (tmp_path / "links" / "both", b"links")


def test_beside_several_files_is_beside_their_index(tmp_path: Path, open_files: Callable[[], int]) -> None:
    (tmp_path / "vae").mkdir()
    save_file({"a": torch.arange(3)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text('{"vae": []}')
    (tmp_path / "note").write_text("here")
    before = open_files()

    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.has_beside("note")
        assert not checkpoint.has_beside("diffusion_pytorch_model.safetensors")
        assert checkpoint.size_bytes == (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert open_files() == before


# What the system refuses


def test_a_file_whose_size_cannot_be_found_out_is_an_error_and_closed_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, open_files: Callable[[], int]
) -> None:
    before = open_files()
    error = refused(monkeypatch, "fstat", errno.ESTALE, lambda: SourceFile.open(path))
    assert (error.what, error.file) == (STALE, str(path))
    assert open_files() == before


@pytest.mark.parametrize(
    "ask", [lambda file: file.refuse_changed(), lambda file: file.read(0, 1 << 30)], ids=["changed", "cut"]
)
def test_a_file_that_gets_stale_is_an_error(
    ask: Callable[[SourceFile], object], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SourceFile.open(path) as file:
        error = refused(monkeypatch, "fstat", errno.ESTALE, lambda: ask(file))
    assert (error.what, error.file) == (STALE, str(path))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
def test_a_file_that_cannot_be_opened_or_read_says_why(code: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SourceFile.open(path) as file:
        error = refused(monkeypatch, "pread", code, lambda: file.read(0, 1))
    assert error.what == f"the file cannot be read: {os.strerror(code)}"
    error = refused(monkeypatch, "open", code, lambda: SourceFile.open(path))
    assert error.what == f"the file cannot be opened: {os.strerror(code)}"


@pytest.mark.parametrize("code", [errno.EIO, errno.EINTR, errno.ENOSPC])
def test_a_file_that_was_read_and_cannot_be_closed_was_read_nevertheless(
    code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = os.close

    def fail(fd: int) -> None:
        close(fd)
        closed.append(fd)
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, open_checkpoint(path) as checkpoint:
        patch.setattr(os, "close", fail)
        checkpoint.close()
    assert len(closed) == 1


def test_a_link_that_may_not_be_read_is_not_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.pt").symlink_to("gone")
    monkeypatch.setattr(os, "readlink", failing(errno.EACCES))

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "folder" / "x.pt")
    assert (caught.value.what, caught.value.found) == ("there is no such file", None)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "folder")
    assert (caught.value.what, caught.value.found) == ("there is no checkpoint in this folder", "x.pt")


def test_a_folder_is_listed_by_name_and_what_may_not_be_looked_at_is_neither_file_nor_folder(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for link in ("file", "folder", "nothing"):
        (tmp_path / f"to-{link}").symlink_to(link)

    assert [(entry.path.name, entry.is_file, entry.is_folder) for entry in list_folder(tmp_path)] == [
        ("file", True, False),
        ("folder", False, True),
        ("to-file", True, False),
        ("to-folder", False, True),
        ("to-nothing", False, False),
    ]
    (tmp_path / "around").symlink_to("around")
    assert FolderEntry(tmp_path / "around", False, False) in list_folder(tmp_path)


class Broken:
    """A listing that fails when it has begun."""

    def __enter__(self) -> Iterator[os.DirEntry[str]]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def __exit__(self, *_: object) -> None: ...


def test_a_folder_whose_listing_breaks_off_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "scandir", lambda _: Broken())

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert (caught.value.what, caught.value.file) == (
        "the folder cannot be read: Input/output error",
        str(tmp_path),
    )


def test_a_name_that_no_file_can_have_has_no_size(tmp_path: Path) -> None:
    assert [size_of(tmp_path / name) for name in ("a\0b", "\ud800", "missing")] == [None, None, None]
