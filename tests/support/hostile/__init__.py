"""Hostile input: pickles, checkpoints and folders that try to run code, to lie, or to exhaust their reader.

Everything is put together here from opcodes and bytes; no gadget is imported. Every payload is harmless: run
by mistake, the worst that one does is to make a file named `pwned` (`MARKER`) in the current folder.

`pickles()` yields what can stand in the place of a checkpoint's pickle: `torch_zip(row.pickle)` makes a `.pt`
file of it, with the storages that its tensors need. `files()` yields whole files and folders. The
constructions that picklescan, fickling and modelscan use in their tests are among them, built anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.hostile.assembler import (
    CANARY,
    CANARY_SOURCE,
    FLOAT_STORAGE,
    KEY,
    MARKER,
    SHELL,
    STORAGES,
    VOCABULARY,
    HostileFile,
    HostilePickle,
    checkpoint,
    data,
    persistent,
    stream,
    tensor,
    tensor_v3,
    text_global,
)
from tests.support.hostile.bomb_rows import bombs
from tests.support.hostile.file_rows import (
    EXPORTED,
    legacy,
    legacy_checkpoint,
    legacy_file,
    safetensors,
    safetensors_files,
    strangers,
)
from tests.support.hostile.folder_rows import SHARDS, lora_config, run_folders, shard_indexes
from tests.support.hostile.gadget_rows import gadgets
from tests.support.hostile.opcode_rows import odd_opcodes, opcodes
from tests.support.hostile.pickle_rows import DECEPTIVE, keys, malformed, names, tensors
from tests.support.hostile.zip_rows import Member, members, torch_zip, zip_file, zips

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "CANARY",
    "CANARY_SOURCE",
    "DECEPTIVE",
    "EXPORTED",
    "FLOAT_STORAGE",
    "KEY",
    "MARKER",
    "SHARDS",
    "SHELL",
    "STORAGES",
    "VOCABULARY",
    "HostileFile",
    "HostilePickle",
    "Member",
    "bombs",
    "checkpoint",
    "data",
    "files",
    "legacy",
    "legacy_checkpoint",
    "legacy_file",
    "lora_config",
    "members",
    "opcodes",
    "persistent",
    "pickles",
    "run_folders",
    "safetensors",
    "safetensors_files",
    "shard_indexes",
    "strangers",
    "stream",
    "tensor",
    "tensor_v3",
    "text_global",
    "torch_zip",
    "zip_file",
    "zips",
]


def pickles() -> Iterator[HostilePickle]:
    """The whole corpus of pickles."""
    for rows in (gadgets, opcodes, odd_opcodes, names, keys, malformed, tensors, bombs):
        yield from rows()


def files() -> Iterator[HostileFile]:
    """The whole corpus of files and folders."""
    for rows in (zips, legacy, strangers, safetensors_files, shard_indexes, run_folders):
        yield from rows()
