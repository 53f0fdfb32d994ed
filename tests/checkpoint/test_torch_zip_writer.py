"""What cogtools writes as a file of torch.save: torch reads it, Python's zipfile reads it, cogtools reads it."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cogtools.checkpoint.dtypes import DTYPES, DType
from cogtools.checkpoint.formats import torch_zip_writer
from cogtools.checkpoint.formats.torch_zip_writer import TorchArchive
from cogtools.checkpoint.opening import open_checkpoint
from tests.support.factories import ZOO_DTYPES
from tests.support.oracles import described_by_cogtools, described_by_torch


class Spec(NamedTuple):
    key: str
    dtype: DType
    shape: tuple[int, ...]
    size_bytes: int


def content_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def spec(key: str, tensor: torch.Tensor) -> Spec:
    dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
    return Spec(key, dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size())


def write(path: Path, tensors: dict[str, torch.Tensor], wrapper: str = "module") -> Path:
    archive = TorchArchive([spec(key, tensor) for key, tensor in tensors.items()], wrapper)
    parts = [archive.start]
    for number, tensor in enumerate(tensors.values()):
        content = content_of(tensor)
        parts += [archive.before(number), content, archive.after(number, zlib.crc32(content))]
    parts.append(archive.end())
    path.write_bytes(b"".join(parts))
    assert path.stat().st_size == archive.size_bytes
    return path


STORED = [name for dtype in ZOO_DTYPES if DTYPES[name := str(dtype).removeprefix("torch.")].storage_class is not None]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    made = {name: torch.arange(6).to(getattr(torch, name)).reshape(2, 3) for name in STORED}
    return made | {
        "a number": torch.tensor(3.5),
        "empty": torch.empty(0, 5),
        "six dimensions": torch.arange(64.0).reshape((2,) * 6),
        "naïve\nkey": torch.ones(1),
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it_with_weights_only(mmap: bool, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    loaded = torch.load(write(tmp_path / "a.pt", tensors), weights_only=True, mmap=mmap)
    assert loaded.keys() == {"module"}
    assert described_by_torch(loaded["module"]) == described_by_torch(tensors)


def test_cogtools_reads_it_and_finds_every_crc32(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path / "a.pt", tensors)) as checkpoint:
        assert (checkpoint.wrapper, checkpoint.foreign, checkpoint.values) == (("module",), {}, {})
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(tensors)
        found = {key: entry.storage.crc32 for key, entry in checkpoint.tensors.items()}
    assert found == {key: zlib.crc32(content_of(tensor)) for key, tensor in tensors.items()}


def test_zipfile_finds_every_byte_as_its_crc32_says(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with zipfile.ZipFile(write(tmp_path / "a.pt", tensors)) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"


def test_tensors_begin_where_they_can_be_mapped(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path / "a.pt", tensors)) as checkpoint:
        assert {entry.storage.range().offset_bytes % 64 for entry in checkpoint.tensors.values()} == {0}


def test_the_same_tensors_give_the_same_bytes(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, tensors).read_bytes() for name in ("a.pt", "b.pt"))
    assert one == other


def test_the_wrapper_is_the_key_that_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", {"a": torch.ones(2)}, wrapper="state_dict")
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["a"], torch.ones(2))


def test_nothing_but_an_empty_state_dict_is_a_file_too(tmp_path: Path) -> None:
    assert torch.load(write(tmp_path / "a.pt", {}), weights_only=True) == {"module": {}}


def test_more_than_32_bits_of_bytes_and_16_of_entries_are_said_in_64(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a file of more than 4 GiB: what is large is what does not fit into 100 bytes, and 3 entries are many."""
    from cogtools.checkpoint.formats import zip_archive

    tensors = {"large": torch.arange(100.0), "small": torch.ones(2)}
    plain = write(tmp_path / "a.pt", tensors)
    monkeypatch.setattr(torch_zip_writer, "is_wide", lambda number: number >= 100)
    monkeypatch.setattr(torch_zip_writer, "MAX_COUNT", 3)
    path = write(tmp_path / "b.pt", tensors)
    assert path.stat().st_size > plain.stat().st_size
    assert b"PK\x06\x06" in path.read_bytes()
    assert described_by_torch(torch.load(path, weights_only=True)["module"]) == described_by_torch(tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with open_checkpoint(path) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(tensors)
    assert zip_archive.IN_EXTRA_ZIP64 == 0xFFFFFFFF


def test_a_dtype_without_a_storage_class_is_an_error() -> None:
    with pytest.raises(ValueError, match="no storage class for float8_e4m3fn"):
        TorchArchive([Spec("a", DTYPES["float8_e4m3fn"], (2,), 2)], "module")
