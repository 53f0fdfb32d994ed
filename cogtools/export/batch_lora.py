"""Exporting the LoRA of one checkpoint of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.places import is_file
from cogtools.conversion.lora import read_lora
from cogtools.conversion.options import CASTS
from cogtools.errors import CheckpointError, OutputError, command
from cogtools.export.export import export_checkpoint
from cogtools.export.names import target_in

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.options import ExportOptions
    from cogtools.conversion.record import ExportRecord
    from cogtools.export.export import ExportReport
    from cogtools.export.names import Target
    from cogtools.verification.model_report import ModelVerifyReport
    from cogtools.verification.report import VerifyReport


@dataclass(frozen=True, slots=True)
class LoraWork:
    """Exporting LoRAs, with these options."""

    options: ExportOptions

    def target(self, folder: AnyPath, file: AnyPath) -> Target:
        """Where the LoRA of a file is written, in a folder of its own."""
        return target_in(folder, self.options.layout, file)

    def is_done(self, file: AnyPath, target: Target) -> bool:
        """Whether the output exists already, was made with these options, and verifies against the checkpoint.

        Raises:
            OutputError: if it exists and the rest is not so.
        """
        output = target.file
        if not is_file(output):
            return False
        from cogtools.verification.verify import verify_lora

        try:
            with open_checkpoint(output) as written:
                record = read_lora(written).record
            found, wanted = _made(record), _wanted(record, self.options)
            if found != wanted:
                raise OutputError(
                    "the output exists already and was made with other options",
                    file=output,
                    found=str(found),
                    expected=str(wanted),
                    hint="replace it with --overwrite, or give another folder",
                )
            report = verify_lora(output, against=file)
        except CheckpointError as error:
            if error.file != str(output):
                raise
            raise not_right(file, output, error.what) from error
        if report.verdict == "fail":
            raise not_right(file, output, first_failure(report))
        return True

    def export(self, file: AnyPath, target: Target) -> ExportReport:
        """Export it. The file says which iteration it is."""
        return export_checkpoint(file, target, replace(self.options, iteration=None, ema=False))


class _Made(NamedTuple):
    """The options that an output was made with."""

    format: str | None
    scale: str | None
    dtype: str | None
    alpha: float | None
    scaling: float | None
    rank: int | None
    has_base: bool

    def __str__(self) -> str:
        by_hand = [f"--{name} {value}" for name, value in (("alpha", self.alpha), ("scaling", self.scaling)) if value]
        made = f"format {self.format}, scale {self.scale}, dtype {self.dtype}"
        cut = [] if self.rank is None else [f"--rank {self.rank}"]
        cut += ["with --base"] if self.has_base else []
        return ", ".join([made, *cut, *(by_hand or ["no --alpha"])])


def _made(record: ExportRecord) -> _Made:
    by_hand = record.alpha_by_hand, record.scaling_by_hand
    return _Made(record.format, record.scale, record.dtype, *by_hand, record.cut_to, record.base is not None)


def _wanted(record: ExportRecord, options: ExportOptions) -> _Made:
    dtype = record.source_dtype if options.dtype == "keep" else CASTS.get(options.dtype)
    by_hand = options.alpha, options.scaling
    return _Made(options.format, options.way, dtype, *by_hand, options.rank, options.base is not None)


def first_failure(report: VerifyReport | ModelVerifyReport) -> str:
    """What is wrong with an output first of all."""
    return next(f"{check.name}: {check.seen}" for check in report.checks if check.status == "fail")


def not_right(file: AnyPath, output: AnyPath, found: str) -> OutputError:
    """The error for an output that is there and is not what it should be."""
    return OutputError(
        "the output exists already and does not verify",
        file=output,
        found=found,
        hint=command("verify", output, "--against", file, advice="replace it with --overwrite; to see more"),
    )
