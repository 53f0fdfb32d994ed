"""The CRC-32s that a checkpoint records are compared with those of the bytes that were copied."""

import threading
import zlib
from pathlib import Path

import pytest

from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.tensors import Storage
from cogtools.conversion.carry_out import Written, crc32_status
from cogtools.conversion.crc32 import Crc32Check, joined_crc32
from cogtools.errors import CheckpointError

CONTENT = bytes(range(200))


class Remote:
    """A file that is not on this machine, and must not be read a second time."""

    path = Path("remote.pt")
    fd = -1

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        raise AssertionError(f"read again: {size_bytes} bytes at {offset_bytes}")


def storage(key: str, start: int, size: int, *, file: object, crc32: int | None = 0) -> Storage:
    recorded = zlib.crc32(CONTENT[start : start + size]) if crc32 == 0 else crc32
    return Storage(key, size, recorded, lambda: FileRange(file, start, size))  # type: ignore[arg-type]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a.pt").write_bytes(CONTENT)
    return tmp_path / "a.pt"


def finish(*storages: Storage) -> tuple[Storage, ...]:
    with Crc32Check(storages) as check:
        check.finish()
    return check.unchecked


@pytest.mark.parametrize("is_threaded", [True, False])
def test_storages_of_a_file_on_this_machine_are_read_whole(
    source: Path, is_threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    if not is_threaded:
        monkeypatch.setattr(threading.Thread, "start", refuse)
    with SourceFile.open(source) as file:
        good = [
            storage("0", 0, 50, file=file),
            storage("1", 50, 150, file=file),
            storage("2", 0, 9, file=file, crc32=None),
        ]
        assert finish(*good) == ()
        with pytest.raises(CheckpointError) as caught:
            finish(good[0], storage("7", 3, 4, file=file, crc32=0xABC))
    assert caught.value.to_dict() == {
        "kind": "checkpoint",
        "what": "the checkpoint is damaged: weights have changed since they were saved",
        "file": str(source),
        "found": f"storage '7' with CRC-32 {zlib.crc32(CONTENT[3:7]):08x}",
        "expected": "CRC-32 00000abc, as the file records it",
        "hint": {"advice": "copy or download the checkpoint again", "command": None},
        "problems": [],
    }


def test_a_file_that_cannot_be_read_is_an_error_of_finish(source: Path) -> None:
    with SourceFile.open(source) as file:
        source.write_bytes(CONTENT[:10])
        with pytest.raises(CheckpointError, match="the file is cut short"):
            finish(storage("0", 0, 50, file=file))


def test_a_block_that_ends_early_ends_the_thread(source: Path) -> None:
    before = threading.active_count()
    with SourceFile.open(source) as file, Crc32Check([storage("0", 0, 50, file=file)]):
        pass
    assert threading.active_count() == before


@pytest.mark.parametrize("split", [0, 1, 7, 100, 199, 200])
def test_the_crc32s_of_two_parts_give_that_of_both(split: int) -> None:
    first, second = CONTENT[:split], CONTENT[split:]
    assert joined_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(CONTENT)


PIECES = {
    "at-once": [(0, 200)],
    "in-order": [(0, 50), (50, 100), (150, 50)],
    "back-to-front": [(150, 50), (50, 100), (0, 50)],
    "empty": [(0, 0), (0, 200), (200, 0)],
}


@pytest.mark.parametrize("name", PIECES)
def test_bytes_of_other_files_are_checked_as_they_come(name: str) -> None:
    good = storage("0", 0, 200, file=Remote())
    damaged = storage("1", 0, 200, file=Remote(), crc32=1)
    for one in (good, damaged):
        with Crc32Check([one]) as check:
            for offset, size in PIECES[name]:
                check.update(one, offset, CONTENT[offset : offset + size])
            assert check.unchecked == ()
            if one is good:
                check.finish()
            else:
                with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
                    check.finish()


PARTS = {
    "nothing": [],
    "the-beginning": [(0, 199)],
    "the-end": [(1, 199)],
    "a-gap": [(0, 50), (51, 149)],
}


@pytest.mark.parametrize("name", PARTS)
def test_a_storage_of_which_only_parts_came_is_not_checked_and_said_to_be_so(name: str) -> None:
    part = storage("0", 0, 200, file=Remote(), crc32=1)
    whole = storage("1", 0, 200, file=Remote())
    with Crc32Check([part, whole]) as check:
        for offset, size in PARTS[name]:
            check.update(part, offset, CONTENT[offset : offset + size])
        check.update(whole, 0, CONTENT)
        check.finish()
        assert check.unchecked == (part,)


def test_an_output_is_called_checked_only_if_all_was_compared_that_is_recorded() -> None:
    recorded, unrecorded = storage("0", 0, 9, file=Remote()), storage("1", 0, 9, file=Remote(), crc32=None)
    assert crc32_status([recorded, unrecorded], Written(), dry_run=False) == "checked"
    assert crc32_status([recorded], Written(unchecked=1), dry_run=False) == "not checked"
    assert crc32_status([recorded], Written(), dry_run=True) == "not checked"
    assert crc32_status([unrecorded], Written(), dry_run=False) == "not recorded"


def test_what_needs_no_check_may_be_handed_in_too(source: Path) -> None:
    unrecorded = storage("0", 0, 200, file=Remote(), crc32=None)
    with SourceFile.open(source) as file:
        local = storage("1", 0, 200, file=file)
        with Crc32Check([unrecorded, local]) as check:
            check.update(unrecorded, 0, b"anything")
            check.update(local, 0, b"anything")
            check.finish()
            assert check.unchecked == ()
