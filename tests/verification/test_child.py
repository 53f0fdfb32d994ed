"""A question to a fresh process: its answer, its limits, its end."""

import sys
from pathlib import Path

import pytest

from cogtools.errors import CogtoolsError, KilledError, LibraryError, Problem
from cogtools.verification import child


@pytest.fixture(autouse=True)
def loads_in_this_process() -> None:
    """Not here."""


def ask(deed: str, **more: object) -> dict[str, object]:
    return child.ask("tests.support.children", {"do": deed, **more}, "doing it")


def test_what_it_prints_does_not_get_into_the_answer() -> None:
    assert ask("talk") == {"done": "talked", "question": {"do": "talk"}}


def test_a_text_that_is_not_unicode_is_asked_and_answered_as_it_is() -> None:
    text = b"\xff.safetensors".decode(errors="surrogateescape")

    assert ask("talk", path=text)["question"] == {"do": "talk", "path": text}


def test_it_imports_from_where_this_process_does_and_not_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)

    assert ask("path")["done"] == [str(tmp_path), sys.path]


def test_one_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "TIME_LIMIT_SECONDS", 1)

    with pytest.raises(KilledError, match=r"^doing it was stopped: it had not ended after 1 seconds\n"):
        ask("hang")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is looked at in /proc")
def test_one_that_takes_too_much_memory_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "MEMORY_LIMIT_BYTES", 500_000_000)

    with pytest.raises(KilledError, match=r"^doing it was stopped: it took more than 0\.5 GB of memory\n"):
        ask("take memory")


@pytest.mark.parametrize(
    ("deed", "what", "found"),
    [
        ("die", "doing it was ended by SIGKILL", None),
        ("fail", "doing it ended without an answer", "ValueError: no answer to that"),
        ("exit", "doing it ended without an answer", "exit code 3"),
        ("exit beneath Python", "doing it ended without an answer", "exit code 1"),
    ],
)
def test_one_that_ends_without_an_answer_is_an_error(deed: str, what: str, found: str | None) -> None:
    with pytest.raises(KilledError) as error:
        ask(deed)

    assert (error.value.what, error.value.found) == (what, found)


def test_an_error_that_the_user_can_act_on_is_one_here() -> None:
    with pytest.raises(LibraryError) as error:
        ask("refuse")

    problem = Problem("rank", "q", keys=("k",))
    expected = LibraryError("no", file="x", found="a", expected="b", hint="c", problems=[problem])
    assert error.value.to_dict() == expected.to_dict()
    assert error.value.problems == (problem,)


@pytest.mark.parametrize(
    ("deed", "what"),
    [
        ("need", "this needs not_there, which is not installed"),
        ("be short", "not enough memory"),
        ("be short beneath Python", "not enough memory"),
    ],
)
def test_what_it_lacks_is_said(deed: str, what: str) -> None:
    with pytest.raises(CogtoolsError) as error:
        ask(deed)

    assert error.value.what == what
