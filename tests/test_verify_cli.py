"""`cogtools verify` as a command: its text, its JSON, its exit codes, and what it does not import."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource

from cogtools import verify_lora
from cogtools.cli import run
from cogtools.layouts.cogvideox import lora_keys
from cogtools.layouts.diffusers import MODULES
from cogtools.render.progress import Progress
from cogtools.render.verify import show_verification
from tests import factories
from tests.damage import DAMAGES, LoraFile, by_file, copy, good_lora, key, state, write
from tests.test_verify import NAME, PLAIN_CHECKS, save_as_checkpoint

Edit = Callable[[LoraFile], object]


def lora(folder: Path, *edits: Edit) -> Path:
    """The good file, edited, in a folder."""
    write(folder / "good.bin", good_lora())
    (folder / "out").mkdir()
    by_file(*edits)(folder / "good.bin", folder / "out" / NAME)
    return folder / "out"


def damaged(name: str, folder: Path) -> Path:
    """The good file, damaged as the table says, in a folder."""
    (damage,) = (damage for damage in DAMAGES if damage.id == name)
    out = lora(folder)
    damage.apply(folder / "good.bin", out / NAME)
    return out


def called(name: str, text: str) -> Edit:
    """Call one tensor something else."""
    return copy(lambda _: text, name)


def test_a_good_file_is_told_check_by_check_with_the_verdict_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = lora(tmp_path)
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")

    code = run(["verify", str(out), "--against", str(checkpoint)])

    assert (code, capsys.readouterr()) == (
        0,
        (
            f"""\
file     {out}/pytorch_lora_weights.safetensors (28.8 kB)
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

verified: all 15 checks passed
""",
            "",
        ),
    )


def test_a_wrong_file_is_told_with_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = damaged("lone-a", tmp_path)

    code = run(["verify", str(out), "--quiet"])

    assert (code, capsys.readouterr()) == (
        1,
        (
            f"""\
file     {out}/pytorch_lora_weights.safetensors (27.6 kB)
model    CogVideoX of no published size: 3 layers, hidden size 128
LoRA     diffusers, 3 layers, rank 4, float16, effective scaling 0.25

fail     complete  23 of 24 tensors of CogVideoX of no published size: 3 layers, hidden size 128, \
as the exporter's record says
         missing: layer 1: to_q lora_B
         try: cogtools export-lora CHECKPOINT {out}/pytorch_lora_weights.safetensors --overwrite
fail     pairs     1 tensor without a partner
         alone: layer 1: to_q lora_A (expected its partner beside it)

