"""Safetensors headers longer than 8 MB: read without the metadata that makes them long, in bounded memory."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from cogtools.checkpoint.limits import MAX_HEADER_BYTES
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
from tests.support.command_line import surroundings

TAGS = json.dumps({f"tag \u4e2d {number}": number for number in range(400_000)})
ESCAPED = json.dumps(TAGS, ensure_ascii=False)  # JSON in JSON: many escapes
TENSOR = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
EMPTY = '"b": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}'
SHORT = '"format": "pt", "\u00e9\\u00e9\U0001f600": "\u4e2d\\u4e2d\\ud83d\\ude00"'


def write(path: Path, header: str | bytes) -> Path:
    content = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(4))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(f'{{"__metadata__": {{{SHORT}, "tags": {ESCAPED}}}, {TENSOR}, {EMPTY}}}', id="first"),
        pytest.param(f'{{ "__metadata__" :{{ "tags":{ESCAPED} ,\n{SHORT} }}\t,{TENSOR} }}   ', id="spaces"),
        pytest.param(f'{{{TENSOR}, {EMPTY}, "__metadata__": {{{SHORT}, "tags": {ESCAPED}}}}}', id="last"),
    ],
)
def test_metadata_that_is_too_long_to_be_kept_is_left_out_and_named(header: str, path: Path) -> None:
    write(path, header)
    with safe_open(path, "pt") as library:
        metadata, keys = library.metadata(), list(library.keys())
    assert len(metadata["tags"]) > MAX_HEADER_BYTES

    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "safetensors, without its metadata 'tags'"
        assert checkpoint.left_out == {"tags": len(ESCAPED.encode()) - 2}
        assert checkpoint.metadata == {key: value for key, value in metadata.items() if key != "tags"}
        assert sorted(checkpoint.tensors) == sorted(keys)


def test_a_long_header_of_short_metadata_is_kept_as_far_as_it_fits(path: Path) -> None:
    metadata = {str(number): "x" * 1000 for number in range(10_000)}
    write(path, f'{{"__metadata__": {json.dumps(metadata)}, {TENSOR}}}')

    with open_checkpoint(path) as checkpoint:
        kept = len(checkpoint.metadata)
        assert list(checkpoint.metadata.items()) == list(metadata.items())[:kept]
        assert 8_000 < kept < 9_000
        assert checkpoint.left_out == {str(number): 1000 for number in range(kept, kept + 100)}


@pytest.mark.parametrize(
    "metadata", ["", '"__metadata__": null, ', '"__metadata__": {}, ', f'"__metadata__": {{{SHORT}}}, ']
)
def test_a_header_that_is_long_without_its_metadata_is_refused_with_what_helps(metadata: str, path: Path) -> None:
    header = f"{{{metadata}{TENSOR}{' ' * MAX_HEADER_BYTES}}}"
    write(path, header)
    with safe_open(path, "pt"):
        pass

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    error = caught.value
    beside = len(header.encode()) - len(metadata.encode()) + len('"__metadata__": {}, ' if metadata else "")
    assert (error.what, error.found, error.expected, str(error.hint)) == (
        "the header of this safetensors file is longer than is read",
        f"{beside:,} bytes beside its __metadata__",
        "at most 8,388,608: the largest real ones have 0.2 MB",
        "load it with the safetensors library, and save it again",
    )


DAMAGED: dict[str, str | bytes] = {
    "number": f'{{"__metadata__": {{"tags": {ESCAPED}, "a": 1}}, {TENSOR}}}',
    "half-a-pair": f'{{"__metadata__": {{"tags": {ESCAPED[:-1]}\\ud800"}}, {TENSOR}}}',
    "no-quote": f'{{"__metadata__": {{"tags": {ESCAPED[:-1]}, {TENSOR}}}',
    "no-comma": f'{{"__metadata__": {{"tags": {ESCAPED}}} {TENSOR}}}',
    "comma": f'{{"__metadata__": {{"tags": {ESCAPED},}}, {TENSOR}}}',
    "text": f'{{"__metadata__": {ESCAPED}, {TENSOR}}}',
    "line-end": f'{{"__metadata__": {{"tags": {ESCAPED[:-1]}\n"}}, {TENSOR}}}',
    "no-end": f'{{"__metadata__": {{"tags": {ESCAPED}}}, {TENSOR}',
    "not-utf-8": f'{{"__metadata__": {{"tags": {ESCAPED}}}, {TENSOR}}}'.encode().replace(b"tag ", b"tag\xff", 1),
    "deep": f'{{"a": {"[" * 10_000}, "__metadata__": {{"tags": {ESCAPED}}}}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_long_header_that_the_library_refuses_is_refused(damage: str, path: Path) -> None:
    write(path, DAMAGED[damage])

    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(CheckpointError, match=r"^this safetensors file is damaged"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "header",
    [
        f'{{"__metadata__": {{"tags": {ESCAPED}}}, "__metadata__": {{}}, {TENSOR}}}',
        f'{{{TENSOR}, {TENSOR}, "__metadata__": {{"tags": {ESCAPED}}}}}',
    ],
    ids=["metadata", "tensor"],
)
def test_what_stands_twice_in_a_long_header_is_refused(header: str, path: Path) -> None:
    write(path, header)

    with pytest.raises(CheckpointError, match="stands in it twice"):
        open_checkpoint(path)


CHILD = """
import resource, sys
from collections.abc import Callable
from pathlib import Path
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_checkpoint(sys.argv[1]).close()
except CheckpointError:
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
MEGABYTE = 1_000_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory in kilobytes is Linux's")
@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param(lambda: '"tags": "' + "x" * 99 * MEGABYTE + '"', id="one-value"),
        pytest.param(lambda: '"tags": "\U0001f600' + "x" * 99 * MEGABYTE + '"', id="one-wide-character"),
        pytest.param(lambda: ",".join(f'"{number:x}":""' for number in range(MEGABYTE)), id="short-ones"),
    ],
)
def test_the_longest_header_is_read_in_bounded_memory(metadata: Callable[[], str], path: Path) -> None:
    write(path, f'{{"__metadata__": {{{metadata()}}}, {TENSOR}}}')

    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True, env=surroundings()
    )
    assert int(done.stdout) < 400
