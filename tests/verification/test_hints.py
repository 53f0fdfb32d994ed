"""Hints that are commands: each is run on the file that caused it. It helps, or ends with the next cause."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogtools import export_lora, verify_lora
from cogtools.errors import CogtoolsError, Hint
from cogtools.layouts.diffusers import FILE_NAME
from tests.support.command_line import CommandLine
from tests.support.damage import DAMAGES, EXPRESSIONS, Damage, good_lora, unrecord, write

HINTED = [*DAMAGES, *EXPRESSIONS]


def damaged(damage: Damage, folder: Path, *, of_cogtools: bool) -> Path:
    """The good file, damaged; as another program would have written it, or cogtools."""
    file = good_lora()
    if not of_cogtools:
        unrecord(file)
    write(folder / "good.bin", file)
    (folder / "out").mkdir()
    damage.apply(folder / "good.bin", folder / "out" / FILE_NAME)
    (folder / "good.bin").unlink()
    return folder / "out" / FILE_NAME


def hints_of(path: Path) -> Iterator[tuple[str, Hint]]:
    """Every hint that verify and export-lora have for a file, and what it is about."""
    try:
        for check in verify_lora(path, layers=3).checks:
            if check.hint is not None:
                yield f"{check.name}: {check.seen}", check.hint
    except CogtoolsError as error:
        if error.hint is not None:
            yield error.what, error.hint
    try:
        export_lora(path, path.parent / "never", dry_run=True)
    except CogtoolsError as error:
        if error.hint is not None:
            yield error.what, error.hint


@pytest.mark.slow
@pytest.mark.parametrize("of_cogtools", [True, False], ids=["cogtools", "others"])
@pytest.mark.parametrize("damage", HINTED, ids=lambda damage: damage.id)
def test_a_hint_that_is_a_command_helps_or_names_the_next_cause(
    damage: Damage, of_cogtools: bool, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    path = damaged(damage, tmp_path, of_cogtools=of_cogtools)
    before = path.read_bytes()

    for number, (about, hint) in enumerate(list(hints_of(path))):
        if hint.command is None:
            continue
        program, *words = shlex.split(hint.command)
        assert of_cogtools or "--overwrite" not in words  # it may be the only copy
        assert program == "cogtools"
        assert "CHECKPOINT" not in words
        result = cogtools_cli(*(word.replace("OUT_DIR", str(tmp_path / f"new-{number}")) for word in words))
        assert path.read_bytes() == before, hint
        if words[0] == "verify":  # which finds the same, and settles it
            assert result.code in (0, 1)
            assert " load " in result.out
        elif result.code:
            assert result.code == 2, hint
            assert about not in result.err
            assert shlex.join(words) not in result.err, "a circle"
