"""Files of torch.save that cogtools writes: read by torch, by zipfile and by cogtools."""

import io
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch

from cogtools.checkpoint.dtypes import DTYPES, DType
from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.formats import torch_zip_writer
from cogtools.checkpoint.formats.torch_zip_writer import TorchZip
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
from tests.support.oracles import described_by_cogtools, described_by_torch


@dataclass
class Spec:
    key: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Buffer:
    """An output in memory."""

    def __init__(self) -> None:
        self.content = bytearray()

    def write(self, data: bytes) -> None:
        self.content += data

    def copy(self, source: FileRange) -> None:
        self.content += source.read()

    def write_at(self, offset_bytes: int, data: bytes) -> None:
        self.content[offset_bytes : offset_bytes + len(data)] = data


TENSORS = OrderedDict(
    {
        "model.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "model.bias": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "ganz ähnlich": torch.arange(40, dtype=torch.bfloat16).reshape(2, 5, 4),
        "f": torch.linspace(0, 1, 1001),
        "numbers": torch.tensor([1, 2, 3]),
        "flags": torch.tensor([True, False]),
    }
)


def content_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def specs(tensors: OrderedDict[str, torch.Tensor]) -> list[Spec]:
    return [
        Spec(key, DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for key, tensor in tensors.items()
    ]


def written(
    tensors: OrderedDict[str, torch.Tensor], contents: Iterable[Iterable[FileRange | bytes]], wrapper: str | None
) -> bytes:
    output, archive = Buffer(), TorchZip(specs(tensors), wrapper=wrapper)
    archive.write(output, contents)
    assert len(output.content) == archive.size_bytes
    return bytes(output.content)


def in_parts(tensor: torch.Tensor) -> list[bytes]:
    content = content_of(tensor)
    return [content[:3], content[3:]]


@pytest.mark.parametrize("wrapper", ["module", None])
@pytest.mark.parametrize("large", [None, 100, 0], ids=["zip", "zip64 from 100 bytes on", "zip64"])
def test_torch_zipfile_and_cogtools_read_what_was_written(
    wrapper: str | None, large: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large is not None:
        monkeypatch.setattr(torch_zip_writer, "_IN_ZIP64", large)
    content = written(TENSORS, map(in_parts, TENSORS.values()), wrapper)
    if large is not None:  # what stands in place of the sizes is this number, whoever asks
        content = _with_real_escapes(content, large)
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert zipfile.ZipFile(path).testzip() is None
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        state = loaded if wrapper is None else loaded[wrapper]
        assert type(state) is OrderedDict
        assert described_by_torch(state) == described_by_torch(TENSORS)
    with open_checkpoint(path) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)
        assert checkpoint.wrapper == ((wrapper,) if wrapper else ())
        assert checkpoint.foreign == {}


def _with_real_escapes(content: bytes, small: int) -> bytes:
    """Put the number by which readers know zip64 in place of the one that stood in for it."""
    file = bytearray(content)
    escape, real = small.to_bytes(4, "little"), b"\xff" * 4
    end = file.rindex(b"PK\x05\x06")
    position = int.from_bytes(file[file.rindex(b"PK\x06\x06") + 48 :][:8], "little")
    if file[end + 16 : end + 20] == escape:
        file[end + 16 : end + 20] = real
    while file[position : position + 4] == b"PK\x01\x02":
        has_extra = file[position + 30 : position + 32] != b"\0\0"
        for field in (20, 24, 42) if has_extra else ():
            if file[position + field : position + field + 4] == escape:
                file[position + field : position + field + 4] = real
        lengths = [int.from_bytes(file[position + field : position + field + 2], "little") for field in (28, 30)]
        position += 46 + sum(lengths)
    return bytes(file)


def test_every_entry_is_aligned_as_torch_aligns_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(written(TENSORS, map(in_parts, TENSORS.values()), "module"))
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        offsets = [entry.storage.range().offset_bytes for entry in checkpoint.tensors.values()]
    assert [offset % 64 for offset in offsets] == [0] * len(TENSORS)


def test_the_entries_are_those_of_torch_save(tmp_path: Path) -> None:
    torch.save({"module": TENSORS}, tmp_path / "archive.pt")
    ours = zipfile.ZipFile(io.BytesIO(written(TENSORS, map(in_parts, TENSORS.values()), "module")))
    by_torch = zipfile.ZipFile(tmp_path / "archive.pt")
    assert ours.namelist() == by_torch.namelist()
    differ = {name for name in ours.namelist() if ours.read(name) != by_torch.read(name)}
    assert differ == {"archive/data.pkl", "archive/.data/serialization_id"}


def test_ranges_of_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"before" + content_of(TENSORS["f"]) + b"after")
    tensors = OrderedDict(f=TENSORS["f"])
    with SourceFile.open(tmp_path / "source") as source:
        content = written(tensors, [[FileRange(source, 6, 2000), FileRange(source, 2006, 2004)]], "module")
    (tmp_path / "x.pt").write_bytes(content)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    assert torch.equal(torch.load(tmp_path / "x.pt")["module"]["f"], TENSORS["f"])


def test_a_range_that_cannot_be_read_is_the_error_of_the_writer(tmp_path: Path) -> None:
    class Sparse(Buffer):
        def copy(self, source: FileRange) -> None:
            self.content += bytes(source.size_bytes)

    (tmp_path / "source").write_bytes(b"short")
    archive = TorchZip(specs(OrderedDict(f=TENSORS["f"])))
    with SourceFile.open(tmp_path / "source") as source, pytest.raises(CheckpointError, match="cut short"):
        archive.write(Sparse(), [[FileRange(source, 0, 4004)]])


def test_no_tensors_are_an_empty_state_dict(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(written(OrderedDict(), [], "module"))
    assert torch.load(tmp_path / "x.pt") == {"module": OrderedDict()}


def test_without_threads_the_checksums_are_computed_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = written(TENSORS, map(in_parts, TENSORS.values()), "module")

    def start(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", start)
    assert written(TENSORS, map(in_parts, TENSORS.values()), "module") == expected
