"""A written LoRA, opened: which tensors it has, what it states of its scale, and what the exporter recorded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cogtools.checkpoint import safetensors
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.storage import is_file, is_folder
from cogtools.errors import CheckpointError
from cogtools.layouts import diffusers, peft
from cogtools.layouts.naming import DIFFUSERS, PEFT, Naming, near_miss
from cogtools.record import ExportRecord, read_record
from cogtools.stated import Stated, read_stated

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.storage import TensorEntry
    from cogtools.layouts.cogvideox import LoraKey


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor of the file: its key there, and what the header says of it."""

    key: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class WrittenLora:
    """A LoRA file, held open.

    Attributes:
        file: the index of the file.
        naming: how its tensors should be named.
        tensors: those whose meaning is known, also where the name is not quite right.
        misnamed: what is wrong with the name, by key, for those of them.
        unknown: the keys that mean nothing.
        stated: what the file states of its scale and its modules.
        record: what the exporter says of how the file was made.
    """

    file: Checkpoint
    naming: Naming
    tensors: Mapping[LoraKey, WrittenTensor]
    misnamed: Mapping[str, str]
    unknown: tuple[str, ...]
    stated: Stated
    record: ExportRecord

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it has tensors of."""
        return tuple(sorted({name.layer for name in self.tensors}))

    @property
    def modules(self) -> dict[str, int]:
        """The modules that it has tensors of: their paths in the transformer, and their layers."""
        return {diffusers.module_path(name): name.layer for name in sorted(self.tensors)}

    def most_common_hidden(self) -> int | None:
        """The hidden size that most tensors have: columns of lora_A, rows of lora_B."""
        sizes = Counter(
            tensor.entry.shape[1] if name.factor == "A" else tensor.entry.shape[0]
            for name, tensor in self.tensors.items()
            if len(tensor.entry.shape) == 2
        )
        return sizes.most_common(1)[0][0] if sizes else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def open_written(out: Path) -> WrittenLora:
    """Open a LoRA file, or the one in a folder. Close it when done, or use it in a `with` statement.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    path = find_lora_file(out)
    file = open_checkpoint(path)
    try:
        return _read(file)
    except BaseException:
        file.close()
        raise


def find_lora_file(out: Path) -> Path:
    """The LoRA file that is meant: a file itself, or in a folder the one with a usual name, or the only one.

    Raises:
        CheckpointError: if the folder has none, or several and none with a usual name.
    """
    if not is_folder(out):
        return out
    for name in (DIFFUSERS.file_name, PEFT.file_name):
        if is_file(out / name):
            return out / name
    found = sorted(path.name for path in out.glob("*.safetensors"))
    if len(found) == 1:
        return out / found[0]
    inside = sorted(path.parent.name for path in out.glob(f"*/{DIFFUSERS.file_name}"))
    if inside and not found:
        raise CheckpointError(
            "this is a folder of LoRAs: they are verified one by one",
            file=out,
            found=", ".join(inside[:5]) + (" …" if len(inside) > 5 else ""),
            hint=f"cogtools verify {out / inside[0]}",
        )
    raise CheckpointError(
        "there are several safetensors files in this folder" if found else "there is no LoRA file in this folder",
        file=out,
        found=", ".join(found[:5]) or "no file that ends in .safetensors",
        expected=f"{DIFFUSERS.file_name} or {PEFT.file_name}",
        hint="name the file itself" if found else "cogtools export-lora CHECKPOINT OUT_DIR writes one",
    )


def _read(file: Checkpoint) -> WrittenLora:
    if file.format != safetensors.FORMAT:
        raise CheckpointError(
            "this is a checkpoint, not an exported LoRA",
            file=file.path,
            found=file.format,
            expected="a safetensors file",
            hint=f"cogtools export-lora {file.path} OUT_DIR, then cogtools verify OUT_DIR",
        )
    _refuse_what_upstream_refuses(file.path)
    is_peft = file.path.name == peft.FILE_NAME or is_file(file.path.parent / peft.CONFIG_NAME)
    naming = PEFT if is_peft and file.path.name != diffusers.FILE_NAME else DIFFUSERS
    tensors = {name: WrittenTensor(key, entry) for key, entry in file.tensors.items() if (name := naming.parse(key))}
    misnamed: dict[str, str] = {}
    unknown: list[str] = []
    for key, entry in file.tensors.items():
        if naming.parse(key) is not None:
            continue
        meant = near_miss(key)
        if meant is None or meant[0] in tensors:
            unknown.append(key)
        else:
            name, misnamed[key] = meant
            tensors[name] = WrittenTensor(key, entry)
    stated = read_stated(file, naming)
    return WrittenLora(file, naming, tensors, misnamed, tuple(unknown), stated, read_record(file.metadata))


def _refuse_what_upstream_refuses(path: Path) -> None:
    """Open the file with the safetensors library too: whoever loads the LoRA does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "the safetensors library does not read this file",
            file=path,
            found=str(error),
            hint="copy, download or export it again",
        ) from error
