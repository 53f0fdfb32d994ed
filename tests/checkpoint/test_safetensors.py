"""Safetensors files: read as the safetensors library reads them, or refused as it refuses them."""

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
from tests.support.factories import ZOO_DTYPES
from tests.support.oracles import described_by_cogtools, described_by_torch

AGAIN = "copy, download or export it again"


def raw(header: str | bytes, data: bytes = b"") -> bytes:
    content = header if isinstance(header, bytes) else header.encode()
    return len(content).to_bytes(8, "little") + content + data


def of(**tensors: object) -> str:
    return json.dumps(tensors)


def f32(shape: list[int], *offsets: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


def test_tensors_of_every_dtype_and_the_metadata_are_read(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in ZOO_DTYPES}
    tensors |= {"0-d": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "key": "value"})
    loaded = load_file(tmp_path / "x.safetensors")

    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert checkpoint.metadata == {"format": "pt", "key": "value"}
        assert checkpoint.tensors.keys() == tensors.keys()
        assert dict(described_by_cogtools(checkpoint.tensors)) == dict(described_by_torch(loaded))
        assert {entry.storage.crc32 for entry in checkpoint.tensors.values()} == {None}


@pytest.mark.parametrize("padding", [0, 1, 7])
def test_a_header_may_end_in_spaces(padding: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw(of(a=f32([1], 0, 4)) + " " * padding, bytes(4)))

    with open_checkpoint(tmp_path / "x.safetensors") as checkpoint:
        assert list(checkpoint.tensors) == list(load_file(tmp_path / "x.safetensors")) == ["a"]


@pytest.mark.parametrize(
    ("content", "found", "expected"),
    [
        pytest.param(raw("{"), "a header that cannot be read: ", None, id="no-json"),
        pytest.param(raw(b'{"\xff": 1}'), "a header that cannot be read: ", None, id="not-utf-8"),
        pytest.param(raw('{"a":' + "[" * 100_000), "a header that cannot be read: ", None, id="deep"),
        pytest.param(
            raw(b'{"__metadata__": {"a": "\\ud800"}}'),
            "a header that cannot be read: 'utf-8' codec can't encode character '\\ud800' in position 24: "
            "surrogates not allowed",
            None,
            id="half-a-surrogate-pair",
        ),
        pytest.param(raw(of(a=[1])), "tensor 'a' is described as [1]", None, id="description"),
        pytest.param(
            raw(of(a={"dtype": "F32", "shape": [1]}), bytes(4)),
            "tensor 'a' is described as {'dtype': 'F32', 'shape': [1]}",
            None,
            id="no-offsets",
        ),
        pytest.param(
            raw(of(a=f32([-1], 0, 4)), bytes(4)),
            "tensor 'a' of shape [-1], which no tensor of F32 can have",
            None,
            id="negative-size",
        ),
        pytest.param(
            raw(of(a=f32([2], 0, 4)), bytes(4)),
            "tensor 'a' of shape [2] at [0, 4]",
            "8 bytes for that shape and F32",
            id="size",
        ),
        pytest.param(
            raw(of(a=f32([2**62, 8], 0, 4)), bytes(4)),
            f"tensor 'a' of shape [{2**62}, 8], which no tensor of F32 can have",
            None,
            id="huge",
        ),
        pytest.param(
            raw(of(a=f32([1], 0, 4), b=f32([1], 8, 12)), bytes(12)), "tensor 'b' at 8", "it to begin at 4", id="hole"
        ),
        pytest.param(
            raw(of(a=f32([1], 0, 4), b=f32([1], 2, 6)), bytes(6)), "tensor 'b' at 2", "it to begin at 4", id="overlap"
        ),
        pytest.param(
            raw(of(a=f32([1], 0, 4)), bytes(5)), "5 bytes of tensors", "4, as the header says", id="bytes-behind"
        ),
    ],
)
def test_a_file_that_the_library_refuses_is_refused_with_what_is_wrong(
    content: bytes, found: str, expected: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)

    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert (error.what, error.expected, str(error.hint)) == ("this safetensors file is damaged", expected, AGAIN)
    assert error.found is not None
    assert error.found == found or (found.endswith(": ") and error.found.startswith(found))


