"""Lines of text: plain in a pipe, without rich; drawn by rich on a terminal, whatever its width is said to be."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch

import cogtools
from cogtools.errors import CheckpointError
from cogtools.inspection.inspect import inspect_checkpoint
from cogtools.inspection.report import UpdateReport
from cogtools.render import text
from cogtools.render.heat_map import heat_map_lines
from cogtools.render.lines import Line, Output
from cogtools.render.screen import DEFAULT_WIDTH, MIN_WIDTH, Screen
from tests.support.command_line import CommandLine, on_terminal, run_python


class Terminal(io.StringIO):
    """Text that thinks it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 60 columns with 256 colours."""
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    return Terminal()


LINES: list[str | Line] = [
    "plain [bold]and[/bold] \x1b[2J",
    Line(("label ", "cyan"), "[red]no markup[/] \u202e", (" end", "bold red")),
    Line(("0:  ", "bold"), ("many words, and then a number: 118.0 MB of them, which has a unit", "magenta"), wrap=True),
]


def test_a_pipe_gets_the_texts_of_lines_and_nothing_acts_on_it() -> None:
    assert Output().draw(LINES) == (
        "plain [bold]and[/bold] \\x1b[2J\n"
        "label [red]no markup[/] \\u202e end\n"
        "0:  many words, and then a number: 118.0 MB of them, which has a unit"
    )


def test_a_terminal_gets_styles_and_what_is_wrapped_goes_on_under_itself(terminal: Terminal) -> None:
    screen = Screen(terminal)
    screen.console.width = 40
    assert screen.draw(LINES) == (
        "plain [bold]and[/bold] \\x1b[2J\n"
        "\x1b[36mlabel \x1b[0m[red]no markup[/] \\u202e\x1b[1;31m end\x1b[0m\n"
        "\x1b[1m0:  \x1b[0m\x1b[35mmany words, and then a number:\x1b[0m\n"
        "    \x1b[35m118.0 MB of them, which has a unit\x1b[0m"
    )


@pytest.mark.parametrize(
    ("environment", "codes"),
    [({"NO_COLOR": "1"}, {"\x1b[1m", "\x1b[0m"}), ({"TERM": "dumb"}, set())],
    ids=["NO_COLOR", "dumb"],
)
def test_rich_decides_about_colours(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], codes: set[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    drawn = Screen(terminal).draw(LINES)
    assert set(re.findall(r"\x1b\[[\d;]*m", drawn)) == codes


def test_columns_are_those_of_the_terminal(terminal: Terminal) -> None:
    screen = Screen(terminal)
    assert [screen.pad(key, 6) + "|" for key in ("abc", "…bc", "层权", "e\u0301te")] == [
        *("abc   |", "…bc   |", "层权  |", "e\u0301te   |")
    ]
    assert Output().pad("层权", 6) == "层权    "


# The width


@pytest.mark.parametrize(("columns", "width"), [("0", DEFAULT_WIDTH), ("1", MIN_WIDTH), ("39", MIN_WIDTH), ("41", 41)])
def test_a_width_has_a_lower_bound(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    screen = Screen(terminal)
    assert (screen.width, screen.console.width) == (width, width)


@pytest.mark.parametrize("columns", ["0", "1"])
def test_no_columns_lose_no_text(run_folder: Path, tmp_path: Path, columns: str) -> None:
    cogtools.export_lora(run_folder, tmp_path / "out")
    verified: list[str | Path] = ["verify", tmp_path / "out"]
    narrow, wide = (on_terminal(200, *verified, COLUMNS=given, NO_COLOR="1") for given in (columns, "200"))
    assert "".join(narrow.split()) == "".join(wide.split())

    shown = on_terminal(200, "inspect", run_folder, "--lora", "--stats", COLUMNS=columns, NO_COLOR="1")
    assert (shown.count("float16  (4, 128)"), shown.count("float16  (128, 4)"), shown.count("mean")) == (12, 12, 24)


# Errors and notices


def test_an_error_on_a_terminal_has_styles_and_its_fields_stay_whole(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    text.notice("A notice.")
    text.error(CheckpointError("it is [bold]not[/] good", file="a\x1bb", found="x " * 50))
    assert terminal.getvalue() == (
        "\x1b[33mnote:\x1b[0m A notice.\n"
        "\x1b[1;31merror:\x1b[0m \x1b[1mit is [bold]not[/] good\x1b[0m\n"
        "  file:      a\\x1bb\n"
        f"  found:     {'x ' * 50}\n"
    )


def test_an_error_is_printed_without_rich_where_that_is_missing(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "cogtools.render.screen", None)
    text.error(CheckpointError("this needs rich, which is not installed"))
    assert terminal.getvalue() == "error: this needs rich, which is not installed\n"


def test_an_error_and_a_notice_into_a_pipe_do_not_import_rich(run_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from cogtools.cli import run\n"
        "print(run(['export-lora', *sys.argv[1:]]), run(['inspect', 'nowhere']), 'rich' in sys.modules)"
    )
    done = run_python(code, run_folder, tmp_path / "out")
    assert done.out.splitlines()[-1] == "0 2 False"
    assert [line.partition(":")[0] for line in done.err.splitlines() if line[0] != " "] == ["note", "note", "error"]


# inspect


def test_in_a_pipe_a_key_is_one_word_whatever_it_is(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    keys = ["a b", "", " ", "  x", "tab\there", "nbsp\u00a0here", "line\u2028here", "\u3000", "plain"]
    torch.save({"module": {key: torch.ones(place + 1) for place, key in enumerate(keys)}}, tmp_path / "a.pt")
    table = cogtools_cli("inspect", tmp_path / "a.pt").out.partition("\nkey ")[2].splitlines()[1:]
    by_place = sorted((line.split() for line in table), key=lambda words: int(words[3]))
    assert {len(words) for words in by_place} == {5}
    assert [words[0] for words in by_place] == [
        *("a\\x20b", '""', "\\x20", "\\x20\\x20x", "tab\\there", "nbsp\\xa0here", "line\\u2028here", "\\u3000", "plain")
    ]


def test_the_heat_map_has_a_column_for_each_kind_of_module_that_there_is(run_folder: Path) -> None:
    lora = inspect_checkpoint(run_folder).lora
    assert lora is not None
    updates = [
        UpdateReport(0, "ff_in", 0.5, 2.0, 1.5),
        UpdateReport(0, "out", not_computed="one factor only"),
        UpdateReport(3, "ff_in", 0.5, 1.0, 3.0),
    ]
    assert Output().draw(heat_map_lines(lora, updates)) == (
        "norm of scaling * B A (scaling 0.5), and effective rank (at most 4)\n"
        "layer       out    ff_in        out    ff_in\n"
        "    0         -        2          -      1.5\n"
        "    3         -        1          -      3.0\n"
        "not computed: 1 module with one factor only (layer 0: out)"
    )
