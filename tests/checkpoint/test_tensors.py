"""Files, storages and the bytes of tensors, held against torch."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cogtools.checkpoint.dtypes import DTYPES
from cogtools.checkpoint.files import SourceFile
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.tensors import contiguous_strides
from cogtools.errors import CheckpointError
from tests.support.factories import SAVERS, save_big_endian, zoo
from tests.support.oracles import described_by_cogtools, described_by_torch, tied, torch_load


@pytest.mark.parametrize("chunk_bytes", [1, 7, 16, 1 << 20])
@pytest.mark.parametrize("saver", sorted(SAVERS.keys() - {"numpy1", "big-endian"}))
def test_every_odd_tensor_is_described_and_read_as_torch_load_does(
    saver: str, chunk_bytes: int, tmp_path: Path
) -> None:
    # torch.load does not read untyped storages from its legacy format.
    tensors = {key: tensor for key, tensor in zoo().items() if saver != "legacy" or _has_typed_storage(tensor)}
    SAVERS[saver](tensors, tmp_path / "zoo.pt")
    loaded = torch_load(tmp_path / "zoo.pt")

    with open_checkpoint(tmp_path / "zoo.pt") as checkpoint:
        assert described_by_cogtools(checkpoint.tensors, chunk_bytes=chunk_bytes) == described_by_torch(loaded)


@pytest.mark.parametrize("chunk_bytes", [1, 16, 1 << 20])
def test_numbers_of_a_big_endian_machine_come_out_little_endian(chunk_bytes: int, tmp_path: Path) -> None:
    # Of untyped storages torch.load does not know how many bytes make a number, and leaves them as they are.
    tensors = {key: tensor for key, tensor in zoo().items() if _has_typed_storage(tensor)}
    save_big_endian(tensors, tmp_path / "zoo.pt")

    assert described_by_torch(torch_load(tmp_path / "zoo.pt")) == described_by_torch(tensors)
    with open_checkpoint(tmp_path / "zoo.pt") as checkpoint:
        assert described_by_cogtools(checkpoint.tensors, chunk_bytes=chunk_bytes) == described_by_torch(tensors)


def _has_typed_storage(tensor: torch.Tensor) -> bool:
    return DTYPES[str(tensor.dtype).removeprefix("torch.")].storage_class is not None


@pytest.mark.parametrize("chunk_bytes", [1, 8, 20, 100, 1000])
def test_no_piece_of_a_tensor_is_larger_than_asked_for(chunk_bytes: int, tmp_path: Path) -> None:
    tensors = {
        "transposed": torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1),
        "repeated": torch.arange(3.0).reshape(3, 1).expand(3, 40),
        "whole": torch.arange(60.0),
    }
    torch.save(tensors, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        for key, entry in checkpoint.tensors.items():
            pieces = list(tensor_chunks(entry, chunk_bytes))
            assert b"".join(pieces) == tensors[key].contiguous().numpy().tobytes()
            assert max(map(len, pieces)) <= max(chunk_bytes, entry.dtype.itemsize)


def test_tensors_that_share_a_storage_in_torch_share_it_in_the_index(tmp_path: Path) -> None:
    torch.save(zoo(), tmp_path / "zoo.pt")
    loaded = torch_load(tmp_path / "zoo.pt")
    in_torch = tied((key, tensor.data_ptr()) for key, tensor in loaded.items() if tensor.numel())

    with open_checkpoint(tmp_path / "zoo.pt") as checkpoint:
        assert tied((key, id(entry.storage)) for key, entry in checkpoint.tensors.items()) == in_torch
    assert in_torch == {frozenset({"tied", "tied again"})}


def test_only_tensors_that_lie_row_by_row_are_a_range_of_the_file(tmp_path: Path) -> None:
    torch.save(zoo(), tmp_path / "zoo.pt")

    with open_checkpoint(tmp_path / "zoo.pt") as checkpoint:
        ranges = {key: entry.range() for key, entry in checkpoint.tensors.items()}
        whole = (tmp_path / "zoo.pt").read_bytes()
    assert {key for key, place in ranges.items() if place is None} == {
        "transposed",
        "sliced with steps",
        "expanded",
        "permuted 4-d",
    }
    place = ranges["offset view"]
    assert place is not None
    written = whole[place.offset_bytes : place.offset_bytes + place.size_bytes]
    assert written == torch.arange(7, 19, dtype=torch.float32).numpy().tobytes()


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4), (2, 0, 4), (1, 1, 5)])
def test_contiguous_strides_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert contiguous_strides(shape) == torch.empty(shape).stride()


def test_a_read_beyond_the_end_says_where_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(1024))

    with SourceFile.open(path) as file, pytest.raises(CheckpointError) as caught:
        file.read(812, 4096)
    assert str(caught.value) == (
        "the file is cut short\n"
        f"  file:      {path}\n"
        "  found:     the file ends at 1,024\n"
        "  expected:  4,096 bytes at offset 812\n"
        "  try:       copy or download it again; a checkpoint that is still being written looks like this too"
    )


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(1000)}, tmp_path / "x.pt")

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        os.truncate(tmp_path / "x.pt", 500)
        with pytest.raises(CheckpointError, match="the file is cut short"):
            list(tensor_chunks(checkpoint.tensors["a"]))


def test_closing_a_checkpoint_closes_its_file_and_what_was_unpacked_of_it(
    tmp_path: Path, open_files: Callable[[], int]
) -> None:
    SAVERS["deflated"]({"a": torch.arange(10), "b": torch.arange(20)}, tmp_path / "x.pt")
    before = open_files()

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        for entry in checkpoint.tensors.values():
            list(tensor_chunks(entry))
        assert open_files() == before + 2
    assert open_files() == before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_more_storages_are_unpacked_than_a_process_may_open_files(
    tmp_path: Path, open_files: Callable[[], int]
) -> None:
    resource = pytest.importorskip("resource")
    tensors = {str(index): torch.full((8,), index) for index in range(60)}
    SAVERS["deflated"](tensors, tmp_path / "x.pt")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 20, limits[1]))
    try:
        with open_checkpoint(tmp_path / "x.pt") as checkpoint:
            read = {key: b"".join(tensor_chunks(entry)) for key, entry in checkpoint.tensors.items()}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read == {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


def test_a_storage_that_cannot_be_unpacked_leaves_nothing_behind_where_the_next_one_goes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"packed")

    def broken() -> Iterator[bytes]:
        yield b"some of it"
        raise CheckpointError("it cannot be unpacked")

    with SourceFile.open(path) as file:
        first = file.unpacked([b"one", b"two"])
        with pytest.raises(CheckpointError):
            file.unpacked(broken())
        second = file.unpacked([b"three"])
        assert (first.read(), second.read(), second.offset_bytes) == (b"onetwo", b"three", 6)


def test_no_room_to_unpack_is_told_with_how_much_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SAVERS["deflated"]({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with open_checkpoint(tmp_path / "x.pt") as checkpoint, pytest.raises(CheckpointError) as caught:
        list(tensor_chunks(checkpoint.tensors["a"]))
    error = caught.value
    storage = checkpoint.tensors["a"].storage.key
    assert (error.what, error.expected) == (
        f"entry 'archive/data/{storage}' cannot be unpacked into a temporary file: No such file or directory",
        "room for 4,000 bytes in the folder for temporary files",
    )


@pytest.mark.parametrize("saver", ["zip", "big-endian"])
def test_rows_of_a_tensor_are_those_of_torch(saver: str, tmp_path: Path) -> None:
    grid = torch.arange(24.0).reshape(6, 4)
    tensors = {
        "whole": grid,
        "transposed": grid.clone().T,
        "bias": torch.arange(6.0),
        "view": torch.arange(40.0)[5:29].view(6, 4),
    }
    SAVERS[saver](tensors, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        for key, tensor in tensors.items():
            for first, last in [(0, 2), (2, 4), (1, 1), (0, len(tensor)), (len(tensor), len(tensor))]:
                rows = checkpoint.tensors[key].rows(first, last)
                assert b"".join(tensor_chunks(rows)) == tensor[first:last].contiguous().numpy().tobytes()
                assert rows.shape == tuple(tensor[first:last].shape)


@pytest.mark.parametrize(("first", "last"), [(0, 4), (-1, 2), (2, 1), (4, 4)])
def test_rows_that_a_tensor_does_not_have_are_a_bug_of_the_caller(first: int, last: int, tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(3, 2), "number": torch.tensor(1.0)}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        with pytest.raises(ValueError, match="no rows"):
            checkpoint.tensors["x"].rows(first, last)
        with pytest.raises(ValueError, match="no rows"):
            checkpoint.tensors["number"].rows(0, 0)
