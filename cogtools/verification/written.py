"""A written LoRA, opened: the file that a path stands for, held to what its readers demand of it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.folder import find_save_folder
from cogtools.checkpoint.formats import safetensors
from cogtools.checkpoint.names import MAIN_PART
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.places import is_file, is_folder, list_folder
from cogtools.conversion.lora import read_lora
from cogtools.errors import CheckpointError, Hint, command
from cogtools.layouts import diffusers, peft, sat
from cogtools.layouts.recognition import LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.lora import LoraLayout


@contextmanager
def open_written(out: AnyPath, asked: LoraLayout | None = None) -> Iterator[Lora]:
    """Open a LoRA file, or the one in a folder.

    Args:
        out: the file or folder.
        asked: the layout of the program that it is held against; None leaves that to the file.

    Raises:
        CheckpointError: if there is none, or it cannot be read.
    """
    with open_checkpoint(find_lora_file(out)) as file:
        lora = read_lora(file)
        if file.format == safetensors.FORMAT:
            _refuse_what_upstream_refuses(file.files[0])
        elif lora.layout is None or lora.layout.container != "torch" or (asked is None and not lora.record.version):
            raise _not_safetensors(lora)
        lora.asked = asked
        yield lora


def find_lora_file(out: AnyPath) -> AnyPath:
    """The LoRA file that a path stands for: itself, or in a folder the one with a usual name, or the only one.

    Raises:
        CheckpointError: if the folder has none, or several and none with a usual name.
    """
    if not is_folder(out):
        return out
    for layout in LAYOUTS:
        if layout.path is not None and is_file(out / layout.path):
            return out / layout.path
    entries = list_folder(out)
    found = [entry.path.name for entry in entries if entry.path.name.endswith(".safetensors")]
    if len(found) == 1:
        return out / found[0]
    folders = [entry.path for entry in entries if entry.is_folder]
    inside = [folder.name for folder in folders if _holds_safetensors(folder) or is_folder(folder / MAIN_PART)]
    if inside and not found:
        raise CheckpointError(
            "there is no output in this folder, but in folders in it: they are verified one by one",
            file=out,
            found=", ".join(inside[:5]) + (" …" if len(inside) > 5 else ""),
            hint=command("verify", out / inside[0]),
        )
    raise CheckpointError(
        "there are several safetensors files in this folder" if found else "there is no LoRA file in this folder",
        file=out,
        found=", ".join(found[:5]) or "no file that ends in .safetensors",
        expected=f"{diffusers.FILE_NAME} or {peft.FILE_NAME}",
        hint="name the file itself" if found else _what_else(out),
    )


def _holds_safetensors(folder: AnyPath) -> bool:
    try:
        return any(entry.path.name.endswith(".safetensors") for entry in list_folder(folder))
    except CheckpointError:  # it may not be looked into
        return False


def _what_else(folder: AnyPath) -> Hint:
    """What to do with a folder without a LoRA file: it may be a training that has not been exported yet."""
    if find_save_folder(folder) is not None:
        return command("export-lora", folder, "OUT_DIR", advice="export it, then verify what was written")
    return Hint("give the folder or the file that export-lora wrote, or another LoRA")


def _not_safetensors(lora: Lora) -> CheckpointError:
    """The error for a file of another format: what it holds, and what to do with that."""
    file = lora.checkpoint
    what, expected = "this is a checkpoint, not an exported LoRA", "a safetensors file"
    hint = command("inspect", file.path, advice="to see what it holds")
    if lora.layout is sat.LAYOUT:
        hint = command("export-lora", file.path, "OUT_DIR", advice="export it, then verify what was written")
    elif lora.names is not None:
        what = f"this is a LoRA with {next(iter(lora.names.readings.values())).oddity} that torch.save wrote"
        expected = "a safetensors file: to load this one, diffusers would unpickle it, which can run code"
        hint = command("export-lora", file.path, "OUT_DIR", advice="write it as safetensors")
    return CheckpointError(what, file=file.path, found=file.format, expected=expected, hint=hint)


def _refuse_what_upstream_refuses(file: SourceFile) -> None:
    """Open the file with the safetensors library too: whoever loads the LoRA does."""
    from safetensors import SafetensorError, safe_open

    try:
        with _on_this_machine(file) as path, safe_open(path, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            "the safetensors library does not read this file",
            file=file.path,
            found=str(error),
            hint="copy, download or export it again",
        ) from error


@contextmanager
def _on_this_machine(file: SourceFile) -> Iterator[AnyPath]:
    """A file of this machine with the same header; what follows it is a hole where the file lies elsewhere."""
    if file.fd >= 0:
        yield file.path
        return
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        copy.write(file.read(0, safetensors.read_header(file).data_offset))
        copy.truncate(file.size_bytes)
        copy.flush()
        yield Path(copy.name)