def test_a_key_that_stands_in_the_header_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw('{"a":' + json.dumps(f32([0], 0, 0)) + ',"a":' + json.dumps(f32([0], 0, 0)) + "}"))

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert caught.value.found == "a header that cannot be read: the key 'a' stands in it twice"


def test_a_dtype_that_is_not_known_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(of(a={"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}), bytes(4)))

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert (error.what, error.found, str(error.hint)) == (
        "this safetensors file has a dtype that this version of cogtools does not know",
        "tensor 'a' of dtype 'F31'",
        "a newer version may know it: pip install --upgrade cogtools",
    )


def test_a_header_longer_than_the_library_reads_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")

    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError, match="this is not a checkpoint"):
        open_checkpoint(path)


@pytest.mark.parametrize("metadata", [{"a": 1}, {"a": {}}, [], "a", 1])
def test_metadata_that_the_format_does_not_allow_is_refused_with_what_helps(metadata: object, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(of(__metadata__=metadata)))

    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert (caught.value.what, str(caught.value.hint)) == (
        "the metadata of this safetensors file has values that are not text, which the format does not allow",
        "save it again with every value of the metadata as text, such as the JSON of it",
    )


def test_metadata_may_be_null(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(of(__metadata__=None, a=f32([1], 0, 4)), bytes(4)))

    with open_checkpoint(path) as checkpoint:
        assert (list(checkpoint.tensors), checkpoint.metadata) == (list(load_file(path)), {})


DTYPE_CODES = (
    *("BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64"),
    *("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"),
)


def test_every_dtype_of_the_library_is_read_with_as_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(of(a={"dtype": "?", "shape": [0], "data_offsets": [0, 0]})))
    with pytest.raises(SafetensorError) as caught, safe_open(path, "pt"):
        pass
    known = set(re.findall(r"`(\w+)`", str(caught.value).partition("expected one of")[2]))
    assert known <= set(DTYPE_CODES)
    for code in known:
        by_library, by_cogtools = set(), set()
        for size in range(1, 65):
            path.write_bytes(raw(of(a={"dtype": code, "shape": [2, 4], "data_offsets": [0, size]}), bytes(size)))
            with suppress(SafetensorError), safe_open(path, "pt"):
                by_library.add(size)
            with suppress(CheckpointError), open_checkpoint(path) as checkpoint:
                (entry,) = checkpoint.tensors.values()
                assert (entry.shape, entry.size_bytes, entry.span_bytes) == ((2, 4), size, size)
                assert b"".join(tensor_chunks(entry)) == bytes(size)
                by_cogtools.add(size)
        assert (code, len(by_library), by_library) == (code, 1, by_cogtools)


@pytest.mark.parametrize(("code", "size", "count"), [("F4", 2, 3), ("F6_E2M3", 1, 1), ("F6_E3M2", 3, 3)])
def test_elements_that_end_within_a_byte_are_refused_as_the_library_does(
    code: str, size: int, count: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(of(a={"dtype": code, "shape": [count], "data_offsets": [0, size]}), bytes(size)))

    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError, match="this safetensors file is damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-32-le"])
def test_a_header_in_another_encoding_than_utf_8_is_refused_as_the_library_does(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(of(a=f32([1], 0, 4)).encode(encoding), bytes(4)))

    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError, match="this safetensors file is damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize("cut", ["in-header", "in-tensor"])
def test_a_file_that_is_cut_short_says_so(cut: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = raw(of(a=f32([4], 0, 16)), bytes(16))
    path.write_bytes(content[:20] if cut == "in-header" else content[:-1])

    with pytest.raises(CheckpointError, match="the file is cut short"):
        open_checkpoint(path)
