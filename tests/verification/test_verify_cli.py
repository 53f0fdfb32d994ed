"""`cogtools verify` as a command: its text, its JSON, its exit codes, and what it does not import."""

import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtools import verify_lora
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.layouts.folded import short_name
from cogtools.render.progress import Progress
from cogtools.render.verify import show_verification
from tests.support import factories
from tests.support.command_line import CommandLine, imported_by
from tests.support.damage import (
    DAMAGES,
    PLAIN_CHECKS,
    LoraFile,
    by_file,
    copy,
    good_lora,
    key,
    save_as_checkpoint,
    state,
    write,
)
from tests.support.loras import lora_keys

Edit = Callable[[LoraFile], object]


def lora(folder: Path, *edits: Edit) -> Path:
    """The good file, edited, in a folder."""
    write(folder / "good.bin", good_lora())
    (folder / "out").mkdir()
    by_file(*edits)(folder / "good.bin", folder / "out" / FILE_NAME)
    return folder / "out"


def damaged(name: str, folder: Path) -> Path:
    """The good file, damaged as the table says, in a folder."""
    (damage,) = (damage for damage in DAMAGES if damage.id == name)
    out = lora(folder)
    damage.apply(folder / "good.bin", out / FILE_NAME)
    return out


def called(name: str, text: str) -> Edit:
    """Call one tensor something else."""
    return copy(lambda _: text, name)


