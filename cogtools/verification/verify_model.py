"""Verifying a written model: opening it, all checks, the verdict."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from cogtools.checkpoint.paths import as_path, local_path
from cogtools.conversion.model_reading import model_of_slug
from cogtools.conversion.notices import choice_notices, recorded_notice
from cogtools.layouts.pipeline import TRANSFORMER
from cogtools.verification.given import given_paths
from cogtools.verification.meter import Meter
from cogtools.verification.model_checks import model_of, part_checks, pipeline_checks
from cogtools.verification.model_report import ModelVerifyReport
from cogtools.verification.model_written import open_model
from cogtools.verification.report import strictly, verdict_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from cogtools.checkpoint.paths import RemotePath
    from cogtools.layouts.family import Model
    from cogtools.verification.given import Given
    from cogtools.verification.model_against import ModelSource
    from cogtools.verification.model_written import WrittenModel
    from cogtools.verification.report import Check


def verify_model(
    out: str | os.PathLike[str] | RemotePath,
    *,
    against: Given | Sequence[Given] | None = None,
    iteration: int | None = None,
    ema: bool = False,
    load: bool = False,
    model: str | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> ModelVerifyReport:
    """Check that a model is complete and consistent; that it is its checkpoint's; that it loads.

    Args:
        out: a pipeline, a folder of parts, one part's folder, a file of weights, or a folder that SAT loads.
        against: the checkpoint that it was made of: every byte is compared. Of a merged model, the base and then the
            LoRAs, for all that was merged.
        iteration: which iteration of the checkpoint, where that is a save folder; None takes the latest.
        ema: hold it against its EMA weights.
        load: load every part with diffusers and transformers.
        model: the short name of the model, where nothing else tells.
        strict: take warnings for failures.
        progress: called with the bytes looked at so far and the bytes in all.
        say: called with what goes on where that cannot be counted in bytes.

    Raises:
        CogtoolsError: if there is no model, or the checkpoint cannot be read. What is wrong with the model is in the
            report.
    """
    asked = model_of_slug(model)
    with ExitStack() as opened:
        written = opened.enter_context(open_model(as_path(out)))
        source = None
        paths = given_paths(against, iteration, ema=ema)
        if paths:
            from cogtools.verification.model_against import open_model_source

            source = opened.enter_context(open_model_source(paths, written, iteration=iteration, ema=ema))
        known = asked or model_of(written)
        checks = _checks(written, source, known, Meter(progress, written.size_bytes * (1 if source is None else 2)))
        libraries: dict[str, str] = {}
        if load:
            local_path(written.path, "--load takes files of this machine: that is what the libraries load")
            if say is not None:
                say("loading it with diffusers and transformers")
            from cogtools.verification.model_load import load_model

            check, libraries = load_model(written)
            checks.append(check)
        if strict:
            checks = strictly(checks)
        return _report(written, source, checks, known, libraries, strict=strict)


def _checks(written: WrittenModel, source: ModelSource | None, model: Model | None, meter: Meter) -> list[Check]:
    checks = [check for part in written.parts.values() for check in part_checks(part, model, meter.advance)]
    checks += pipeline_checks(written, model)
    if source is not None:
        from cogtools.verification.model_against import against_checks

        checks += against_checks(written, source, model, meter.advance)
    return checks


def _source_notices(source: ModelSource) -> list[str]:
    return choice_notices(source.checkpoint) if source.recorded is None else [recorded_notice(source.recorded)]


def _report(
    written: WrittenModel,
    source: ModelSource | None,
    checks: list[Check],
    model: Model | None,
    libraries: dict[str, str],
    *,
    strict: bool,
) -> ModelVerifyReport:
    parts = [part.part for part in written.parts.values() if part.part is not None]
    entries = [entry for part in parts for entry in part.tensors.values()]
    is_transformer = TRANSFORMER in written.parts
    return ModelVerifyReport(
        path=written.path,
        kind=written.kind,
        model=model.name if model is not None and is_transformer else None,
        parts=tuple(dict.fromkeys([*written.parts, *written.folders])),
        tensors=len(entries),
        dtype=tuple(sorted({entry.dtype.name for entry in entries})),
        size_bytes=sum(entry.size_bytes for entry in entries),
        against=None if source is None else source.checkpoint.path,
        libraries=libraries,
        strict=strict,
        checks=tuple(checks),
        notices=() if source is None else tuple(_source_notices(source)),
        verdict=verdict_of(checks),
    )
