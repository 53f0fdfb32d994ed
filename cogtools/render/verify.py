"""What `verify` prints: a line for each check, what is wrong with the file, and the verdict last."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cogtools.errors import SHOWN_PROBLEMS
from cogtools.formatting import first_of, number, size
from cogtools.render.lines import Line
from cogtools.render.readers import reader_lines
from cogtools.render.text import emit, notice, output_of
from cogtools.verification.model_report import ModelVerifyReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.errors import Hint
    from cogtools.verification.report import Check, VerifyReport

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def show_verification(report: VerifyReport | ModelVerifyReport, *, quiet: bool = False) -> None:
    """Print the checks and the verdict; if quiet, only what is wrong."""
    for text in () if quiet else report.notices:
        notice(text)
    checks = [check for check in report.checks if not quiet or check.status == "fail"]
    if quiet and not checks:
        return
    output = output_of(sys.stdout)
    lines = _piped(checks) if output.width is None else _on_terminal(checks)
    verdict = Line((verdict_line(report), _STYLES[report.verdict]))
    about = _about_model(report) if isinstance(report, ModelVerifyReport) else _about(report)
    readers = () if quiet or isinstance(report, ModelVerifyReport) else _readers(report)
    emit(output.draw([*about, "", *lines, "", *readers, verdict]))


def _about(report: VerifyReport) -> list[str]:
    rank = ", ".join(map(str, report.rank)) or "unknown"
    scaling = ", ".join(map(number, report.scaling)) or "unknown"
    dtype = ", ".join(report.dtype) or "none"
    lora = f"{report.layout}, {len(report.layers)} layers, rank {rank}, {dtype}, effective scaling {scaling}"
    rows = [("file", f"{report.path} ({size(report.size_bytes)}), held against {report.reader}")]
    rows += [("model", report.model), ("LoRA", lora)] if report.layers else [("LoRA", "none")]
    if report.against is not None:
        rows.append(("against", str(report.against)))
    return [f"{name:<8} {value}" for name, value in rows]


_KINDS = {
    "pipeline": "a pipeline",
    "parts": "parts of a pipeline, without model_index.json",
    "part": "one part",
    "file": "a file of weights",
    "sat": "for SAT",
}


def _about_model(report: ModelVerifyReport) -> list[str]:
    rows = [("path", f"{report.path} ({size(report.size_bytes)})"), ("kind", _KINDS[report.kind])]
    rows += [("model", report.model)] if report.model is not None else []
    rows.append(("parts", ", ".join(report.parts)))
    rows += [("against", str(report.against))] if report.against is not None else []
    return [f"{name:<8} {value}" for name, value in rows]


def _readers(report: VerifyReport) -> Iterator[Line]:
    """Who loads the file."""
    for label, text in reader_lines(report.readers):
        yield Line(f"{label:<10} ", text, wrap=True)
    if report.readers:
        yield Line("")


def _piped(checks: list[Check]) -> Iterator[str]:
    """A line for each check, and what is wrong under it."""
    width = max(len(check.name) for check in checks)
    for check, under in _with_details(checks):
        yield f"{check.status:<8} {check.name:<{width}}  {check.seen}"
        yield from (" " * 9 + text for text in under)


def _on_terminal(checks: list[Check]) -> Iterator[str | Line]:
    """A table of the checks, and what is wrong under it: lines that are not wrapped, since commands are copied."""
    width = max(len(check.name) for check in checks)
    yield Line((f"{'check':<{width}}  status   seen", "bold"))
    for check in checks:
        yield Line(f"{check.name:<{width}}  ", (f"{check.status:<9}", _STYLES[check.status]), check.seen, wrap=True)
    for check, under in _with_details(checks):
        if under:
            yield ""
            yield Line((check.name, _STYLES[check.status]))
            yield from (f"  {text}" for text in under)


def _with_details(checks: list[Check]) -> Iterator[tuple[Check, list[str]]]:
    """Every check with the first of its problems, and what to do about them; each hint comes once."""
    hints: set[Hint] = set()
    for check in checks:
        lines = first_of([str(problem) for problem in check.problems], SHOWN_PROBLEMS)
        if check.hint is not None and check.hint not in hints:
            hints.add(check.hint)
            lines.append(f"try: {check.hint}")
        yield check, lines


def verdict_line(report: VerifyReport | ModelVerifyReport) -> str:
    """The verdict in one line."""
    of = {status: [check.name for check in report.checks if check.status == status] for status in _STYLES}
    done = len(report.checks) - len(of["skipped"])
    if report.verdict == "fail":
        return f"NOT verified: {len(of['fail'])} of {done} checks failed ({', '.join(of['fail'])})"
    if report.verdict == "warn":
        warnings = f"{len(of['warn'])} warning{'s' if len(of['warn']) > 1 else ''} ({', '.join(of['warn'])})"
        return f"verified, with {warnings}: {len(of['pass'])} of {done} checks passed"
    return f"verified: all {done} checks passed"
