"""Zip files of torch.save: read as torch.load reads them, or refused with what is wrong."""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogtools.checkpoint.files import SourceFile
from cogtools.checkpoint.formats.zip_archive import read_directory, unpacked_range
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
from tests.support import hostile
from tests.support.factories import SAVERS, TOY_5B, WRAPPERS, sat_checkpoint, sat_state_dict
from tests.support.oracles import described_by_cogtools, described_by_torch, torch_load

AGAIN = "copy or download it again"


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def error_of(path: Path) -> str:
    """The whole message, without the path of the test's folder."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value).replace(str(path), path.name)


def message(what: str, **fields: str) -> str:
    hint = fields.pop("hint", AGAIN)
    lines = [("file", "x.pt"), *fields.items(), ("try", hint)]
    return "\n".join([what, *(f"  {label + ':':<10} {text}" for label, text in lines)])


# What is read


@pytest.mark.parametrize("saver", SAVERS)
def test_every_way_to_save_a_checkpoint_is_read_as_torch_load_reads_it(saver: str, tmp_path: Path) -> None:
    SAVERS[saver](sat_checkpoint(sat_state_dict(TOY_5B, 4, torch.bfloat16, base="telling")), tmp_path / "x.pt")
    module = torch_load(tmp_path / "x.pt")["module"]

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.wrapper == ("module",)
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(module)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_state_dict_is_found_wherever_people_put_it(wrapper: str, tmp_path: Path) -> None:
    state = sat_state_dict(TOY_5B, 4, torch.bfloat16, base="telling")
    torch.save(WRAPPERS[wrapper](state), tmp_path / "x.pt")

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.wrapper == (() if wrapper == "bare" else tuple(wrapper.split(".")))
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(state)
        assert (checkpoint.not_tensors, checkpoint.foreign, checkpoint.beside) == ({}, {}, {})


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(1.5)}
    torch.save(tensors, tmp_path / "x.pt", pickle_protocol=protocol)

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(tensors)


def test_the_crc32s_are_those_of_the_archive_and_none_where_all_are_zero(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6), "b": torch.arange(3.0)}
    SAVERS["zip"](tensors, tmp_path / "with.pt")
    SAVERS["without-crc32"](tensors, tmp_path / "without.pt")

    with open_checkpoint(tmp_path / "with.pt") as checkpoint:
        recorded = {key: entry.storage.crc32 for key, entry in checkpoint.tensors.items()}
    with open_checkpoint(tmp_path / "without.pt") as checkpoint:
        missing = {key: entry.storage.crc32 for key, entry in checkpoint.tensors.items()}
    assert recorded == {key: zlib.crc32(tensor.numpy().tobytes()) for key, tensor in tensors.items()}
    assert missing == {"a": None, "b": None}


@pytest.mark.parametrize("beyond", [1, 7, 100, 258, 1 << 20])
def test_a_deflated_storage_of_any_length_is_unpacked_whole(beyond: int, tmp_path: Path) -> None:
    # Its last match crosses the border of what is unpacked at a time, when all of its input is used up already.
    size = (1 << 20) + beyond
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(size))

    with SourceFile.open(tmp_path / "x.zip") as file:
        archive_read = read_directory(file)
        assert unpacked_range(archive_read, archive_read.entries["zeros"]).read() == bytes(size)


def test_an_archive_with_a_comment_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(saved({"a": torch.arange(4)}))
    with zipfile.ZipFile(tmp_path / "x.pt", "a") as archive:
        archive.comment = b"made with care"

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch({"a": torch.arange(4)})


def test_bytes_are_found_behind_a_local_header_longer_than_the_directory_says(tmp_path: Path) -> None:
    # torch pads local headers, so that storages begin at multiples of 64; the directory has no such padding.
    torch.save({"a": torch.arange(4)}, tmp_path / "x.pt")
    with SourceFile.open(tmp_path / "x.pt") as file:
        archive = read_directory(file)
        entry = archive.entries["x/data/0"]
        place = unpacked_range(archive, entry)

        assert place.offset_bytes > entry.header_offset + 30 + len("x/data/0")
        assert place.offset_bytes % 64 == 0
        assert place.read() == torch.arange(4).numpy().tobytes()


def test_storages_beyond_4_gib_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    _write_sparse_zip64(path, torch.arange(4))
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system has no sparse files")

    with open_checkpoint(path) as checkpoint:
        behind = checkpoint.tensors["behind"]
        place = behind.range()
        assert checkpoint.tensors["large"].size_bytes == 5 << 30
        assert place is not None
        assert place.offset_bytes > 5 << 30
        assert place.read() == torch.arange(4).numpy().tobytes()
    assert torch.load(path, mmap=True)["behind"].tolist() == [0, 1, 2, 3]


def _write_sparse_zip64(path: Path, behind: torch.Tensor) -> None:
    """A file of torch's own writer, with a hole for the large storage."""
    with torch.serialization.skip_data():
        torch.save({"large": torch.empty(5 << 30, dtype=torch.uint8), "behind": behind}, path)
    with SourceFile.open(path) as file:
        archive = read_directory(file)
        offset = unpacked_range(archive, archive.entries["x/data/1"]).offset_bytes
    with path.open("r+b") as target:
        target.seek(offset)
        target.write(behind.numpy().tobytes())


