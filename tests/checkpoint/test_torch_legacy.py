"""Legacy files of torch.save: pickles, then storages. The same index as from the zip file."""

from pathlib import Path

import pytest
import torch

from cogtools.checkpoint.formats import torch_legacy
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_legacy
from tests.support.oracles import described_by_cogtools, described_by_torch, torch_load

PICKLE = "the checkpoint's pickle cannot be read"
TENSORS = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(1.5), "c": torch.empty(0)}


def save(value: object, path: Path, protocol: int = 2) -> Path:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    path = save(TENSORS, tmp_path / "x.pt", protocol)

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torch.save (legacy)"
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(torch_load(path))
        assert all(entry.storage.crc32 is None for entry in checkpoint.tensors.values())


def test_it_has_the_same_index_as_the_zip_file(tmp_path: Path) -> None:
    made = sat_checkpoint(sat_state_dict(TOY_2B, 4, base="telling"))
    torch.save(made, tmp_path / "zip.pt")
    save_legacy(made, tmp_path / "legacy.pt")

    with open_checkpoint(tmp_path / "zip.pt") as zipped, open_checkpoint(tmp_path / "legacy.pt") as legacy:
        assert described_by_cogtools(legacy.tensors) == described_by_cogtools(zipped.tensors)
        assert described_by_cogtools(legacy.beside) == described_by_cogtools(zipped.beside)
        assert (legacy.wrapper, list(legacy.values)) == (zipped.wrapper, list(zipped.values))
        assert legacy.foreign == zipped.foreign


def test_pickles_that_are_longer_than_what_is_read_first_are_read(tmp_path: Path) -> None:
    value = {"module": TENSORS, "notes": "x" * (5 << 20)}
    path = save(value, tmp_path / "x.pt")

    with open_checkpoint(path) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)
        assert checkpoint.values == {"notes": "x" * (5 << 20)}


def test_pickles_that_are_longer_than_any_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_legacy, "MAX_PICKLE_BYTES", 2 << 20)
    path = save({"notes": "x" * (3 << 20)}, tmp_path / "x.pt")

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert (caught.value.what, caught.value.found) == (PICKLE, "it ends too early")


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        pytest.param(
            b"\x80\x02M\xe9\x03.", b"\x80\x02M\xea\x03.", "it is of version 1002, and 1001 is known", id="version"
        ),
        pytest.param(
            b"\x80\x02]q\x00",
            b"\x80\x02}q\x00",
            "it has an instruction to append items where there is a dict",
            id="keys",
        ),
    ],
)
def test_a_file_of_another_make_is_refused(old: bytes, new: bytes, found: str, tmp_path: Path) -> None:
    path = save({"a": torch.arange(3)}, tmp_path / "x.pt")
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert (caught.value.what, caught.value.found) == (PICKLE, found)


def test_a_file_whose_storages_are_cut_short_is_refused_before_any_is_read(tmp_path: Path) -> None:
    path = save({"a": torch.arange(300)}, tmp_path / "x.pt")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value) == (
        "the file is cut short\n"
        f"  file:      {path}\n"
        f"  found:     the file ends at {size - 1:,}\n"
        f"  expected:  {size:,} bytes at offset 0\n"
        "  try:       copy or download it again; a checkpoint that is still being written looks like this too"
    )


def test_a_storage_of_another_length_than_its_tensors_say_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = save({"a": torch.arange(3)}, tmp_path / "x.pt")
    content = bytearray(path.read_bytes())
    content[-32] = 4  # the count before the 24 bytes of the only storage
    path.write_bytes(content)

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError) as caught:
        list(tensor_chunks(checkpoint.tensors["a"]))
    storage = checkpoint.tensors["a"].storage.key
    assert caught.value.found == f"storage {storage!r} has 4 elements, and not as many as it says"
