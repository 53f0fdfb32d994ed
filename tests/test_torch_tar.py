"""Tar files of torch.save before 0.1.10, built by hand: no PyTorch of today writes them, but torch.load reads them."""

import io
import pickle
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.unpickler import Global
from cogtools.convert import export_lora
from cogtools.errors import CheckpointError
from tests.factories import TOY_2B, sat_state_dict
from tests.oracles import described_by_cogtools, described_by_torch, torch_load

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Python 3.14 will, by default")


class ById(pickle.Pickler):
    """Writes a tensor as a persistent id: its key."""

    def __init__(self, target: io.BytesIO, keys: dict[int, str]) -> None:
        super().__init__(target, 2)
        self.keys = keys

    def persistent_id(self, value: Any) -> str | None:
        return self.keys.get(id(value))


def plain(*values: object) -> bytes:
    return b"".join(pickle.dumps(value, 2) for value in values)


def storage(key: int, name: str, content: torch.Tensor) -> bytes:
    """(key, location, class), the number of elements, the bytes."""
    head = plain((key, "cpu", getattr(torch, name)))
    return head + struct.pack("<q", content.numel()) + content.numpy().tobytes()


def tensor(key: int, storage_key: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> bytes:
    """(key, storage key, class), dimensions, shape, strides and offset."""
    head = plain((key, storage_key, torch.FloatTensor))
    return head + struct.pack(f"<i4x{2 * len(shape) + 1}q", len(shape), *shape, *stride, offset)


FLOATS, INTEGERS = torch.arange(12.0), torch.arange(4)
STORAGES = (
    plain(2)
    + storage(10, "FloatStorage", FLOATS)
    + storage(11, "LongStorage", INTEGERS)
    + plain([(12, 10, 4, 6)])  # a view: elements 4 to 9 of storage 10
)
TENSORS = (
    plain(4)
    + tensor(1, 10, (3, 4), (4, 1), 0)
    + tensor(2, 10, (2, 3), (1, 2), 5)
    + tensor(3, 11, (4,), (1,), 0)
    + tensor(4, 12, (2, 2), (3, 1), 1)
)


def object_pickle(names: Sequence[str] = ("whole", "transposed", "integers", "viewed")) -> bytes:
    """A state dict of these names, whose tensors are those with the keys 1, 2, 3 …"""
    state = {name: object() for name in names}
    buffer = io.BytesIO()
    keys = {id(marker): str(number) for number, marker in enumerate(state.values(), start=1)}
    ById(buffer, keys).dump({"state_dict": state, "epoch": 3})
    return buffer.getvalue()


def tar(path: Path, storages: bytes = STORAGES, tensors: bytes = TENSORS, value: bytes | None = None) -> Path:
    parts = {"storages": storages, "tensors": tensors, "pickle": object_pickle() if value is None else value}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def save_tar(state: Mapping[str, torch.Tensor], path: Path) -> Path:
    """A state dict of float32 tensors, each with a storage of its own."""
    numbered = list(enumerate(state.values(), start=1))
    return tar(
        path,
        plain(len(state)) + b"".join(storage(key, "FloatStorage", value) for key, value in numbered) + plain([]),
        plain(len(state))
        + b"".join(tensor(key, key, tuple(value.shape), tuple(value.stride()), 0) for key, value in numbered),
        object_pickle(list(state)),
    )


def test_a_lora_is_exported_as_from_a_zip_file(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, 4, torch.float32, base="none", flat=False)
    torch.save(dict(state), tmp_path / "zip.pt")
    save_tar(state, tmp_path / "tar.pt")

    for name in ("zip", "tar"):
        export_lora(tmp_path / f"{name}.pt", tmp_path / name, alpha=1)
    written = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("zip", "tar")]
    assert len(written[0]) == 24
    assert described_by_torch(written[0]) == described_by_torch(written[1])


def test_tensors_views_and_values_are_read_as_torch_load_reads_them(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.pt")
    loaded = torch_load(path)

    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.format, checkpoint.wrapper) == ("torch.save (tar)", ("state_dict",))
        assert checkpoint.values == {"epoch": 3}
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(loaded["state_dict"])
        assert {entry.storage.crc32 for entry in checkpoint.tensors.values()} == {None}
    assert loaded["state_dict"]["viewed"].tolist() == [[5, 6], [8, 9]]


