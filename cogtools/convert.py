"""Exporting a LoRA: carrying out the plan by copying byte ranges from the checkpoint into a safetensors file."""

from __future__ import annotations

import json
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypedDict, get_args

from cogtools import __version__
from cogtools.checkpoint.dtypes import DTYPES
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.storage import FileRange
from cogtools.checkpoint.torch_pickle import MAX_SHOWN_NAME
from cogtools.errors import SHOWN_PROBLEMS, CheckpointError, OptionError
from cogtools.layouts import diffusers
from cogtools.planning import LoraPlan, plan_lora_export
from cogtools.writer import AtomicFile, TensorSpec, refuse_without_room, safetensors_header

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.storage import Storage

Scale = Literal["metadata", "fold", "none"]
Cast = Literal["keep", "fp32", "fp16", "bf16"]

CASTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

CRC32_CHUNK_BYTES = 1 << 20


class ExportOptions(TypedDict, total=False):
    """Those options of `export_lora` that shape the output."""

    alpha: float | None
    scale: Scale
    dtype: Cast
    allow_partial: bool
    sha256: bool


RECORD_KEY = "cogtools"
"""The header entry in which the file says how it was made."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export found and wrote.

    Attributes:
        checkpoint: the file that was read.
        output: the file that was written, or would be.
        written: false for a dry run.
        model: name of the model, or of what can be said of it.
        layers: the adapted layers.
        rank: the rank of every module.
        alpha: the training's alpha.
        alpha_source: where alpha comes from: "--alpha", "training_config.yaml" or "default".
        scaling: alpha / rank.
        scale: how the output carries it: "metadata", "fold" or "none".
        dtype: of the output's tensors.
        source_dtype: of the checkpoint's.
        tensors: how many tensors the output has.
        size_bytes: the size of the output file.
        crc32: "checked", or "not recorded" if the checkpoint has no CRC-32s to check.
        largest_relative_error: of any tensor, where folding or casting changed the values; else None.
        sha256: of the output file, if asked for.
        notices: what the user should know.
    """

    checkpoint: Path
    output: Path
    written: bool
    model: str
    layers: tuple[int, ...]
    rank: int
    alpha: float
    alpha_source: str
    scaling: float
    scale: Scale
    dtype: str
    source_dtype: str
    tensors: int
    size_bytes: int
    crc32: Literal["checked", "not recorded"]
    largest_relative_error: float | None
    sha256: str | None
    notices: tuple[str, ...]


