"""A written model held against the checkpoint that it was made of: every tensor is what the plan makes of it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cogtools.checkpoint.decoding import doubles
from cogtools.checkpoint.folder import recorded_iteration
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.tensors import TensorEntry
from cogtools.conversion.model import find_parts, no_model
from cogtools.conversion.model_plan import plan_for_diffusers, plan_for_sat
from cogtools.conversion.model_reading import read_text_encoder, read_transformer, read_vae
from cogtools.conversion.model_record import read_model_record
from cogtools.conversion.plan import Planned
from cogtools.errors import Problem
from cogtools.formatting import counted
from cogtools.layouts import sat, transformer
from cogtools.layouts.family import MODELS
from cogtools.layouts.pipeline import TRANSFORMER
from cogtools.verification.model_merged import merged_checks, paired
from cogtools.verification.model_values import difference
from cogtools.verification.positions import Grid, grid_of, position_blocks
from cogtools.verification.report import Check, judged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.run import Iteration
    from cogtools.conversion.model import ModelPart
    from cogtools.conversion.model_plan import PartPlan
    from cogtools.conversion.model_reading import Reading
    from cogtools.layouts.family import Model
    from cogtools.verification.model_written import WrittenModel, WrittenPart

_MOST_DIFFERENT = 1e-6
"""How far positions that are computed in single precision are from those computed in double."""

_HALF_DIFFERENT = 2e-3
"""The same, of numbers up to 1 that were stored in half precision; bfloat16 has three bits less."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The checkpoint that a model is held against.

    Attributes:
        checkpoint: it.
        parts: its parts.
        loras: the LoRAs that are given beside it, open.
        recorded: the iteration that was taken since the model's record names it; None if it was not for that.
    """

    checkpoint: Checkpoint
    parts: Mapping[str, ModelPart]
    loras: tuple[Checkpoint, ...] = ()
    recorded: Iteration | None = None

    @property
    def size_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(entry.size_bytes for part in self.parts.values() for entry in part.tensors.values())


@contextmanager
def open_model_source(
    paths: Sequence[AnyPath], written: WrittenModel, *, iteration: int | None, ema: bool
) -> Iterator[ModelSource]:
    """Open the checkpoint that a model is held against, and the LoRAs that were merged into it.

    Of a save folder it is the iteration that is asked for; else the one that the model's record names, if any.

    Raises:
        CogtoolsError: if there is none, or it holds no model.
    """
    path, *others = paths
    recorded = None if iteration is not None or ema else _recorded(path, written)
    if recorded is not None:
        iteration, ema = recorded.number, recorded.ema
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(path, iteration=iteration, ema=ema))
        parts = find_parts(checkpoint)
        if not parts:
            raise no_model(checkpoint)
        loras = tuple(opened.enter_context(open_checkpoint(other)) for other in others)
        yield ModelSource(checkpoint, parts, loras, recorded)


def _recorded(path: AnyPath, written: WrittenModel) -> Iteration | None:
    part = next((part.part for part in written.parts.values() if part.part is not None), None)
    record = None if part is None else read_model_record(part.checkpoint)
    return None if record is None else recorded_iteration(path, record.iteration, ema=bool(record.ema))


def against_checks(
    written: WrittenModel, source: ModelSource, model: Model | None, advance: Callable[[int], None]
) -> list[Check]:
    """Compare every tensor of every part with the checkpoint's.

    Args:
        written: the model.
        source: the checkpoint.
        model: the model that it is, where the checkpoint does not tell.
        advance: called with the bytes that were compared, as they are.

    Raises:
        CogtoolsError: if the checkpoint cannot be read, or is not whole.
    """
    others = {
        name: other for name, part in written.parts.items() if (other := _made_of_other(part, source)) is not None
    }
    if len(others) == len(written.parts):  # the checkpoint has got another name
        others = {}
    checks = []
    for name, part in written.parts.items():
        if name in others:
            checks.append(Check(f"{name} against", "skipped", f"made of {others[name]}, as its record says"))
        else:
            checks += _part_checks(part, source, model, advance)
    return checks


def _made_of_other(written: WrittenPart, source: ModelSource) -> str | None:
    """What a part was made of, where its record names something else than the checkpoint; else None."""
    if written.part is None or written.name not in source.parts:
        return None
    made_of = read_model_record(written.part.checkpoint).source
    part = source.parts[written.name].checkpoint
    names = {source.checkpoint.path.name, part.path.name, read_model_record(part).source}  # a copy has its record too
    return None if made_of in names else made_of


def _part_checks(
    written: WrittenPart, source: ModelSource, model: Model | None, advance: Callable[[int], None]
) -> list[Check]:
    name = f"{written.name} against"
    if written.part is None:
        return [Check(name, "skipped", "it cannot be opened")]
    if written.name not in source.parts:
        return [Check(name, "skipped", f"the checkpoint has no {written.name}")]
    part, record = source.parts[written.name], read_model_record(written.part.checkpoint)
    if written.name != TRANSFORMER and part.layout == "diffusers":  # a copy
        copied = [Planned(key, entry.dtype, entry.shape, (entry,)) for key, entry in part.tensors.items()]
        return [_compared(name, written, copied, advance)]
    plan = _plan(written, part, model)
    if written.name == TRANSFORMER and (record.merged is not None or source.loras):
        checks = merged_checks(name, written.part, plan, source.loras, record, advance)
    else:
        checks = [_compared(name, written, plan.tensors, advance)]
    if written.name == TRANSFORMER and written.config is not None:
        checks.append(_config(written, plan))
        positions = _positions(written, source.parts[TRANSFORMER])
        checks += [] if positions is None else [positions]
    return checks


def _plan(written: WrittenPart, part: ModelPart, model: Model | None) -> PartPlan:
    if written.name == "vae":  # which model it is for does not matter to its tensors
        return plan_for_diffusers(read_vae(part, model or MODELS[0]))
    if written.name == "text_encoder":
        return plan_for_diffusers(read_text_encoder(part))
    reading = read_transformer(part, model)
    if written.part is None or written.part.layout != "sat":
        return plan_for_diffusers(reading)
    plan, there = plan_for_sat(reading), written.part.tensors
    kept = (tensor for tensor in plan.tensors if not _may_differ(tensor.key, reading, is_there=tensor.key in there))
    return replace(plan, tensors=tuple(kept))


def _may_differ(key: str, reading: Reading, *, is_there: bool) -> bool:
    """Whether SAT makes a tensor itself, or never uses it, so that it may be missing, or made up."""
    bare = sat.bare_key(key)
    if bare == transformer.SAT_POSITIONS:
        return not is_there and (reading.model is None or not reading.model.learned_positions)
    return bare == transformer.UNUSED_POSITIONS or (not is_there and bare in transformer.DROPPED)


def _compared(name: str, written: WrittenPart, tensors: Sequence[Planned], advance: Callable[[int], None]) -> Check:
    problems = []
    for planned, key, entry in paired(written.part, tensors):
        problem = Problem("missing", key) if entry is None else difference(key, entry, planned, advance)
        problems += [] if problem is None else [problem]
    count = counted(len(tensors), "tensor")
    good = f"{count} equal the checkpoint's bit for bit"
    return judged(name, problems, good, f"{len(problems)} of {count} are not the checkpoint's")


def _config(written: WrittenPart, plan: PartPlan) -> Check:
    """The configuration, held against what the checkpoint and its training state."""
    stated, expected = written.config or {}, plan.reading.config
    known = set(transformer.SIZE_FIELDS)
    if plan.reading.training is None and plan.reading.part.layout == "sat":
        known -= set(transformer.SAMPLE_FIELDS)  # the published model's were taken, and somebody may know better
    differing = [
        Problem("value", field, str(stated.get(field))[:100], str(value))
        for field, value in expected.items()
        if field in known and stated.get(field, transformer.DEFAULTS.get(field)) != value
    ]
    return judged(
        f"{written.name} against-config",
        differing,
        "the sizes of the checkpoint and its training",
        "other sizes than the checkpoint and its training have",
        status="warn",
    )


def _positions(written: WrittenPart, part: ModelPart) -> Check | None:
    """The positions that diffusers computes of this configuration, against those that the training had.

    None where the checkpoint has none that are computed. They prove the sizes of videos and texts, which nothing else
    in a checkpoint of 2B tells.
    """
    positions = (entry for key, entry in part.tensors.items() if sat.table_key(key) == transformer.SAT_POSITIONS)
    entry = next(positions, None)
    config = written.config or {}
    if entry is None or {**transformer.DEFAULTS, **config}["use_rotary_positional_embeddings"] is not False:
        return None
    name, grid = f"{written.name} positions", grid_of(config)
    expected = transformer.positions_of_config(config)
    if grid is None or len(entry.shape) != 3 or entry.shape[1] != expected:
        found = f"{entry.shape[1] if len(entry.shape) > 1 else 0} positions"
        problem = Problem("value", "positions", f"{expected} of this configuration", f"{found}, as the checkpoint has")
        return Check(name, "fail", "the configuration is of other sizes of videos and texts", (problem,))
    largest = _largest_difference(entry, grid)
    most = _MOST_DIFFERENT if entry.dtype.name in ("float32", "float64") else _HALF_DIFFERENT
    most *= 8 if entry.dtype.name == "bfloat16" else 1
    if largest > most:
        problem = Problem("value", "positions", f"{largest:.2g} apart", "the same numbers")
        return Check(name, "fail", "diffusers computes other positions than the training had", (problem,))
    return Check(name, "pass", f"{expected:,} computed ones are the checkpoint's: {largest:.1g} apart at most")


def _largest_difference(entry: TensorEntry, grid: Grid) -> float:
    """How far positions, (1, positions, hidden size), are from those that are computed."""
    table = TensorEntry(entry.dtype, entry.shape[1:], entry.stride[1:], entry.storage, entry.storage_offset)
    largest, first = 0.0, 0
    for block in position_blocks(grid):
        data = b"".join(tensor_chunks(table.rows(first, first + len(block))))
        found = doubles(data, entry.dtype)
        if len(found) != block.size:
            return float("inf")
        largest = max(largest, float(np.abs(found - block.ravel()).max(initial=0.0)))
        first += len(block)
    return largest
