"""What an export of a whole model reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.carry_out import Crc32Status
    from cogtools.conversion.options import ModelFormat


@dataclass(frozen=True, slots=True)
class PartReport:
    """A part that was written.

    Attributes:
        name: "transformer", "vae", "text_encoder", "tokenizer" or "scheduler".
        folder: where it is.
        source: the file, or for a copy the folder, that it is made of; None if it is made of the model's table.
        files: the files of its folder.
        tensors: how many tensors it has.
        dtype: of its tensors, each once.
        size_bytes: of all of its files.
    """

    name: str
    folder: Path
    source: AnyPath | None
    files: tuple[str, ...]
    tensors: int
    dtype: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RowsReport:
    """Rows of a tensor of the checkpoint: from `first` up to `last`, which is not one of them."""

    key: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class TensorReport:
    """A tensor of the output, and what it is made of.

    Attributes:
        part: its part.
        key: its key in the output.
        dtype: its dtype.
        shape: its shape.
        sources: the rows that it consists of; none if it is made up.
    """

    part: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[RowsReport, ...]


@dataclass(frozen=True, slots=True)
class LeftOutReport:
    """A key of the checkpoint that is left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelPlanReport:
    """What an export would do, tensor by tensor."""

    tensors: tuple[TensorReport, ...]
    left_out: tuple[LeftOutReport, ...]


@dataclass(frozen=True, slots=True)
class ModelExportReport:
    """What an export of a model found and wrote.

    Attributes:
        checkpoint: the file that was read.
        output: the folder in which it was written, or would be.
        written: false for a dry run.
        format: "diffusers" or "sat".
        model: its name; None for a text encoder alone.
        known_by: what told which model it is.
        parts: what was written.
        missing: the parts of a pipeline that were not.
        pipeline: whether it is a whole pipeline, with its index.
        load: the Python code that loads it, or SAT's option.
        lora_tensors: the tensors of a LoRA that were left out.
        size_bytes: of all files.
        crc32: whether the CRC-32s that the checkpoint records were checked.
        notices: what the user should know.
        plan: what becomes of every tensor, for a dry run.
    """

    checkpoint: AnyPath
    output: Path
    written: bool
    format: ModelFormat
    model: str | None
    known_by: str | None
    parts: tuple[PartReport, ...]
    missing: tuple[str, ...]
    pipeline: bool
    load: str
    lora_tensors: int
    size_bytes: int
    crc32: Crc32Status
    notices: tuple[str, ...]
    plan: ModelPlanReport | None