NOT verified: 2 of 13 checks failed (complete, pairs)
""",
            "",
        ),
    )


def test_quiet_says_nothing_of_a_file_that_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(damaged("metadata-lost", tmp_path)), "--layers", "3", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("damage", "options", "code", "last"),
    [
        ("metadata-lost", ["--layers", "3"], 0, "verified, with 1 warning (scale): 10 of 11 checks passed"),
        ("metadata-lost", ["--layers", "3", "--strict"], 1, "NOT verified: 1 of 11 checks failed (scale)"),
        ("nan", [], 1, "NOT verified: 1 of 13 checks failed (finite)"),
    ],
)
def test_the_last_line_is_the_verdict(
    damage: str, options: list[str], code: int, last: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(damaged(damage, tmp_path)), *options]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_the_first_ten_of_many_problems_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = damaged("other-step", tmp_path)
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")

    run(["verify", str(out), "--against", str(checkpoint)])

    shown = capsys.readouterr().out
    assert shown.count("value: ") == 10
    assert "         … and 14 more (--json lists all)\n" in shown


def test_what_to_do_is_told_once_under_the_checks_that_say_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = damaged("pair", tmp_path)

    run(["verify", str(out), "--layers", "4"])

    shown = capsys.readouterr().out
    assert shown.count("try: ") == 1
    assert (
        f"         try: cogtools export-lora CHECKPOINT {out}/pytorch_lora_weights.safetensors --overwrite\n" in shown
    )


def test_weights_that_are_there_too_are_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state_dict = factories.sat_state_dict(factories.toy(factories.COGVIDEOX_2B), 4)
    checkpoint = factories.sat_checkpoint(state_dict)
    factories.save_run(tmp_path / "run", checkpoint, ema=checkpoint, rank=4)
    run(["export-lora", str(tmp_path / "run"), str(tmp_path / "out")])
    capsys.readouterr()
    arguments = ["verify", str(tmp_path / "out"), "--against", str(tmp_path / "run")]
    note = "Took the plain weights of iteration 1000; 1000-ema is there too (with --ema)."

    assert run(arguments) == 0
    assert capsys.readouterr().err == f"note: {note}\n"
    assert run([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert printed_json(arguments[1:], capsys)[1]["report"]["notices"] == [note]


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = damaged("cut-last-byte", tmp_path)

    assert run(["verify", str(out)]) == 2
    assert capsys.readouterr().err.splitlines()[:2] == [
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
        deadline = time.monotonic() + 10
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "[bold red]lora_\x1b[2J\u202e[/]"
    out = lora(tmp_path, called(key(0, "to_q", "A"), hostile), state(target_modules=[hostile]))

    run(["verify", str(out)])
    piped = capsys.readouterr().out
    table = shown_on_a_terminal(out, monkeypatch)

    for shown in (piped, table):
        assert "\x1b[2J" not in shown
        assert "\u202e" not in shown
        assert r"[bold red]lora_\x1b[2J\u202e[/]" in shown


# --- JSON -----------------------------------------------------------------------------------------


def schema(name: str) -> dict[str, Any]:
    text = resources.files("cogtools.schemas").joinpath(name).read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def validate(printed: object) -> None:
    error = schema("error.json")
    registry: Registry[Any] = Registry().with_resource(error["$id"], Resource.from_contents(error))
    jsonschema.Draft202012Validator(schema("verify.json"), registry=registry).validate(printed)


def printed_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = run(["verify", *arguments, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    printed: dict[str, Any] = json.loads(out)
    validate(printed)
    return code, printed


def test_json_holds_every_check_under_every_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {}
    for damage in DAMAGES:
        (tmp_path / damage.id).mkdir()
        out = damaged(damage.id, tmp_path / damage.id)
        code, printed = printed_json([str(out), "--layers", "3"], capsys)
        report = printed.get("report", {"verdict": "error"})
        outcomes[damage.id] = (code, printed["status"], report["verdict"])
        if "checks" in report:
            assert tuple(check["name"] for check in report["checks"]) == PLAIN_CHECKS

    results = {"pass": (0, "ok", "pass"), "warn": (0, "ok", "warn"), "fail": (1, "wrong", "fail")}
    results["error"] = (2, "error", "error")
    assert outcomes == {damage.id: results[damage.plain] for damage in DAMAGES}


def test_json_lists_what_the_text_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = printed_json([str(lora(tmp_path)), "--model", "2b"], capsys)

    (shapes,) = [check for check in printed["report"]["checks"] if check["name"] == "shapes"]
    assert len(shapes["problems"]) == 2
    assert sorted(key for problem in shapes["problems"] for key in problem["keys"]) == sorted(
        key(name.layer, MODULES[name.projection].removeprefix("attn1."), name.factor) for name in lora_keys(range(3))
    )


def test_json_names_the_checkpoint_and_the_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")

    code, printed = printed_json([str(lora(tmp_path)), "--against", str(checkpoint), "--load", "--strict"], capsys)

    assert (code, printed["report"]["against"], printed["report"]["strict"]) == (0, str(checkpoint), True)
    assert set(printed["report"]["libraries"]) == {"diffusers", "peft"}


@pytest.mark.parametrize("arguments", [["missing"], [], ["missing", "--model", "3b"], ["missing", "--no-such-option"]])
def test_json_is_printed_for_what_cannot_be_done(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    code, printed = printed_json(arguments, capsys)

    assert (code, printed["command"], printed["status"]) == (2, "verify", "error")


# --- what is not imported -------------------------------------------------------------------------


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_torch_diffusers_and_rich_are_not_imported(with_checkpoint: bool, tmp_path: Path) -> None:
    out = lora(tmp_path)
    checkpoint = save_as_checkpoint(good_lora(), tmp_path / "checkpoint.pt")
    arguments = ["verify", str(out), *(["--against", str(checkpoint)] if with_checkpoint else [])]
    program = (
        "import sys; from cogtools.cli import run; code = run(sys.argv[1:]); "
        "print({'torch', 'diffusers', 'peft', 'rich'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )

    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)

    assert done.stderr == "set()\n"
