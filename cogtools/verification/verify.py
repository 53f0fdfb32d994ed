"""Verifying a written LoRA: opening it, all checks, the verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.errors import OptionError
from cogtools.verification.checks import header_checks, ranks, scalings
from cogtools.verification.expected import expect
from cogtools.verification.result import Check, VerifyReport, verdict_of
from cogtools.verification.written import open_written
from cogtools.words import counted

if TYPE_CHECKING:
    import os
    from collections.abc import Callable


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

    Raises:
        CogtoolsError: if a file is missing or cannot be read. What is wrong with one that can is in the report.
    """
    if against is None and (iteration is not None or ema):
        raise OptionError(
            "--iteration and --ema say which weights of a checkpoint are meant, and there is none",
            hint="give the checkpoint with --against",
        )
    with open_written(Path(out)) as lora:
        expected = expect(lora, model=model, layers=layers)
        tensors = counted(len(lora.file.tensors), "tensor")
        checks = [Check("readable", "pass", f"{tensors}, the safetensors library reads it too")]
        checks += header_checks(lora, expected)
        meter = _Meter(
            progress, sum(tensor.entry.size_bytes for tensor in lora.tensors.values()) * (2 if against else 1)
        )
        from cogtools.verification.values import value_checks

        # The values are looked at before the scale: a reader goes from what the file holds to what it states.
        checks[7:7] = value_checks(lora, meter.advance)
        compared: Path | None = None
        if against is not None:
            from cogtools.verification.against import against_checks

            compared, more = against_checks(lora, Path(against), meter.advance, iteration=iteration, ema=ema)
            checks += more
        libraries: dict[str, str] = {}
        if load:
            from cogtools.verification.load import check_load

            check, libraries = check_load(lora, expected)
            checks.append(check)
        if strict:
            checks = [replace(check, status="fail") if check.status == "warn" else check for check in checks]
        return VerifyReport(
            path=lora.path,
            naming=lora.naming.name,
            model=expected.transformer.name,
            layers=lora.layers,
            tensors=len(lora.file.tensors),
            rank=tuple(sorted({rank for _, rank in ranks(lora)})),
            dtype=tuple(sorted({tensor.entry.dtype.name for tensor in lora.tensors.values()})),
            scaling=tuple(sorted(set(scalings(lora).values()))),
            size_bytes=lora.file.size_bytes,
            against=compared,
            libraries=libraries,
            strict=strict,
            checks=tuple(checks),
            verdict=verdict_of(checks),
        )


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