def export_lora(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    scale: Scale = "metadata",
    dtype: Cast = "keep",
    iteration: int | None = None,
    ema: bool = False,
    allow_partial: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    sha256: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Export the LoRA in a SAT checkpoint as a file that diffusers loads at the right strength.

    Load it at weight 1.0: the file carries the scale.

    Args:
        checkpoint: a file of the trainer, the folder of an iteration, or the save folder.
        out: a folder, in which `pytorch_lora_weights.safetensors` is written, or a file name ending in .safetensors.
        alpha: the training's alpha; None takes it from `training_config.yaml` beside the checkpoint, and 1, SAT's
            default, where that does not say.
        scale: "metadata" states alpha / rank in the header, where diffusers reads it from 0.34 on; "fold" multiplies
            it into the weights, for everything else; "none" leaves it out.
        dtype: "keep" copies the bytes; the others cast.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        allow_partial: accept a LoRA that adapts some of the layers only.
        overwrite: replace a file that is there already.
        dry_run: find out everything, write nothing.
        sha256: compute the SHA-256 of the output.
        progress: called with the bytes written so far and the bytes in all.

    Raises:
        CogtoolsError: if it cannot be done. The target is then as it was before.
    """
    target = output_path(Path(out))
    output = AtomicFile(target, overwrite=overwrite)
    output.refuse_existing()
    with open_checkpoint(checkpoint, iteration=iteration, ema=ema) as opened:
        plan = plan_lora_export(opened, alpha=alpha, allow_partial=allow_partial)
        target_dtype = target_dtype_of(plan, dtype)
        header = output_header(plan, opened, scale, target_dtype)
        rounding = Rounding()
        size_bytes = len(header) + sum(tensor.source.entry.numel for tensor in plan.tensors) * target_dtype.itemsize
        if not dry_run:
            refuse_without_room(target.parent, size_bytes)
            payload = _payload(plan, scale, target_dtype, rounding)
            _write(output, header, payload, _Crc32Check(plan), progress, size_bytes)
    return ExportReport(
        checkpoint=opened.path,
        output=target,
        written=not dry_run,
        model=plan.transformer.name,
        layers=plan.layers,
        rank=plan.rank,
        alpha=plan.alpha.value,
        alpha_source=plan.alpha.source,
        scaling=plan.scaling,
        scale=scale,
        dtype=target_dtype.name,
        source_dtype=plan.dtype.name,
        tensors=len(plan.tensors),
        size_bytes=size_bytes,
        crc32="checked" if _has_crc32(plan) else "not recorded",
        largest_relative_error=rounding.largest_relative_error,
        sha256=_sha256(target) if sha256 and not dry_run else None,
        notices=(
            *_danger_notices(opened),
            *_choice_notices(opened),
            *plan.notices,
            *_scale_notices(plan, scale),
            *_crc32_notices(plan),
        ),
    )


def _choice_notices(checkpoint: Checkpoint) -> list[str]:
    """Say which of two sets of weights was taken: the trainer saves them side by side."""
    run = checkpoint.run
    if run is None or run.twin is None:
        return []
    kind, hint = ("EMA weights", "without --ema") if run.chosen.ema else ("plain weights", "with --ema")
    return [f"Took the {kind} of iteration {run.chosen.number}; {run.twin} is there too ({hint})."]


def _danger_notices(checkpoint: Checkpoint) -> list[str]:
    """Warn of a checkpoint that would run code if it were loaded: whoever exports from it may try that next."""
    if not checkpoint.foreign:
        return []
    from cogtools.inspection.globals import danger_of

    names = sorted(str(name) for name in checkpoint.foreign if danger_of(*name) == "dangerous")
    shown = ", ".join(name[:MAX_SHOWN_NAME] for name in names[:SHOWN_PROBLEMS])
    return [f"The checkpoint names what can run code: {shown}. Nothing was run; do not torch.load it."] if names else []


def _scale_notices(plan: LoraPlan, scale: Scale) -> list[str]:
    if scale == "metadata":
        return [
            "The scale is stated in the file's header, which diffusers reads from 0.34 on. "
            "For ComfyUI and everything else, export with --scale fold."
        ]
    if scale == "none":
        return [f"The file does not carry its scale: whoever loads it must use weight {plan.scaling:.10g}."]
    return []


def _crc32_notices(plan: LoraPlan) -> list[str]:
    told = "The checkpoint records no CRC-32s: damage to its weights could not be looked for."
    return [] if _has_crc32(plan) else [told]


def _has_crc32(plan: LoraPlan) -> bool:
    return any(storage.crc32 is not None for storage in _storages(plan))


def output_path(out: Path) -> Path:
    """The file that an export writes: `out` itself if it is named .safetensors, else the usual name in that folder."""
    return out if out.suffix == ".safetensors" else out / diffusers.FILE_NAME


def target_dtype_of(plan: LoraPlan, dtype: Cast) -> DType:
    """The dtype of the output's tensors.

    Raises:
        OptionError: if there is no such dtype.
    """
    if dtype == "keep":
        return plan.dtype
    if dtype not in CASTS:
        raise OptionError("there is no such dtype", found=dtype, expected="keep, " + ", ".join(CASTS))
    return DTYPES[CASTS[dtype]]


def output_header(plan: LoraPlan, checkpoint: Checkpoint, scale: Scale, dtype: DType) -> bytes:
    """The output up to where its tensors begin; the arguments as `output_metadata` takes them."""
    tensors = [TensorSpec(tensor.key, dtype, tensor.source.entry.shape) for tensor in plan.tensors]
    return safetensors_header(tensors, output_metadata(plan, checkpoint, scale, dtype))


def output_metadata(plan: LoraPlan, checkpoint: Checkpoint, scale: Scale, dtype: DType) -> dict[str, str]:
    """The text entries of the output's header: the scale, and how the file was made.

    Args:
        plan: what is written.
        checkpoint: what it is made of.
        scale: as `export_lora` has it.
        dtype: of the output's tensors.
    """
    if scale not in get_args(Scale):
        raise OptionError("there is no such way to carry the scale", found=scale, expected=", ".join(get_args(Scale)))
    iteration = checkpoint.values.get("iteration")
    record = {
        "version": __version__,
        "source": checkpoint.path.name,
        "iteration": iteration if isinstance(iteration, int) else None,
        "models": [model.slug for model in plan.transformer.models],
        "transformer_layers": plan.transformer.layers,
        "hidden_size": plan.transformer.hidden,
        "rank": plan.rank,
        "alpha": plan.alpha.value,
        "alpha_source": plan.alpha.source,
        "scale": scale,
        "source_dtype": plan.dtype.name,
        "dtype": dtype.name,
    }
    metadata = {"format": "pt", RECORD_KEY: json.dumps(record, sort_keys=True)}
    if scale != "none":
        alpha = plan.alpha.value if scale == "metadata" else plan.rank  # folded in: what is left is a scaling of 1
        metadata[diffusers.ADAPTER_METADATA_KEY] = diffusers.adapter_metadata(plan.rank, alpha, plan.modules)
    return metadata


@dataclass(slots=True)
class Rounding:
    """How much arithmetic has changed the values: None if nothing was computed.

    Attributes:
        largest_relative_error: the largest ratio, over all tensors, of the norm of the error to that of the tensor.
    """

    largest_relative_error: float | None = None


def _payload(plan: LoraPlan, scale: Scale, dtype: DType, rounding: Rounding) -> Iterable[FileRange | bytes]:
    """The bytes of the output after its header: ranges of the checkpoint where they can be copied as they are."""
    if scale == "fold" or dtype != plan.dtype:
        from cogtools.arithmetic import scaled_and_cast

        yield from scaled_and_cast(plan, plan.scaling if scale == "fold" else 1.0, dtype, rounding)
        return
    for tensor in plan.tensors:
        entry = tensor.source.entry
        source = entry.range()
        if source is None:
            yield from tensor_chunks(entry)
        else:
            yield source


def _write(
    output: AtomicFile,
    header: bytes,
    payload: Iterable[FileRange | bytes],
    check: _Crc32Check,
    progress: Callable[[int, int], None] | None,
    size_bytes: int,
) -> None:
    """Write the output, and publish it only when the checkpoint's CRC-32s are known to be right."""
    with output, check:
        output.reserve(size_bytes)
        output.write(header)
        done = len(header)
        for part in payload:
            if isinstance(part, FileRange):
                output.copy(part)
                done += part.size_bytes
            else:
                output.write(part)
                done += len(part)
            if progress is not None:
                progress(done, size_bytes)
        output.sync()
        check.finish()
        output.publish()


def _storages(plan: LoraPlan) -> list[Storage]:
    """The storages that the LoRA's tensors view, each once."""
    return list({id(tensor.source.entry.storage): tensor.source.entry.storage for tensor in plan.tensors}.values())


class _Crc32Check:
    """Computes the CRC-32s of a plan's storages in a thread beside the copying, and compares them.

    Use it in a `with` statement; `finish` waits for the result. A block that ends early ends the thread too.
    """

    def __init__(self, plan: LoraPlan) -> None:
        self._ranges = [(storage, storage.range()) for storage in _storages(plan) if storage.crc32 is not None]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="crc32")
        self._error: Exception | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def finish(self) -> None:
        """Wait until all is checked.

        Raises:
            CheckpointError: if a storage is damaged, or cannot be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for storage, source in self._ranges:
                self._check(storage, source)
        except Exception as error:  # noqa: BLE001 - raised again by `finish`, in the thread that waits
            self._error = error

    def _check(self, storage: Storage, source: FileRange) -> None:
        crc32 = 0
        for position in range(0, source.size_bytes, CRC32_CHUNK_BYTES):
            if self._stop.is_set():
                return
            size = min(CRC32_CHUNK_BYTES, source.size_bytes - position)
            crc32 = zlib.crc32(source.file.read(source.offset_bytes + position, size), crc32)
        if crc32 != storage.crc32:
            raise CheckpointError(
                "the checkpoint is damaged: weights of the LoRA have changed since they were saved",
                file=source.file.path,
                found=f"storage {storage.key!r} with CRC-32 {crc32:08x}",
                expected=f"CRC-32 {storage.crc32:08x}, as the file records it",
                hint="copy or download the checkpoint again",
            )


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
