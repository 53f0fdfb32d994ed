"""Verifying a written LoRA: opening it, all checks, the verdict."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.errors import OptionError
from cogtools.notices import choice_notices
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
from cogtools.verification.hints import with_hint
from cogtools.verification.result import Check, VerifyReport, verdict_of
from cogtools.verification.written import open_written

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from cogtools.verification.against import Source
    from cogtools.verification.expected import Expected
    from cogtools.verification.load import Loaded
    from cogtools.verification.written import WrittenLora


def verify_lora(
    out: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    iteration: int | None = None,
    ema: bool = False,
    load: bool = False,
    model: str | None = None,
    layers: int | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Check that a LoRA file is complete, consistent, and states its scale; that it is its checkpoint's; that it loads.

    Args:
        out: the file, or the folder that has it.
        against: the checkpoint that it was made of: every value is compared.
        iteration: which iteration of the checkpoint, where that is a save folder; None takes the latest.
        ema: hold it against its EMA weights.
        load: load it with diffusers (a PEFT folder: with PEFT), into a transformer whose weights take no memory.
        model: the short name of the model that it belongs to, where the file does not tell.
        layers: the same for a model that is none of the published ones: how many layers it has.
        strict: take warnings for failures.
        progress: called with the bytes looked at so far and the bytes in all.
        say: called with what goes on where that cannot be counted in bytes.

    Raises:
        CogtoolsError: if a file is missing or cannot be read. What is wrong with one that can is in the report.
    """
    if against is None and (iteration is not None or ema):
        raise OptionError(
            "--iteration and --ema say which weights of a checkpoint are meant, and there is none",
            hint="give the checkpoint with --against",
        )
    with ExitStack() as opened:
        lora = opened.enter_context(open_written(Path(out)))
        expected = expect(lora, model=model, layers=layers)
        source: Source | None = None
        if against is not None:
            from cogtools.verification.against import open_source

            # Before the long work: that a checkpoint is missing is told at once.
            source = opened.enter_context(open_source(Path(against), iteration=iteration, ema=ema))
        loaded = _load(lora, expected, say) if load else None
        told = loaded.modules if loaded is not None else {}
        if told and not expected.is_certain:
            expected = expected.as_loaded(told)
        found = scalings(lora) or told
        meter = _Meter(progress, _bytes_to_look_at(lora) * (1 if source is None else 2))
        checks = _checks(lora, expected, found, told, meter)
        if source is not None:
            from cogtools.verification.against import against_checks

            checks += against_checks(lora, source, found, meter.advance)
        if loaded is not None:
            checks.append(loaded.check)
        words = _as_words(against, iteration, ema=ema)
        checks = [with_hint(check, lora, words) for check in checks]
        if strict:
            checks = [replace(check, status="fail") if check.status == "warn" else check for check in checks]
        return VerifyReport(
            path=lora.path,
            naming=lora.naming.name,
            model=expected.transformer.name,
            layers=lora.layers,
            tensors=len(lora.file.tensors),
            rank=tuple(sorted(set(ranks(lora, expected).values()))),
            dtype=tuple(sorted({tensor.entry.dtype.name for tensor in lora.tensors.values()})),
            scaling=tuple(sorted(set(found.values()))),
            size_bytes=lora.file.size_bytes,
            against=None if source is None else source.checkpoint.path,
            libraries={} if loaded is None else loaded.libraries,
            strict=strict,
            checks=tuple(checks),
            notices=() if source is None else tuple(choice_notices(source.checkpoint)),
            verdict=verdict_of(checks),
        )


def _load(lora: WrittenLora, expected: Expected, say: Callable[[str], None] | None) -> Loaded:
    if say is not None:
        say("loading it with diffusers and PEFT")
    from cogtools.verification.load import load_lora

    return load_lora(lora, expected)


def _checks(
    lora: WrittenLora, expected: Expected, found: Mapping[str, float], told: Mapping[str, float], meter: _Meter
) -> list[Check]:
    """What the file itself shows, from what it holds to what it states.

    Args:
        lora: the file.
        expected: what it should hold.
        found: the scaling of every module.
        told: the same, of those that PEFT adapted when it loaded the file; {} if it did not.
        meter: told what was read.
    """
    from cogtools.verification.values import value_checks

    return [
        check_readable(lora),
        check_names(lora, expected),
        check_complete(lora, expected),
        check_pairs(lora),
        check_shapes(lora, expected),
        check_rank(lora, expected, told),
        check_dtype(lora),
        *value_checks(lora, meter.advance),
        check_scale(lora, found, told),
        check_target_modules(lora, expected, told),
        check_record(lora, expected, found),
    ]


def _bytes_to_look_at(lora: WrittenLora) -> int:
    return sum(tensor.entry.size_bytes for tensor in lora.tensors.values())


def _as_words(against: str | os.PathLike[str] | None, iteration: int | None, *, ema: bool) -> list[object]:
    """The checkpoint as words of a command."""
    if against is None:
        return ["CHECKPOINT"]
    return [against, *(["--iteration", iteration] if iteration is not None else []), *(["--ema"] if ema else [])]


class _Meter:
    """Adds up what was looked at, and tells it."""

    def __init__(self, progress: Callable[[int, int], None] | None, all_bytes: int) -> None:
        self._progress = progress
        self._all_bytes = all_bytes
        self._done = 0

    def advance(self, size_bytes: int) -> None:
        """Tell that so many bytes more were looked at."""
        self._done += size_bytes
        if self._progress is not None:
            self._progress(self._done, self._all_bytes)