# What is refused: a good archive of these entries, changed


def packed(entries: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


GOOD = {"x/data.pkl": pickle.dumps({"a": 1}, 2), "x/byteorder": b"little"}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param(
            {"x/data.pkl": b"", "x/constants.pkl": b"", "x/code/a.py": b""},
            message(
                "this is a TorchScript archive: a program, not a checkpoint",
                expected="a file of torch.save",
                hint="save the model's state_dict() with torch.save",
            ),
            id="torchscript",
        ),
        pytest.param(
            {"run/1000/a.pt": b"", "run/latest": b"1000"},
            message(
                "this zip archive is no file of torch.save",
                found="2 entries: run/1000/a.pt, run/latest …",
                expected="one folder with data.pkl in it",
                hint="if the checkpoint was packed into this archive, unpack it first",
            ),
            id="packed-folder",
        ),
        pytest.param(
            {"x/data.pkl": b"", "y/data.pkl": b""},
            message(
                "this zip archive is no file of torch.save",
                found="2 entries: x/data.pkl, y/data.pkl …",
                expected="one folder with data.pkl in it",
                hint="if the checkpoint was packed into this archive, unpack it first",
            ),
            id="two-roots",
        ),
        pytest.param(
            GOOD | {"x/byteorder": b"middle"},
            message("this zip archive is damaged", found="the byte order b'middle'", expected="'little' or 'big'"),
            id="byte-order",
        ),
        pytest.param(
            GOOD | {"x/data.pkl": b"\x80\x02}"},
            message(
                "the checkpoint's pickle cannot be read",
                found="it ends too early, or uses what is not there",
                hint="it is not damaged, but not as torch.save writes it: save the weights again, with torch.save",
            ),
            id="pickle-cut",
        ),
    ],
)
def test_an_archive_that_is_no_checkpoint_is_refused_with_what_it_is(
    entries: dict[str, bytes], expected: str, tmp_path: Path
) -> None:
    assert error_of(packed(entries, tmp_path / "x.pt")) == expected


def _patched(signature: bytes, number: int, offset: int, new: bytes) -> Callable[[bytes], bytes]:
    """Overwrite bytes of the archive's n-th header with this signature."""

    def patch(content: bytes) -> bytes:
        at = -1
        for _ in range(number + 1):
            at = content.index(signature, at + 1)
        return content[: at + offset] + new + content[at + offset + len(new) :]

    return patch


DIRECTORY, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        pytest.param(
            lambda content: content + b"more",
            message("this zip archive is damaged", found="bytes after the end of the zip archive"),
            id="bytes-behind",
        ),
        pytest.param(
            lambda content: content[: content.index(DIRECTORY)],
            message(
                "the file is cut short: this zip archive has no directory at its end",
                found="104 bytes",
                hint=AGAIN + "; a checkpoint that is still being written looks like this too",
            ),
            id="no-directory",
        ),
        pytest.param(
            _patched(LOCAL, 0, 30, b"y/data.pkl"),
            message(
                "this zip archive is damaged",
                found="no entry 'x/data.pkl' at 0, where the directory has it",
            ),
            id="other-name",
        ),
        pytest.param(
            _patched(DIRECTORY, 0, 24, struct.pack("<L", 99)),
            message("this zip archive is damaged", found="a stored entry of 99 bytes that takes 17"),
            id="wrong-size",
        ),
        pytest.param(
            _patched(DIRECTORY, 0, 20, struct.pack("<LL", 4000, 4000)),
            message("this zip archive is damaged", found="an entry that ends at 4,030, where another starts at 57"),
            id="overlap",
        ),
        pytest.param(
            _patched(DIRECTORY, 0, 16, b"\1\2\3\4"),
            message(
                "this zip archive is damaged",
                found="entry 'x/data.pkl' with CRC-32 ????????",
                expected="CRC-32 04030201, as the archive records it",
            ),
            id="crc32",
        ),
        pytest.param(
            _patched(DIRECTORY, 0, 8, b"\1\0"),
            message(
                "entry 'x/data.pkl' is packed in a way that is not supported",
                found="encryption",
                expected="stored or deflated entries",
                hint="unpack the archive and pack it again without compression (zip -0)",
            ),
            id="encrypted",
        ),
        pytest.param(
            _patched(DIRECTORY, 0, 10, b"\x0c\0"),
            message(
                "entry 'x/data.pkl' is packed in a way that is not supported",
                found="zip method 12",
                expected="stored or deflated entries",
                hint="unpack the archive and pack it again without compression (zip -0)",
            ),
            id="bzip2",
        ),
        pytest.param(
            _patched(END, 0, 10, b"\3\0"),
            message("this zip archive is damaged", found="a directory that ends before its 3 entries do"),
            id="count-too-high",
        ),
        pytest.param(
            _patched(END, 0, 10, b"\1\0"),
            message("this zip archive is damaged", found="a directory with more than its 1 entries"),
            id="count-too-low",
        ),
        pytest.param(
            _patched(DIRECTORY, 0, 42, b"\xff\xff\xff\xff"),
            message("this zip archive is damaged", found="an entry whose 64-bit size or offset is missing"),
            id="no-zip64",
        ),
    ],
)
def test_a_damaged_archive_is_refused_with_what_is_wrong(
    damage: Callable[[bytes], bytes], expected: str, tmp_path: Path
) -> None:
    path = packed(GOOD, tmp_path / "x.pt")
    crc32 = zlib.crc32(GOOD["x/data.pkl"])
    path.write_bytes(damage(path.read_bytes()))

    assert error_of(path) == expected.replace("????????", f"{crc32:08x}")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", GOOD["x/data.pkl"])
        archive.writestr("x/data.pkl", GOOD["x/data.pkl"])

    assert error_of(tmp_path / "x.pt") == message(
        "this zip archive is damaged", found="two entries 'x/data.pkl': readers disagree on which one counts"
    )


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("x/data/0", bytes(31), "storage '0' should have 32 bytes and has 31"),
        ("x/data/1", bytes(32), "storage '0' should have 32 bytes and is not in the archive"),
    ],
)
def test_a_storage_that_is_not_as_its_tensors_say_is_refused(
    name: str, content: bytes, found: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.arange(4)}))) as archive:
        pickled = next(archive.read(entry) for entry in archive.namelist() if entry.endswith("/data.pkl"))
    path = packed({"x/data.pkl": pickled, name: content}, tmp_path / "x.pt")

    assert error_of(path) == message(
        "the checkpoint's pickle cannot be read",
        found=found,
    )