@pytest.mark.parametrize("part", ["storages", "tensors", "value"])
def test_what_any_of_its_pickles_names_is_told(part: str, tmp_path: Path) -> None:
    honest = {"storages": STORAGES, "tensors": TENSORS, "value": object_pickle()}
    path = tar(tmp_path / "x.pt", **{part: b"cos\nsystem\n0" + honest[part]})

    with open_checkpoint(tar(tmp_path / "honest.pt")) as checkpoint:
        assert checkpoint.foreign == {}
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.foreign == {Global("os", "system"): 1}


def test_tensors_of_one_storage_share_it(tmp_path: Path) -> None:
    with open_checkpoint(tar(tmp_path / "x.pt")) as checkpoint:
        whole, transposed, integers, _ = (entry.storage for entry in checkpoint.tensors.values())
    assert whole is transposed
    assert whole is not integers


PICKLE = "the checkpoint's pickle cannot be read"


@pytest.mark.parametrize(
    ("parts", "what", "found"),
    [
        pytest.param({"storages": plain("two")}, PICKLE, "it does not say how many there are", id="count"),
        pytest.param(
            {"storages": plain(1, (10, "cpu", torch.Tensor))},
            PICKLE,
            "it names a storage that PyTorch does not have",
            id="class",
        ),
        pytest.param(
            {"storages": plain(1, [10])}, PICKLE, "it describes a storage in a way that PyTorch does not", id="storage"
        ),
        pytest.param(
            {"storages": plain(1, (10, "cpu", torch.FloatStorage)) + struct.pack("<q", 1 << 40)},
            "the file is cut short",
            "the file ends at 10,240",
            id="storage-beyond-the-end",
        ),
        *(
            pytest.param(
                {"storages": plain(1) + storage(10, "FloatStorage", FLOATS) + plain(views)},
                PICKLE,
                "it describes a view of a storage in a way that PyTorch does not",
                id=name,
            )
            for name, views in {
                "no-views": None,
                "view-of-nothing": [(12, 9, 0, 1)],
                "view-beyond": [(12, 10, 7, 6)],
                "view-before": [(12, 10, -1, 6)],
            }.items()
        ),
        pytest.param(
            {"tensors": plain(1) + tensor(1, 9, (1,), (1,), 0)},
            PICKLE,
            "it describes a tensor in a way that PyTorch does not",
            id="tensor-of-nothing",
        ),
        pytest.param(
            {"tensors": plain(1) + tensor(1, 10, (3, 5), (5, 1), 0)},
            PICKLE,
            "it has a tensor of shape (3, 5) that needs 60 bytes of storage '10', which has 48",
            id="tensor-beyond",
        ),
        pytest.param(
            {"tensors": plain(1, (1, 10, torch.FloatTensor)) + struct.pack("<i", 65)},
            PICKLE,
            "it has a tensor of 65 dimensions",
            id="dimensions",
        ),
        pytest.param(
            {"tensors": plain(100_001)}, PICKLE, "it has more than 100,000 storages or tensors", id="too-many"
        ),
        pytest.param({"tensors": TENSORS[:-1]}, PICKLE, "its list of tensors ends too early", id="tensors-cut"),
        pytest.param(
            {"value": b"\x80\x02X\1\0\0\x009Q."}, PICKLE, "it refers to a tensor that is not there", id="no-tensor"
        ),
    ],
)
def test_what_contradicts_itself_is_refused(parts: dict[str, bytes], what: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tar(tmp_path / "x.pt", **parts))
    assert (caught.value.what, caught.value.found) == (what, found)


def test_an_archive_of_something_else_is_told_to_be_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("run/latest"))
        archive.addfile(tarfile.TarInfo("run/1000.pt"))

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "x.tar")
    assert str(caught.value) == (
        "this tar archive is no file of torch.save\n"
        f"  file:      {tmp_path / 'x.tar'}\n"
        "  found:     run/1000.pt, run/latest\n"
        "  expected:  the parts storages, tensors and pickle\n"
        "  try:       if the checkpoint was packed into this archive, unpack it first: tar xf"
    )


@pytest.mark.parametrize("size", [b"77777777777\0", b"not octal!!\0"])
def test_a_member_that_does_not_fit_is_damage(size: bytes, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.pt")
    content = path.read_bytes()
    path.write_bytes(content[:124] + size + content[136:])

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert (caught.value.what, caught.value.found) == (
        "this tar archive is damaged",
        "a member at 0 that does not fit into the file",
    )
