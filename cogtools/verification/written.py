"""A written LoRA, opened: which tensors it has, what it states of its scale, and what the exporter recorded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cogtools.checkpoint.files import is_file, is_folder
from cogtools.checkpoint.formats import safetensors
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.adapter_config import Stated, read_stated
from cogtools.conversion.record import ExportRecord, read_record
from cogtools.errors import CheckpointError, Hint, Problem, command
from cogtools.layouts import diffusers, peft, sat
from cogtools.layouts.family import hidden_of
from cogtools.layouts.folded import folded_names
from cogtools.layouts.naming import DIFFUSERS, PEFT, Naming, NearMiss, near_miss

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.errors import ProblemKind
    from cogtools.layouts.family import LoraKey


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
        misnamed: what its name is instead, by key, for those of them.
        unknown: the keys that mean nothing.
        stated: what the file states of its scale and its modules.
        record: what the exporter says of how the file was made.
    """

    file: Checkpoint
    naming: Naming
    tensors: Mapping[LoraKey, WrittenTensor]
    misnamed: Mapping[str, NearMiss]
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

    def key(self, name: LoraKey) -> str:
        """The key of a tensor: the one that it has, or should have."""
        return self.tensors[name].key if name in self.tensors else self.naming.key(name)

    def problems(
        self, kind: ProblemKind, names: Iterable[LoraKey], found: str | None = None, expected: str | None = None
    ) -> list[Problem]:
        """A problem that several tensors have alike, folded."""
        return [
            Problem(kind, text, found, expected, tuple(map(self.key, alike)))
            for text, alike in folded_names(names).items()
        ]

    def most_common_hidden(self) -> int | None:
        """The hidden size that most tensors have: columns of lora_A, rows of lora_B."""
        sizes = Counter(
            hidden_of(name.factor, tensor.entry.shape)
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
            hint=command("verify", out / inside[0]),
        )
    raise CheckpointError(
        "there are several safetensors files in this folder" if found else "there is no LoRA file in this folder",
        file=out,
        found=", ".join(found[:5]) or "no file that ends in .safetensors",
        expected=f"{DIFFUSERS.file_name} or {PEFT.file_name}",
        hint=Hint("name the file itself")
        if found
        else command("export-lora", "CHECKPOINT", "OUT_DIR", advice="to write one"),
    )


def _read(file: Checkpoint) -> WrittenLora:
    if file.format != safetensors.FORMAT:
        raise _no_safetensors(file)
    _refuse_what_upstream_refuses(file.path)
    naming = _naming(file)
    tensors = {name: WrittenTensor(key, entry) for key, entry in file.tensors.items() if (name := naming.parse(key))}
    misnamed: dict[str, NearMiss] = {}
    unknown: list[str] = []
    for key, entry in file.tensors.items():
        if naming.parse(key) is not None:
            continue
        meant = near_miss(key)
        if meant is None or meant.name in tensors:
            unknown.append(key)
        else:
            misnamed[key] = meant
            tensors[meant.name] = WrittenTensor(key, entry)
    stated = read_stated(file, naming)
    return WrittenLora(file, naming, tensors, misnamed, tuple(unknown), stated, read_record(file.metadata))


def _naming(file: Checkpoint) -> Naming:
    """Whose names the tensors should have: told by the file's name, else by what lies beside it and its own keys."""
    for naming in (DIFFUSERS, PEFT):
        if file.path.name == naming.file_name:
            return naming
    beside = is_file(file.path.parent / peft.CONFIG_NAME)
    return PEFT if beside and not any(map(DIFFUSERS.parse, file.tensors)) else DIFFUSERS


def _no_safetensors(file: Checkpoint) -> CheckpointError:
    """The error for a file of another format: what it holds, and what to do with that."""
    what, expected = "this is a checkpoint, not an exported LoRA", "a safetensors file"
    found = [miss for key in file.tensors if (miss := near_miss(key)) is not None]
    hint = command("inspect", file.path, advice="to see what it holds")
    if any(sat.parse_lora_key(key) for key in file.tensors):
        hint = command("export-lora", file.path, "OUT_DIR", advice="export it, then verify what was written")
    elif found:
        what = f"this is a LoRA with {found[0].what} that torch.save wrote"
        expected = "a safetensors file: to load this one, diffusers would unpickle it, which can run code"
        hint = Hint(
            "save it as safetensors: safetensors.torch.save_file(torch.load("
            f"{str(file.path)!r}, weights_only=True), {str(file.path.with_name(diffusers.FILE_NAME))!r})"
        )
    return CheckpointError(what, file=file.path, found=file.format, expected=expected, hint=hint)


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
