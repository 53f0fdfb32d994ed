"""What `inspect` does: find out what checkpoints hold.

No weights are read unless asked for; the result is plain data.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.lora import find_lora, find_other_adapter, find_transformer, scale_of
from cogtools.inspection.contents import files_of, iterations_of, judged, kinds_of, trainer_facts
from cogtools.inspection.listing import add_offsets, add_statistics, list_tensors, select
from cogtools.inspection.lora import describe_lora
from cogtools.inspection.report import AdapterReport, CheckpointReport, InspectReport, ModelReport
from cogtools.inspection.selection import Selection
from cogtools.inspection.totals import dtype_totals, second_copy, section_totals, stored_bytes, unviewed_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.conversion.lora import Lora
    from cogtools.inspection.report import LoraComparison, LoraReport
    from cogtools.layouts.family import Transformer


def inspect_checkpoint(
    path: str | os.PathLike[str],
    selection: Selection | None = None,
    *,
    iteration: int | None = None,
    ema: bool = False,
    updates: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointReport:
    """Find out what a checkpoint holds.

    Args:
        path: the checkpoint.
        selection: which tensors to list; None lists all.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        updates: compute how strongly a LoRA changes each module. Its weights are read.
        progress: called with the bytes read so far and the bytes in all, where weights are read.

    Raises:
        CheckpointError: if it cannot be read.
        OptionError: if the selection makes no sense.
    """
    selection = selection or Selection()
    selection.check()
    with open_checkpoint(path, iteration=iteration, ema=ema) as checkpoint:
        return describe(checkpoint, selection, updates=updates, progress=progress)


def describe(
    checkpoint: Checkpoint,
    selection: Selection,
    *,
    updates: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointReport:
    """What an open checkpoint holds; arguments as for `inspect_checkpoint`."""
    tensors = list_tensors(checkpoint)
    entries = [tensor.entry for tensor in tensors]
    selected = select(tensors, selection)
    listed = selected[: selection.limit]
    if selection.offsets:
        add_offsets(listed)
    if selection.statistics and not selection.tree:
        add_statistics(listed, progress)
    lora = find_lora(checkpoint)
    model = find_transformer(checkpoint, lora)
    lora_report = None if lora is None else describe_lora(checkpoint, lora, model)
    if lora is not None and lora_report is not None and updates:
        lora_report = _with_updates(lora, lora_report, progress)
    dtypes = dtype_totals((checkpoint.tensors or checkpoint.beside).values())
    return CheckpointReport(
        checkpoint=checkpoint.path,
        format=checkpoint.format,
        size_bytes=checkpoint.size_bytes,
        files=tuple(files_of(checkpoint)),
        iterations=iterations_of(checkpoint.run),
        wrapper=".".join(checkpoint.wrapper),
        state_dict_tensors=len(checkpoint.tensors),
        beside_tensors=len(checkpoint.beside),
        parameters=sum(dtype.parameters for dtype in dtypes),
        stored_bytes=stored_bytes(entries),
        unviewed_bytes=unviewed_bytes(entries),
        dtypes=dtypes,
        sections=section_totals(tensors),
        second_copy=second_copy(checkpoint),
        trainer=trainer_facts({**checkpoint.not_tensors, **checkpoint.values}),
        entries=kinds_of(checkpoint.values),
        not_tensors=kinds_of(checkpoint.not_tensors),
        globals=judged(checkpoint.foreign),
        metadata=checkpoint.metadata,
        model=None if model is None else _model_report(model),
        lora=lora_report,
        other_adapter=_other_adapter(checkpoint) if lora is None else None,
        tensors=tuple(tensor.report for tensor in listed),
        selected=len(selected),
    )


def _other_adapter(checkpoint: Checkpoint) -> AdapterReport | None:
    found = find_other_adapter(checkpoint)
    return None if found is None else AdapterReport(found.name, found.readers)


def _model_report(model: Transformer) -> ModelReport:
    return ModelReport(model.name, tuple(one.slug for one in model.models), model.layers, model.hidden)


def _with_updates(lora: Lora, report: LoraReport, progress: Callable[[int, int], None] | None) -> LoraReport:
    """The report of a LoRA with the strength of its updates: none where its names are not known."""
    from cogtools.inspection.updates import lora_updates

    scale = scale_of(lora)
    if lora.layout is None:
        return replace(report, updates=())
    return replace(report, updates=lora_updates(lora, {} if scale is None else scale.scalings, progress))


def inspect_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    selection: Selection | None = None,
    *,
    iteration: int | None = None,
    ema: bool = False,
    plot: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> InspectReport:
    """Find out what checkpoints hold.

    Args:
        paths: the checkpoints.
        selection: which tensors to list; None lists all.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        plot: draw how strong the updates of the LoRA are, of one checkpoint or of two, into this file.
        progress: called with the bytes read so far and the bytes in all, where weights are read.

    Raises:
        CogtoolsError: if one of them cannot be read, or the picture cannot be drawn.
    """
    selection = selection or Selection()
    selection.check()
    if plot is not None:
        from cogtools.inspection.plot import refuse_unplottable

        refuse_unplottable(Path(plot), len(paths))
    reports = tuple(
        inspect_checkpoint(
            path,
            selection,
            iteration=iteration,
            ema=ema,
            updates=selection.statistics or plot is not None,
            progress=progress,
        )
        for path in paths
    )
    comparison = None
    if selection.statistics and len(paths) == 2 and all(report.lora is not None for report in reports):
        comparison = _compare(paths, iteration=iteration, ema=ema)
    if plot is None:
        return InspectReport(reports, comparison=comparison)
    from cogtools.inspection.plot import plot_updates

    plot_updates(reports, Path(plot))
    return InspectReport(reports, Path(plot), comparison)


def _compare(paths: Sequence[str | os.PathLike[str]], *, iteration: int | None, ema: bool) -> LoraComparison | None:
    """What changed from the LoRA of the first checkpoint to that of the second; None if one has none that is known."""
    from cogtools.inspection.comparison import compare_loras

    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path, iteration=iteration, ema=ema)) for path in paths]
        first, second = map(find_lora, opened)
        if first is None or second is None or first.layout is None or second.layout is None:
            return None
        return compare_loras(first, second)
