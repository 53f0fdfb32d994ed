"""Damaged checkpoints: an error, or the same export as from the undamaged one; where nothing is recorded to check
it by, at least no other exception."""

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cogtools
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError, CogtoolsError
from tests.support.factories import SAVERS, TOY_2B, sat_state_dict

FLIPS = 1000
"""How many single bits are flipped of each file, drawn at random with a seed."""

CHECKED = ("zip", "deflated", "big-endian")
UNCHECKED = ("without-crc32", "legacy", "safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small LoRA in every format."""
    folder = tmp_path_factory.mktemp("good")
    state = sat_state_dict(replace(TOY_2B, layers=1, hidden=8), 2, torch.float16, base="none")
    for saver in (*CHECKED, *UNCHECKED):
        path = folder / saver
        if saver == "safetensors":
            save_file({key: tensor.clone() for key, tensor in state.items()}, path)
        else:
            SAVERS[saver]({"module": state, "iteration": 1000}, path)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Export:
    """Exports a checkpoint of given bytes."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "x.pt"
        self.target = folder / "out" / "lora.safetensors"

    def __call__(self, content: bytes) -> tuple[bytes, str] | None:
        """The output and what the report says of CRC-32s; None if there was an error of ours."""
        self.source.write_bytes(content)
        try:
            report = cogtools.export_lora(self.source, self.target, overwrite=True, allow_partial=True)
        except CogtoolsError:
            return None
        return self.target.read_bytes(), report.crc32


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of exports, none of which is kept
    return Export(tmp_path)


def flips(content: bytes, count: int, seed: int = 0) -> Iterator[tuple[int, bytes]]:
    """The content with one bit flipped, and which."""
    for bit in sorted(random.Random(seed).sample(range(8 * len(content)), count)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)


@pytest.mark.parametrize("saver", [*CHECKED, *UNCHECKED])
def test_the_undamaged_file_is_exported(saver: str, files: dict[str, bytes], export: Export) -> None:
    exported = export(files[saver])

    assert exported is not None
    assert exported[1] == ("checked" if saver in CHECKED else "not recorded")
    assert len(files[saver]) < 20_000


@pytest.mark.parametrize("saver", [*CHECKED, *UNCHECKED])
def test_a_file_that_is_cut_at_any_byte_does_not_open(saver: str, files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(files[saver])
    opened = []
    for size in reversed(range(len(files[saver]))):
        os.truncate(path, size)
        with contextlib.suppress(CheckpointError), open_checkpoint(path):
            opened.append(size)

    assert opened == []


@pytest.mark.slow
@pytest.mark.parametrize("saver", CHECKED)
def test_a_flipped_bit_is_an_error_or_makes_no_difference(saver: str, files: dict[str, bytes], export: Export) -> None:
    good = export(files[saver])
    outcomes = {bit: export(content) for bit, content in flips(files[saver], FLIPS)}

    assert [bit for bit, outcome in outcomes.items() if outcome not in (None, good)] == []
    assert 0 < sum(outcome is None for outcome in outcomes.values()) < FLIPS


@pytest.mark.slow
@pytest.mark.parametrize("saver", UNCHECKED)
def test_a_flipped_bit_where_nothing_is_recorded_is_an_error_or_said_to_be_unchecked(
    saver: str, files: dict[str, bytes], export: Export
) -> None:
    outcomes = [export(content) for _, content in flips(files[saver], FLIPS)]

    assert {outcome[1] for outcome in outcomes if outcome is not None} == {"not recorded"}
    assert 0 < outcomes.count(None) < FLIPS


def test_no_flipped_bit_hides_the_byte_order(files: dict[str, bytes], export: Export) -> None:
    """The zip directory, which names the entry that tells it, has no CRC-32 of its own."""
    content = files["big-endian"]
    good = export(content)
    name = content.rindex(b"/byteorder")
    start, end = content.rindex(b"PK\1\2", 0, name), content.index(b"PK", name)
    different = []
    for bit in range(8 * start, 8 * end):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        if export(bytes(flipped)) not in (None, good):
            different.append(bit)

    assert different == []
