"""The command line: what it prints where, how it ends, and that it starts without what it does not need."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cogtools
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.render.lines import printable
from tests.support.command_line import CommandLine, imported_by, program, run_program, run_python, surroundings
from tests.support.factories import TOY_2B, sat_state_dict

# The result


def test_export_says_what_it_found_and_wrote_and_how_to_load_it(
    cogtools_cli: CommandLine, run_folder: Path, tmp_path: Path
) -> None:
    result = cogtools_cli("export-lora", run_folder, tmp_path / "out")
    out = tmp_path / "out"
    assert (result.code, result.out) == (
        0,
        "model     CogVideoX of no published size: 3 layers, hidden size 128\n"
        "LoRA      3 layers, 12 modules, rank 4, float16\n"
        "alpha     1 (SAT's default), scaling 1/4 = 0.25, stated in the header\n"
        f"written   {out / FILE_NAME}: 24 tensors, float16, 28.6 kB\n"
        "checked   the CRC-32s of the weights that were read\n"
        "\n"
        "Load it at weight 1.0: the scale is already in the file (no set_adapters or fuse_lora with 1/rank):\n"
        f'    pipe.load_lora_weights("{out}", weight_name="{FILE_NAME}", adapter_name="lora")\n'
        f"Check every value of it (or export with --verify): cogtools verify {out / FILE_NAME} --against "
        f"{run_folder / '1000' / 'mp_rank_00_model_states.pt'}\n",
    )
    assert result.err == (
        "note: training_config.yaml sets no lora_alpha, so alpha is 1, SAT's default.\n"
        "note: The scale is stated in the file's header, which diffusers reads from 0.34 on. "
        "For older ones, export with --scale fold; for other programs, with --format.\n"
    )


def test_an_export_without_its_scale_says_at_what_weight_to_load_it(
    cogtools_cli: CommandLine, run_folder: Path, tmp_path: Path
) -> None:
    result = cogtools_cli("export-lora", run_folder, tmp_path / "a.safetensors", "--scale", "none", "--alpha", "2")
    assert result.out.splitlines()[-4:-1] == [
        "Load it and apply the scale:",
        f'    pipe.load_lora_weights("{tmp_path}", weight_name="a.safetensors", adapter_name="lora")',
        '    pipe.set_adapters("lora", 0.5)',
    ]
    assert result.err == "note: The file does not carry its scale: the loader must apply it itself, as weight 0.5.\n"


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize("words", ["verify nowhere --json", "inspect {run}", "inspect {run} --json", "verify {out}"])
def test_a_result_that_cannot_be_printed_is_an_error_in_one_line(
    run_folder: Path, tmp_path: Path, words: str, redirection: str
) -> None:
    cogtools.export_lora(run_folder, tmp_path / "out")
    line = words.format(run=run_folder, out=tmp_path / "out")
    command = ["sh", "-c", f"{sys.executable} -m cogtools {line} {redirection}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: the result cannot be printed: ")


def test_help_that_cannot_be_printed_is_an_error_like_others() -> None:
    command = ["sh", "-c", f"{sys.executable} -m cogtools --help >/dev/full"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    error = "error: the result cannot be printed: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, error)


def test_notes_that_nobody_can_hear_are_no_hindrance(run_folder: Path, tmp_path: Path) -> None:
    command = ["sh", "-c", f"{sys.executable} -m cogtools export-lora {run_folder} {tmp_path / 'out'} 2>&-"]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=False).returncode == 0
    assert len(load_file(tmp_path / "out" / FILE_NAME)) == 24


def test_an_interruption_before_the_command_runs_is_told_like_a_later_one(
    cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cogtools.cli.main.app", interrupt)
    result = cogtools_cli("inspect", "a.pt")
    assert (result.code, result.out, result.err) == (130, "", "interrupted: nothing was left half-written\n")


def test_text_of_any_length_is_printed_inert() -> None:
    assert printable("a\x1b[31m\u202eb\udcff" * 5000) == r"a\x1b[31m\u202eb\udcff" * 5000
    assert printable("naïve 猫 😀") == "naïve 猫 😀"


@pytest.mark.parametrize("words", ["verify {out} --load", "export-lora {run} {out}2 --scale fold"])
def test_a_library_that_is_missing_is_named(run_folder: Path, tmp_path: Path, words: str) -> None:
    cogtools.export_lora(run_folder, tmp_path / "out")
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "torch.py").write_text("raise ModuleNotFoundError('not here', name='torch')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path / 'libraries')!r}]; from cogtools.__main__ import main; main()"
    line = words.format(run=run_folder, out=tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False)
    message = "error: this needs torch, which is not installed\n  try:       pip install torch\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_a_bug_shows_its_traceback_and_never_ends_as_found_wrong() -> None:
    code = "from cogtools import cli, __main__; cli.run = lambda _: 1 / 0; __main__.main()"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "ZeroDivisionError: division by zero",
        "This is a bug in cogtools. Please report it with the lines above.",
    ]


def test_quiet_prints_nothing(cogtools_cli: CommandLine, run_folder: Path, tmp_path: Path) -> None:
    result = cogtools_cli("export-lora", run_folder, tmp_path / "out", "--quiet")
    assert (result.code, result.out, result.err) == (0, "", "")


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--sha256", "--scale", "fold"], ["--scale", "none"]])
def test_json_is_one_object_of_the_schema(
    cogtools_cli: CommandLine, run_folder: Path, tmp_path: Path, options: list[str]
) -> None:
    result = cogtools_cli("export-lora", run_folder, tmp_path / "out", "--json", *options)
    assert (result.code, result.err) == (0, "")
    assert result.json["report"]["tensors"] == 24


@pytest.mark.parametrize(
    "words",
    [
        "--sat_pt_path {checkpoint} --lora_save_directory {out}",
        "--lora_save_directory {out} --sat_pt_path {checkpoint}",
        "--sat_pt_path {checkpoint} {out}",
        "{checkpoint} --lora_save_directory {out}",
    ],
)
def test_the_flags_of_the_old_script_keep_working(
    cogtools_cli: CommandLine, run_folder: Path, tmp_path: Path, words: str
) -> None:
    places = {"{checkpoint}": run_folder / "1000" / "mp_rank_00_model_states.pt", "{out}": tmp_path / "out"}
    result = cogtools_cli("export-lora", *(places.get(word, word) for word in words.split()))
    assert result.code == 0
    assert len(load_file(tmp_path / "out" / FILE_NAME)) == 24


# Bad input


def a_text(folder: Path) -> Path:
    (folder / "a.pt").write_text("epoch 1: loss 0.3\n")
    return folder / "a.pt"


def cut_short(folder: Path) -> Path:
    torch.save(sat_state_dict(TOY_2B, 4), folder / "a.pt")
    content = (folder / "a.pt").read_bytes()
    (folder / "a.pt").write_bytes(content[: len(content) // 2])
    return folder / "a.pt"


def an_empty_folder(folder: Path) -> Path:
    (folder / "a").mkdir()
    return folder / "a"


def a_base_model(folder: Path) -> Path:
    torch.save(sat_state_dict(TOY_2B, 4, layers=[]), folder / "a.pt")
    return folder / "a.pt"


def one_tensor_missing(folder: Path) -> Path:
    state = dict(sat_state_dict(TOY_2B, 4))
    del state["model.diffusion_model.transformer.layers.2.attention.dense.matrix_B.0"]
    torch.save(state, folder / "a.pt")
    return folder / "a.pt"


def safetensors_in_its_place(folder: Path) -> Path:
    save_file({"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 128)}, folder / "a.pt")
    return folder / "a.pt"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "a.pt", "error: there is no such file\n  file:      {path}\n"),
    "text": (
        a_text,
        "error: this is not a checkpoint\n"
        "  file:      {path}\n"
        "  found:     a text file that begins with 'epoch 1: loss 0.3'\n"
        "  expected:  a file of torch.save (.pt, .pth, .bin, .ckpt) or safetensors\n",
    ),
    "cut-short": (
        cut_short,
        "error: the file is cut short: this zip archive has no directory at its end\n"
        "  file:      {path}\n"
        "  found:     {size} bytes\n"
        "  try:       copy or download it again; a checkpoint that is still being written looks like this too\n",
    ),
    "empty-folder": (
        an_empty_folder,
        "error: there is no checkpoint in this folder\n"
        "  file:      {path}\n"
        "  found:     nothing: the folder is empty\n"
        "  expected:  a checkpoint file, or folders of iterations as the trainer makes them (1000/, latest)\n",
    ),
    "base-model": (
        a_base_model,
        "error: there is no LoRA in this checkpoint\n"
        "  file:      {path}\n"
        "  found:     a base model without a LoRA (188 tensors)\n"
        "  expected:  keys such as …layers.0.attention.query_key_value.matrix_A.0, or those of another trainer's LoRA\n"
        "  try:       to convert it for diffusers: cogtools export-model {path} OUT_DIR\n",
    ),
    "tensor-missing": (
        one_tensor_missing,
        "error: the LoRA in this checkpoint cannot be exported as it is\n"
        "  file:      {path}\n"
        "  problem:   missing: layer 2: to_out.0 lora_B\n"
        "  try:       cogtools inspect {path} --lora\n",
    ),
    "diffusers-lora-unpaired": (
        safetensors_in_its_place,
        "error: the LoRA in this checkpoint cannot be exported as it is\n"
        "  file:      {path}\n"
        "  problem:   missing: layer 0: to_q lora_B\n"
        "  try:       cogtools inspect {path} --lora\n",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error(cogtools_cli: CommandLine, tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    size = f"{path.stat().st_size:,}" if path.exists() else ""
    result = cogtools_cli("export-lora", path, tmp_path / "out")
    assert (result.code, result.out, result.err) == (2, "", message.format(path=path, size=size))
    as_json = cogtools_cli("export-lora", path, tmp_path / "out", "--json")
    assert (as_json.code, as_json.err) == (2, "")
    assert as_json.json["error"]["what"] == message.splitlines()[0].removeprefix("error: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["export-lora"], "export-lora takes a checkpoint and a place for the output", id="nothing"),
        pytest.param(["export-lora", "a.pt"], "export-lora takes a checkpoint and a place for the output", id="one"),
        pytest.param(
            ["export-lora", "a", "b", "--sat_pt_path", "c"],
            "export-lora takes a checkpoint and a place",
            id="flag-more",
        ),
        pytest.param(["export-lora", "a", "b", "--scale", "x"], "Invalid value for '--scale'", id="no-scale"),
        pytest.param(["export-lora", "--alhpa", "1", "a", "b"], "No such option: --alhpa", id="unknown-option"),
        pytest.param(["exprot-lora"], "No such command 'exprot-lora'", id="unknown-command"),
        pytest.param(["export-lora", "a", "b", "--alpha", "x"], "Invalid value for '--alpha'", id="no-number"),
    ],
)
def test_wrong_usage_is_told_and_ends_with_2(cogtools_cli: CommandLine, words: list[str], message: str) -> None:
    result = cogtools_cli(*words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"error: {message}")
    as_json = cogtools_cli(*words, "--json")
    assert (as_json.code, as_json.err) == (2, "")
    assert as_json.json["error"]["kind"] == "usage"


def test_only_ten_problems_are_shown_and_json_has_them_all(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    others = {f"layers.{layer}.mlp.matrix_A.0": torch.zeros(1) for layer in range(16)}
    torch.save({**sat_state_dict(TOY_2B, 4), **others}, tmp_path / "a.pt")
    lines = cogtools_cli("export-lora", tmp_path / "a.pt", tmp_path / "out").err.splitlines()
    assert sum(line.startswith("  problem: ") for line in lines) == 11
    assert lines[-2] == "  problem:   … and 6 more (--json lists all)"
    found = cogtools_cli("export-lora", tmp_path / "a.pt", tmp_path / "out", "--json").json
    assert len(found["error"]["problems"]) == 16


def test_what_a_file_says_does_not_act_on_the_terminal(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    state = {**sat_state_dict(TOY_2B, 4), "evil\x1b[2J\n[red].matrix_A.0": torch.zeros(1)}
    torch.save(state, tmp_path / "a.pt")
    result = cogtools_cli("export-lora", tmp_path / "a.pt", tmp_path / "out")
    assert "unexpected: evil\\x1b[2J\\n[red].matrix_A.0 (" in result.err


def test_a_key_of_a_million_characters_is_shown_in_part(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    key = "k" * 1_000_000 + ".matrix_A.0"
    torch.save({**sat_state_dict(TOY_2B, 4), key: torch.zeros(1)}, tmp_path / "a.pt")
    result = cogtools_cli("export-lora", tmp_path / "a.pt", tmp_path / "out")
    assert f"unexpected: {'k' * 988} … (" in result.err
    assert len(result.err) < 2000
    as_json = cogtools_cli("export-lora", tmp_path / "a.pt", tmp_path / "out", "--json").json
    assert as_json["error"]["problems"][0]["subject"] == key


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch fired",)


def test_an_export_warns_of_a_checkpoint_that_would_run_code(
    cogtools_cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"module": sat_state_dict(TOY_2B, 4), "hook": Evil()}, tmp_path / "a.pt")
    result = cogtools_cli("export-lora", tmp_path / "a.pt", tmp_path / "out")
    assert (result.code, len(load_file(tmp_path / "out" / FILE_NAME))) == (0, 24)
    assert result.err.splitlines()[0] == (
        f"note: The checkpoint names what can run code: {os.system.__module__}.system. "
        "Nothing was run; do not torch.load it."
    )
    assert not (tmp_path / "fired").exists()


# The program


def test_the_version_is_told() -> None:
    assert run_program("--version").out == f"cogtools {cogtools.__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["export-lora", "--help"], ["export-lora", "-h"]])
def test_help_is_plain_text(words: list[str]) -> None:
    done = run_program(*words)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: cogtools ")
    assert "\x1b" not in done.out


@pytest.mark.parametrize("command", ["export-lora", "export-model", "inspect", "verify"])
def test_the_examples_in_a_help_can_be_pasted(command: str) -> None:
    lines = run_program(command, "--help", environment={"COLUMNS": "80"}).out.splitlines()
    first = lines.index("  Examples:") + 1
    examples = lines[first : lines.index("", first)]
    assert len(examples) >= 2
    for example in examples:
        program, *words = example.split()
        assert (program, words[0], len(example) <= 80) == ("cogtools", command, True)
        assert run_program(*words, "--help").code == 0


@pytest.mark.parametrize(
    ("shell", "typed"),
    [
        ("bash", {"COMP_WORDS": "cogtools ins", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "cogtools ins"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "cogtools ins", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_shells_can_complete_it(shell: str, typed: dict[str, str]) -> None:
    # Otherwise Typer asks the system what shell this runs in; there may be none.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = run_program("--show-completion", shell, environment=named)
    assert (script.code, script.err) == (0, "")
    assert f"_COGTOOLS_COMPLETE=complete_{shell}" in script.out
    completed = run_program(environment={"_COGTOOLS_COMPLETE": f"complete_{shell}", **typed})
    assert (completed.code, completed.err) == (0, "")
    assert re.findall(r"export-lora|inspect|verify", completed.out) == ["inspect"]


def test_a_pipe_that_is_closed_early_is_no_error(run_folder: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            program("export-lora", run_folder, tmp_path / "out"),
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=surroundings(),
        )
    finally:
        os.close(writer)
    assert (done.returncode, "Traceback" in done.stderr, "BrokenPipe" in done.stderr) == (0, False, False)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        pytest.param(["--help"], set(), id="help"),
        pytest.param(["export-lora", "--help"], set(), id="command-help"),
        pytest.param(["export-lora", "{run}", "{out}"], {"yaml"}, id="export-lora"),
        pytest.param(["inspect", "{file}", "--tree"], set(), id="inspect"),
    ],
)
def test_nothing_is_imported_that_is_not_needed(
    words: list[str], needed: set[str], run_folder: Path, tmp_path: Path
) -> None:
    file = shutil.copy(run_folder / "1000" / "mp_rank_00_model_states.pt", tmp_path / "a.pt")  # without its YAML
    words = [word.format(run=run_folder, file=file, out=tmp_path / "out") for word in words]
    assert imported_by(*words) == needed


def test_importing_the_package_imports_nothing_else() -> None:
    command = "import sys; before = set(sys.modules); import cogtools; print(*sorted(set(sys.modules) - before))"
    assert [name for name in run_python(command).out.split() if name.startswith("cogtools")] == [
        "cogtools",
        "cogtools.version",
    ]


def test_the_package_offers_what_it_says() -> None:
    assert all(getattr(cogtools, name) is not None for name in cogtools.__all__)
    assert set(cogtools.__all__) <= set(dir(cogtools))
    with pytest.raises(AttributeError, match="module 'cogtools' has no attribute 'nothing'"):
        _ = cogtools.nothing


def test_wrong_usage_leads_to_the_help_of_its_command(cogtools_cli: CommandLine) -> None:
    for words, help_ in ((["verify", "out", "--against"], "verify --help"), (["--foo"], "--help")):
        result = cogtools_cli(*words)
        assert (result.code, result.err.splitlines()[-1].split()[1:]) == (2, ["cogtools", *help_.split()])
