"""What a batch prints: a line for each checkpoint, and how many there were."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.export.export import ExportReport
from cogtools.formatting import size
from cogtools.render.export import scaling_of
from cogtools.render.text import notice, shortened, show, talk
from cogtools.render.verify import verdict_line

if TYPE_CHECKING:
    from cogtools.errors import CogtoolsError
    from cogtools.export.batch import BatchItem, BatchReport
    from cogtools.export.model_report import ModelExportReport


def show_batch_item(item: BatchItem, *, quiet: bool = False) -> None:
    """Print the result of one checkpoint of several; if quiet, only if it failed or what was written is wrong."""
    if item.error is not None:
        talk(shortened(f"failed   {item.checkpoint}: {_why(item.error)}"))
        if item.error.hint is not None:
            talk(shortened(f"         try: {item.error.hint}"))
    elif not quiet or item.is_wrong:
        report = item.report
        if report is None:
            show(shortened(f"{item.status:<8} {item.output or item.checkpoint}: {item.reason}"))
        else:
            show(shortened(f"{'done    ' if report.written else 'would write'} {item.output}: {_in_short(report)}"))
            if isinstance(report, ExportReport) and report.verification is not None:
                show(shortened(f"         {verdict_line(report.verification)}"))


def _why(error: CogtoolsError) -> str:
    """What failed, what was found, and the first problem."""
    details = [f"found: {error.found}"] if error.found else []
    if error.problems:
        more = f" and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
        details.append(f"{error.problems[0]}{more}")
    return error.what + (f" ({'; '.join(details)})" if details else "")


def _in_short(report: ExportReport | ModelExportReport) -> str:
    if not isinstance(report, ExportReport):
        return f"{', '.join(part.name for part in report.parts)}, {size(report.size_bytes)}"
    scaling = f"scaling {scaling_of(report).partition(' = ')[0]}"
    parts = [f"{report.tensors} tensors", report.dtype, size(report.size_bytes), scaling]
    return ", ".join([*parts, f"sha256 {report.sha256}"] if report.sha256 else parts)


def show_batch(report: BatchReport) -> None:
    """Print how many were exported, and each notice once, with the checkpoints that it is about unless it is all."""
    exports = [(item.checkpoint, item.report) for item in report.exports if item.report is not None]
    done = "would be written" if any(not export.written for _, export in exports) else "done"
    show(f"{report.done} {done}, {report.skipped} skipped, {report.failed} failed")
    named: dict[str, list[str]] = {}
    for checkpoint, export in exports:
        for text in export.notices:
            named.setdefault(text, []).append(checkpoint)
    for text, checkpoints in named.items():
        if len(checkpoints) == len(exports):
            notice(text)
        elif len(checkpoints) == 1:
            notice(f"{checkpoints[0]}: {text}")
        else:
            notice(f"{len(checkpoints)} of {len(exports)} checkpoints: {text}")
