"""Where an export writes: what its files are called, and the name that a checkpoint's LoRA gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast, get_args

from cogtools.checkpoint.names import MAIN_PART, PIPELINE_INDEX, SHARD_INDEX_SUFFIXES, WEIGHTS_FILES
from cogtools.checkpoint.run import iteration_of
from cogtools.conversion.options import Format
from cogtools.errors import OptionError

if TYPE_CHECKING:
    from pathlib import Path

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.layouts.lora import LoraLayout

SUFFIX = ".safetensors"

_NAMED_AFTER_THEIR_FOLDER = ("mp_rank_", "z3_rank_", *WEIGHTS_FILES, PIPELINE_INDEX)


class Target(NamedTuple):
    """The place of an output.

    Attributes:
        folder: the folder that its program is given, where it is given one.
        file: the file of its tensors.
        is_folder: whether all of the folder is the output, and not that file alone.
    """

    folder: AnyPath
    file: AnyPath
    is_folder: bool


def local_type(path: AnyPath) -> Path:
    """The path of an output, as reports have it.

    Its type is that of outputs on this machine, which nearly all are, so that who exports to this machine need not
    tell them apart; an output in a store has a `RemotePath`.
    """
    return cast("Path", path)


def target_of(out: AnyPath, layout: LoraLayout, checkpoint: AnyPath) -> Target:
    """Where the LoRA of a checkpoint is written.

    Args:
        out: a folder or, for a layout that is one file, that file's name ending in .safetensors.
        layout: the layout.
        checkpoint: the file that it is made of: some programs' files are named after it.

    Raises:
        OptionError: if `out` is a file, and the layout is a folder of several.
    """
    if layout.is_folder and out.suffix == SUFFIX:
        raise OptionError(
            f"--format {layout.name} is a folder of several files, and the output is named as one file",
            found=str(out),
            expected="the name of a folder",
            hint=f"leave {SUFFIX} out",
        )
    if out.suffix == SUFFIX:
        return Target(out.parent, out, is_folder=False)
    return target_in(out, layout, checkpoint)


def target_in(out: AnyPath, layout: LoraLayout, checkpoint: AnyPath) -> Target:
    """The same in a folder, whatever that is called."""
    name = layout.path or f"{file_stem(checkpoint)}_{layout.name}{SUFFIX}"
    return Target(out, out / name, layout.is_folder)


def file_stem(checkpoint: AnyPath) -> str:
    """What a file is called after a checkpoint, without dots: ComfyUI's nodes take what is before the first one."""
    name = run_name(checkpoint)
    for known in get_args(Format):
        name = name.removesuffix(f"_{known}")
    return name.replace(".", "_") or "lora"


def run_name(checkpoint: AnyPath) -> str:
    """The name of a checkpoint's LoRA: run and iteration, or what the file or its folder is called.

    By names alone: to look which iterations there are would take the longer, the more there are.
    """
    iteration = iteration_of(checkpoint.absolute().parent)
    if iteration is not None:
        return f"{_folder_name(iteration.folder.parent)}-{iteration}"
    if checkpoint.name.startswith(_NAMED_AFTER_THEIR_FOLDER) or checkpoint.name.endswith(SHARD_INDEX_SUFFIXES):
        folder = checkpoint.parent
        return _folder_name(folder.parent if folder.name == MAIN_PART else folder)
    return checkpoint.stem


def _folder_name(folder: AnyPath) -> str:
    name = folder.absolute().name
    return folder.resolve().name if name == ".." else name
