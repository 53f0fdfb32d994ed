"""What `verify` says: a line or a table row per check, what is wrong under it, and the verdict last."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from cogtools.errors import SHOWN_PROBLEMS
from cogtools.formatting import number
from cogtools.render.text import emit, is_terminal, notice, printable, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.errors import Hint
    from cogtools.verification.report import Check, VerifyReport

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skipped": "dim"}


def show_verification(report: VerifyReport, *, quiet: bool = False) -> None:
    """Print the checks and the verdict; if quiet, only what is wrong."""
    for text in () if quiet else report.notices:
        notice(text)
    checks = [check for check in report.checks if not quiet or check.status == "fail"]
    if quiet and not checks:
        return
    if is_terminal(sys.stdout):
        _show_table(report, checks)
    else:
        emit("\n".join(printable(line) for line in [*_about(report), "", *_lines(checks), "", verdict_line(report)]))


def _about(report: VerifyReport) -> list[str]:
    rank = ", ".join(map(str, report.rank)) or "unknown"
    scaling = ", ".join(map(number, report.scaling)) or "unknown"
    dtype = ", ".join(report.dtype) or "none"
    lora = f"{report.layout}, {len(report.layers)} layers, rank {rank}, {dtype}, effective scaling {scaling}"
    rows = [("file", f"{report.path} ({size(report.size_bytes)})")]
    rows += [("model", report.model), ("LoRA", lora)] if report.layers else [("LoRA", "none")]
    if report.against is not None:
        rows.append(("against", str(report.against)))
    return [f"{name:<8} {value}" for name, value in rows]


def _lines(checks: list[Check]) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check, under in _with_details(checks):
        lines.append(f"{check.status:<8} {check.name:<{width}}  {check.seen}")
        lines += [" " * 9 + text for text in under]
    return lines


def _with_details(checks: list[Check]) -> Iterator[tuple[Check, list[str]]]:
    """Every check, and the lines under it: what is wrong, the first ones of many, and what to do, each hint once."""
    hints: set[Hint] = set()
    for check in checks:
        lines = [str(problem) for problem in check.problems[:SHOWN_PROBLEMS]]
        more = len(check.problems) - SHOWN_PROBLEMS
        if more > 0:
            lines.append(f"… and {more:,} more (--json lists all)")
        if check.hint is not None and check.hint not in hints:
            hints.add(check.hint)
            lines.append(f"try: {check.hint}")
        yield check, lines


def verdict_line(report: VerifyReport) -> str:
    """The verdict in one line."""
    of = {status: [check.name for check in report.checks if check.status == status] for status in _STYLES}
    done = len(report.checks) - len(of["skipped"])
    if report.verdict == "fail":
        return f"NOT verified: {len(of['fail'])} of {done} checks failed ({', '.join(of['fail'])})"
    if report.verdict == "warn":
        warnings = f"{len(of['warn'])} warning{'s' if len(of['warn']) > 1 else ''} ({', '.join(of['warn'])})"
        return f"verified, with {warnings}: {len(of['pass'])} of {done} checks passed"
    return f"verified: all {done} checks passed"


def _show_table(report: VerifyReport, checks: list[Check]) -> None:
    """The same on a terminal: a table, and under it what is wrong. In `Text`, rich reads no markup of the file's."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("seen", overflow="fold")
    for check in checks:
        status = Text(check.status, style=_STYLES[check.status])
        table.add_row(Text(check.name), status, Text(printable(check.seen)))
    console = Console(highlight=False, soft_wrap=True)
    for line in _about(report):
        console.print(Text(printable(line)))
    console.print()
    console.print(table, soft_wrap=False)
    console.print()
    for check, under in _with_details(checks):
        if under:
            console.print(Text(check.name, style=_STYLES[check.status]))
        # Not wrapped: a command that is broken into lines cannot be pasted.
        for line in under:
            console.print(Text(f"  {printable(line)}"))
        if under:
            console.print()
    console.print(Text(printable(verdict_line(report)), style=_STYLES[report.verdict]))
