"""Files of torch.save that cogtools writes: read by torch, by zipfile and by cogtools."""

import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import torch

from cogtools.checkpoint.dtypes import DTYPES, DType
from cogtools.checkpoint.formats import torch_zip_writer
from cogtools.checkpoint.formats.torch_zip_writer import TorchArchive
from cogtools.checkpoint.opening import open_checkpoint
from tests.support.oracles import described_by_cogtools, described_by_torch


@dataclass
class Spec:
    key: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


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


def written(tensors: OrderedDict[str, torch.Tensor], wrapper: str = "module") -> bytes:
    archive = TorchArchive(specs(tensors), wrapper=wrapper)
    content = archive.start
    for number, tensor in enumerate(tensors.values()):
        data = content_of(tensor)
        content += archive.before(number) + data + archive.after(number, zlib.crc32(data))
    content += archive.end()
    assert len(content) == archive.size_bytes
    return content


@pytest.mark.parametrize("large", [None, 100, 0], ids=["zip", "zip64 from 100 bytes on", "zip64"])
def test_torch_zipfile_and_cogtools_read_what_was_written(
    large: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large is not None:
        monkeypatch.setattr(torch_zip_writer, "IN_EXTRA_ZIP64", large)
    content = written(TENSORS)
    if large is not None:  # what stands in place of the sizes is this number, whoever asks
        content = _with_real_escapes(content, large)
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    assert zipfile.ZipFile(path).testzip() is None
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert described_by_torch(loaded["module"]) == described_by_torch(TENSORS)
    with open_checkpoint(path) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)
        assert checkpoint.wrapper == ("module",)
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
    (tmp_path / "x.pt").write_bytes(written(TENSORS))
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        offsets = [entry.storage.range().offset_bytes for entry in checkpoint.tensors.values()]
    assert [offset % 64 for offset in offsets] == [0] * len(TENSORS)


def test_no_tensors_are_an_empty_state_dict(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(written(OrderedDict()))
    assert torch.load(tmp_path / "x.pt") == {"module": {}}