def test_a_good_file_is_told_check_by_check_with_the_verdict_last(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    out = lora(tmp_path)
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")

    assert cogtools_cli("verify", out, "--against", checkpoint) == (
        0,
        f"""\
file     {out}/pytorch_lora_weights.safetensors (28.8 kB), held against diffusers
model    CogVideoX of no published size: 3 layers, hidden size 128
LoRA     diffusers, 3 layers, rank 4, float16, effective scaling 0.25
against  {checkpoint}

pass     readable        24 tensors, the safetensors library reads it too
pass     names           all are diffusers' names
pass     complete        24 of 24 tensors of CogVideoX of no published size: 3 layers, hidden size 128, \
as the exporter's record says
pass     pairs           12 pairs
pass     shapes          (rank, 128) and (128, rank)
pass     rank            4 throughout
pass     dtype           float16
pass     finite          all values of 24 tensors
pass     untrained       no lora_B is zero
pass     constant        no lora_A is constant
pass     scale           scaling 0.25: alpha 1 / rank 4
pass     target_modules  12 names, full paths
pass     record          alpha 1 (scale: metadata), rank 4, float16, as exported
pass     against         24 tensors equal the checkpoint's bit for bit
pass     against-scale   scaling 0.25: alpha 1 (SAT's default) / rank 4

loaded by  diffusers >= 0.34: 12 modules of 12, the scale from the header; scaling 0.25, as trained
           diffusers < 0.34: 12 modules of 12, it reads no scale; scaling 1, 4 times as strong as trained
           kijai's ComfyUI-CogVideoXWrapper: 12 modules of 12, the scale from the header; scaling 0.25, as trained; \
with diffusers older than 0.34 at scaling 1
not by     PEFT, ComfyUI >= 0.20.1, VideoX-Fun, VideoX-Fun before November 2025, DiffSynth-Studio <= 1.1.9, SAT: \
these are diffusers' names

verified: all 15 checks passed
""",
        "",
    )


def test_a_wrong_file_is_told_with_what_is_missing(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    out = damaged("lone-a", tmp_path)

    assert cogtools_cli("verify", out, "--quiet") == (
        1,
        f"""\
file     {out}/pytorch_lora_weights.safetensors (27.6 kB), held against diffusers
model    CogVideoX of no published size: 3 layers, hidden size 128
LoRA     diffusers, 3 layers, rank 4, float16, effective scaling 0.25

fail     complete  23 of 24 tensors of CogVideoX of no published size: 3 layers, hidden size 128, \
as the exporter's record says
         missing: layer 1: to_q lora_B
         try: copy it again from where it came, or export it again from its checkpoint \
('mp_rank_00_model_states.pt', iteration 1000)
fail     pairs     1 tensor without a partner
         unpaired: layer 1: to_q lora_A (expected its partner beside it)

NOT verified: 2 of 13 checks failed (complete, pairs)
""",
        "",
    )


def test_quiet_says_nothing_of_a_file_that_is_verified(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    out = damaged("metadata-lost", tmp_path)

    assert cogtools_cli("verify", out, "--layers", "3", "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("damage", "options", "code", "last"),
    [
        ("metadata-lost", ["--layers", "3"], 0, "verified, with 1 warning (scale): 10 of 11 checks passed"),
        ("metadata-lost", ["--layers", "3", "--strict"], 1, "NOT verified: 1 of 11 checks failed (scale)"),
        ("nan", [], 1, "NOT verified: 1 of 13 checks failed (finite)"),
    ],
)
def test_the_last_line_is_the_verdict(
    cogtools_cli: CommandLine, damage: str, options: list[str], code: int, last: str, tmp_path: Path
) -> None:
    result = cogtools_cli("verify", damaged(damage, tmp_path), *options)

    assert (result.code, result.out.splitlines()[-1]) == (code, last)


def test_the_first_ten_of_many_problems_are_shown(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")

    shown = cogtools_cli("verify", damaged("other-step", tmp_path), "--against", checkpoint).out

    assert shown.count("value: ") == 10
    assert "         … and 14 more (--json lists all)\n" in shown


def test_what_to_do_is_told_once_under_the_checks_that_say_the_same(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    out = damaged("pair", tmp_path)

    shown = cogtools_cli("verify", out, "--layers", "4").out

    assert shown.count("try: ") == 1
    assert "         try: copy it again from where it came, or export it again from its checkpoint" in shown


def test_weights_that_are_there_too_are_a_note(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    state_dict = factories.sat_state_dict(factories.toy(factories.COGVIDEOX_2B), 4)
    checkpoint = factories.sat_checkpoint(state_dict)
    factories.save_run(tmp_path / "run", checkpoint, ema=checkpoint, rank=4)
    cogtools_cli("export-lora", tmp_path / "run", tmp_path / "out")
    words = ["verify", tmp_path / "out", "--against", tmp_path / "run"]
    note = "Held against the plain weights of iteration 1000, which the file's record names."

    shown, quiet, printed = cogtools_cli(*words), cogtools_cli(*words, "--quiet"), cogtools_cli(*words, "--json")

    assert (shown.code, shown.err) == (0, f"note: {note}\n")
    assert quiet == (0, "", "")
    assert (printed.err, printed.json["report"]["notices"]) == ("", [note])


def test_a_file_that_cannot_be_opened_is_an_error(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    out = damaged("cut-last-byte", tmp_path)

    result = cogtools_cli("verify", out)

    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[:2] == [
        "error: the file is cut short",
        f"  file:      {out}/pytorch_lora_weights.safetensors",
    ]


# --- a terminal -----------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Text that thinks it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_is_told_what_takes_long_and_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    with Progress("verifying") as progress:
        progress.say("loading")
        deadline = time.monotonic() + 120
        while "loading" not in terminal.getvalue():  # rich draws it in a thread
            assert time.monotonic() < deadline
            time.sleep(0.01)
        progress.update(1, 2)
    with Progress("verifying", hidden=True) as progress:
        before = terminal.getvalue()
        progress.say("loading")

    assert terminal.getvalue() == before


def shown_on_a_terminal(out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    show_verification(verify_lora(out))
    return terminal.getvalue()


def test_a_terminal_gets_a_table_in_colour_unless_it_wants_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = lora(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = shown_on_a_terminal(out, monkeypatch)
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown_on_a_terminal(out, monkeypatch)

    assert "\x1b[32mpass" in coloured
    assert "\x1b[32m" not in plain
    lines = [line.rstrip() for line in re.sub(r"\x1b\[\d*m", "", plain).splitlines()]
    assert [line.split()[0] for line in lines if " pass " in line] == list(PLAIN_CHECKS)
    assert lines[-1] == "verified: all 13 checks passed"


def test_nothing_that_the_file_says_acts_on_the_terminal(
    cogtools_cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "[bold red]lora_\x1b[2J\u202e[/]"
    out = lora(tmp_path, called(key(0, "to_q", "A"), hostile), state(target_modules=[hostile]))

    piped = cogtools_cli("verify", out).out
    table = shown_on_a_terminal(out, monkeypatch)

    for shown in (piped, table):
        assert "\x1b[2J" not in shown
        assert "\u202e" not in shown
        assert r"[bold red]lora_\x1b[2J\u202e[/]" in shown


# --- JSON -----------------------------------------------------------------------------------------


def test_json_holds_every_check_under_every_outcome(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    outcomes = {}
    for damage in DAMAGES:
        (tmp_path / damage.id).mkdir()
        out = damaged(damage.id, tmp_path / damage.id)
        result = cogtools_cli("verify", out, "--layers", "3", "--json")
        report = result.json.get("report", {"verdict": "error"})
        outcomes[damage.id] = (result.code, result.json["status"], report["verdict"], result.err)
        if "checks" in report:
            assert tuple(check["name"] for check in report["checks"]) == PLAIN_CHECKS

    results = {
        "pass": (0, "ok", "pass", ""),
        "warn": (0, "ok", "warn", ""),
        "fail": (1, "wrong", "fail", ""),
        "error": (2, "error", "error", ""),
    }
    assert outcomes == {damage.id: results[damage.plain] for damage in DAMAGES}


def test_json_lists_what_the_text_leaves_out(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    report = cogtools_cli("verify", lora(tmp_path), "--model", "2b", "--json").json["report"]

    (shapes,) = [check for check in report["checks"] if check["name"] == "shapes"]
    assert len(shapes["problems"]) == 2
    assert sorted(key for problem in shapes["problems"] for key in problem["keys"]) == sorted(
        key(layer, short_name(name.name), name.part) for layer in range(3) for name in lora_keys((layer,))
    )


def test_json_names_the_checkpoint_and_the_libraries(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")

    result = cogtools_cli("verify", lora(tmp_path), "--against", checkpoint, "--load", "--strict", "--json")
    report = result.json["report"]

    assert (result.code, report["against"], report["strict"]) == (0, str(checkpoint), True)
    assert set(report["libraries"]) == {"diffusers", "peft"}


@pytest.mark.parametrize("arguments", [["missing"], [], ["missing", "--model", "3b"], ["missing", "--no-such-option"]])
def test_json_is_printed_for_what_cannot_be_done(
    cogtools_cli: CommandLine, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    result = cogtools_cli("verify", *arguments, "--json")

    assert (result.code, result.json["command"], result.json["status"], result.err) == (2, "verify", "error", "")


# --- what is not imported -------------------------------------------------------------------------


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_torch_diffusers_and_rich_are_not_imported(with_checkpoint: bool, tmp_path: Path) -> None:
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")
    options: list[str | Path] = ["--against", checkpoint] if with_checkpoint else []

    assert imported_by("verify", lora(tmp_path), *options) == {"safetensors", "numpy"}
