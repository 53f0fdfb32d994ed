"""Verifying a written LoRA: opening it, all checks, the verdict."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogtools.checkpoint.paths import as_path
from cogtools.conversion.lora import scale_of
from cogtools.conversion.options import checked_format
from cogtools.conversion.readers import readers_of
from cogtools.conversion.trained import trained_notices
from cogtools.layouts.recognition import BY_NAME
from cogtools.verification.checks import (
    check_complete,
    check_dtype,
    check_names,
    check_pairs,
    check_rank,
    check_readable,
    check_record,
    check_scale,
    check_shapes,
    check_target_modules,
    ranks,
    scalings,
)
from cogtools.verification.expected import expect
from cogtools.verification.given import given_paths
from cogtools.verification.hints import with_hint
from cogtools.verification.meter import Meter
from cogtools.verification.report import Check, VerifyReport, strictly, verdict_of
from cogtools.verification.written import open_written

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from cogtools.checkpoint.paths import AnyPath, RemotePath
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import Module
    from cogtools.verification.against import Source
    from cogtools.verification.expected import Expected
    from cogtools.verification.given import Given
    from cogtools.verification.load import Loaded


def verify_lora(
    out: str | os.PathLike[str] | RemotePath,
    *,
    against: Given | Sequence[Given] | None = None,
    iteration: int | None = None,
    ema: bool = False,
    load: bool = False,
    format: str | None = None,  # noqa: A002 - the option's name
    model: str | None = None,
    layers: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Check that a LoRA file is complete, consistent, and states its scale; that it is its checkpoint's; that it loads.

    Args:
        out: the file, or the folder that has it; or the URL of one.
        against: the checkpoint that it was made of: every value is compared. Of a merged LoRA, all that were merged.
        iteration: which iteration of the checkpoint, where that is a save folder; None takes the latest.
        ema: hold it against its EMA weights.
        load: load it with diffusers (a PEFT folder: with PEFT), into a transformer whose weights take no memory.
        format: the layout of the program that it is held against; None takes the one that it is for.
        model: the short name of the model that it belongs to, where the file does not tell.
        layers: the same for a model that is none of the published ones: how many layers it has.
        strict: take warnings for failures.
        progress: called with the bytes looked at so far and the bytes in all.
        say: called with what goes on where that cannot be counted in bytes.

    Raises:
        CogtoolsError: if a file is missing or cannot be read. What is wrong with one that can is in the report.
    """
    paths = given_paths(against, iteration, ema=ema)
    with ExitStack() as opened:
        asked = None if format is None else BY_NAME[checked_format(format)]
        lora = opened.enter_context(open_written(as_path(out), asked))
        expected = expect(lora, model=model, layers=layers)
        # Before the long work: a missing checkpoint is an error at once.
        source = opened.enter_context(_open_source(lora, paths, iteration, ema=ema)) if paths else None
        loaded = _load(lora, expected, model, layers, say) if load else None
        case = _Case(lora, expected.as_loaded(loaded.modules) if loaded is not None else expected, source, loaded)
        meter = Meter(progress, _bytes_to_look_at(lora) * (1 if source is None else 2))
        words = _as_words(paths, iteration, source, ema=ema)
        checks = [with_hint(check, lora, words) for check in _checks(case, meter.advance)]
        if strict:
            checks = strictly(checks)
        return _report(case, checks, strict=strict)


@dataclass(frozen=True, slots=True)
class _Case:
    """A file, and what it is held against.

    Attributes:
        lora: the file.
        expected: what it should hold.
        source: the checkpoint that it was made of.
        loaded: what came of loading it.
    """

    lora: Lora
    expected: Expected
    source: Source | None
    loaded: Loaded | None

    @property
    def by_peft(self) -> Mapping[Module, float]:
        """The modules that PEFT adapted, and their scalings; {} if it was not asked, or did not load the file."""
        return {} if self.loaded is None else self.loaded.modules

    @property
    def scalings(self) -> Mapping[Module, float]:
        """The scaling of every module: as the file states it, else as PEFT has it."""
        return scalings(self.lora) or self.by_peft


def _open_source(
    lora: Lora, paths: Sequence[AnyPath], iteration: int | None, *, ema: bool
) -> AbstractContextManager[Source]:
    from cogtools.verification.against import open_source

    return open_source(paths, lora.record, iteration=iteration, ema=ema)


def _load(
    lora: Lora, expected: Expected, model: str | None, layers: int | None, say: Callable[[str], None] | None
) -> Loaded:
    if say is not None:
        say("loading it with diffusers and PEFT")
    from cogtools.verification.load import load_lora

    return load_lora(lora, expected, model=model, layers=layers)


def _checks(case: _Case, advance: Callable[[int], None]) -> list[Check]:
    """All checks: from what the file holds to what it states, then against the checkpoint, then as it was loaded."""
    from cogtools.verification.values import value_checks

    lora, expected, found, by_peft = case.lora, case.expected, case.scalings, case.by_peft
    checks = [
        check_readable(lora),
        check_names(lora, expected),
        check_complete(lora, expected),
        check_pairs(lora),
        check_shapes(lora, expected),
        check_rank(lora, expected, by_peft),
        check_dtype(lora),
        *value_checks(lora, advance),
        check_scale(lora, found, by_peft),
        check_target_modules(lora, expected, by_peft),
        check_record(lora, expected, found),
    ]
    if case.source is not None:
        from cogtools.verification.against import against_checks

        checks += against_checks(lora, case.source, found, advance)
    return checks if case.loaded is None else [*checks, case.loaded.check]


def _report(case: _Case, checks: list[Check], *, strict: bool) -> VerifyReport:
    lora, source = case.lora, case.source
    return VerifyReport(
        path=lora.checkpoint.path,
        layout=lora.intended.name,
        reader=lora.intended.reader,
        model=case.expected.transformer.name,
        layers=lora.layers,
        tensors=len(lora.checkpoint.tensors),
        rank=tuple(sorted(set(ranks(lora, case.expected).values()))),
        dtype=tuple(sorted({tensor.entry.dtype.name for tensor in lora.tensors.values()})),
        scaling=tuple(sorted(set(case.scalings.values()))),
        size_bytes=lora.checkpoint.size_bytes,
        readers=readers_of(lora, scale_of(lora), case.expected.transformer),
        against=None if source is None else source.checkpoint.path,
        libraries={} if case.loaded is None else case.loaded.libraries,
        strict=strict,
        checks=tuple(checks),
        notices=_notices(source),
        verdict=verdict_of(checks),
    )


def _notices(source: Source | None) -> tuple[str, ...]:
    if source is None:
        return ()
    from cogtools.verification.against import source_notices

    return (*source_notices(source), *trained_notices(source.plan.lora))


def _bytes_to_look_at(lora: Lora) -> int:
    return sum(tensor.entry.size_bytes for tensor in lora.tensors.values())


def _as_words(
    paths: Sequence[AnyPath], iteration: int | None, source: Source | None, *, ema: bool
) -> list[object] | None:
    """The checkpoint as words of a command; None if there is none."""
    if not paths:
        return None
    if source is not None and source.recorded is not None:
        iteration, ema = source.recorded.number, source.recorded.ema
    return [*paths, *(["--iteration", iteration] if iteration is not None else []), *(["--ema"] if ema else [])]