WRITTEN_SO = "it is not damaged, but not as torch.save writes it: save the weights again, with torch.save"
FORGED = "it is not damaged: it was made to look like a checkpoint. Do not torch.load it"


def bomb(identifier: str) -> bytes:
    return next(row.pickle for row in hostile.bombs() if row.id == identifier)


@pytest.mark.parametrize(
    ("pickled", "hint"),
    [
        (lambda: hostile.checkpoint(module={hostile.KEY: hostile.tensor(offset=9)}), FORGED),
        (lambda: bomb("colliding-keys"), FORGED),
        (lambda: bomb("amplify-encode"), FORGED),
        (lambda: hostile.checkpoint()[:-1], WRITTEN_SO),
        (lambda: pickle.dumps({"a": 1}, 0), WRITTEN_SO),
    ],
    ids=["beyond-its-storage", "keys-of-one-hash", "amplified", "no-end", "protocol-0"],
)
def test_only_what_is_proved_to_be_forged_is_called_so(pickled: Callable[[], bytes], hint: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(hostile.torch_zip(pickled()))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert (caught.value.what, str(caught.value.hint)) == ("the checkpoint's pickle cannot be read", hint)

    # Without a CRC-32 nothing tells damage from forgery.
    members = (replace(member, local={"crc": 0}, central={"crc": 0}) for member in hostile.members(pickled()).values())
    path.write_bytes(hostile.zip_file(members))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value.hint) == AGAIN


@pytest.mark.parametrize("count", [1, 3])
def test_archives_before_the_last_one_are_never_skipped(count: int, tmp_path: Path) -> None:
    # As in a file of a distributed checkpoint: the directory of the last one fits the first, if both are as large.
    first = saved(torch.zeros(4))
    (tmp_path / "x.pt").write_bytes(first * count + saved(torch.ones(4)))

    assert error_of(tmp_path / "x.pt") == message(
        "this file is more than one zip archive",
        found=f"{count * len(first):,} bytes that its last archive does not count, such as other archives before it",
        expected="the file of one torch.save",
        hint="a part of a distributed checkpoint looks like this: convert the whole of that with "
        "python -m torch.distributed.checkpoint.format_utils dcp_to_torch; any other file: copy or download it again",
    )


def test_bytes_before_an_archive_that_counts_them_are_not_skipped_either(tmp_path: Path) -> None:
    before = hostile.torch_zip(hostile.checkpoint())
    (tmp_path / "x.pt").write_bytes(hostile.zip_file(hostile.members(hostile.checkpoint()).values(), prefix=before))

    assert error_of(tmp_path / "x.pt").startswith(
        "this file is more than one zip archive\n  file:      x.pt\n"
        f"  found:     {len(before):,} bytes that its last archive does not count"
    )


def test_a_lazy_view_is_no_plain_tensor(tmp_path: Path) -> None:
    state = {"plain": torch.ones(3), "negative": torch._neg_view(torch.ones(3))}
    torch.save(state, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert (list(checkpoint.tensors), list(checkpoint.not_tensors)) == (["plain"], ["negative"])
