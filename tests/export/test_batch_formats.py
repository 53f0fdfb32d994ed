"""Many at once, in every format: names that do not collide, and what is done already is skipped."""

from pathlib import Path
from typing import get_args

import pytest

from cogtools.conversion.options import Format
from tests.support.command_line import CommandLine, imported_by
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.producers import PRODUCERS

FORMATS: tuple[Format, ...] = get_args(Format)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two trainings; one of them has two iterations."""
    folders = [tmp_path / "ckpts" / name for name in ("cat.v2", "dog")]
    for seed, folder in enumerate(folders):
        save_run(folder, sat_checkpoint(sat_state_dict(TOY_2B, 4, seed=seed)), rank=4)
    return folders


FILES = {
    "diffusers": ["pytorch_lora_weights.safetensors"],
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
    "comfyui": ["{}_comfyui.safetensors"],
    "videox-fun": ["{}_videox-fun.safetensors"],
    "diffsynth": ["{}_diffsynth.safetensors"],
    "sat": ["1/mp_rank_00_model_states.pt", "latest", "training_config.yaml"],
}


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", FORMATS)
def test_each_gets_a_folder_with_the_files_of_the_format(
    name: Format, cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = cogtools_cli("export-lora", *runs, out, "--format", name, "--json").json["report"]
    assert (first["done"], first["failed"]) == (2, 0)
    # ComfyUI's nodes take what is before the first dot for the name of a LoRA.
    assert written(out) == sorted(
        f"{folder}/{file.format(folder.replace('.', '_'))}"
        for folder in ("cat.v2-1000", "dog-1000")
        for file in FILES[name]
    )
    second = cogtools_cli("export-lora", *runs, out, "--format", name, "--json").json["report"]
    assert (second["skipped"], second["failed"]) == (2, 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "option", [["--alpha", "2"], ["--scaling", "2"], ["--scale", "fold"]], ids=lambda words: words[0]
)
def test_what_was_made_with_other_options_is_not_taken_for_done(
    name: Format, option: list[str], cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["--format", name, "--json"]
    cogtools_cli("export-lora", runs[0], f"{out}/", *words)
    again = cogtools_cli("export-lora", runs[0], f"{out}/", *words, *option)
    if name == "diffsynth" and "fold" in option:  # which is how it is made anyway
        assert again.json["report"]["skipped"] == 1
        return
    (item,) = again.json["report"]["exports"]
    assert (again.code, item["error"]["what"]) == (2, "the output exists already and was made with other options")
    replaced = cogtools_cli("export-lora", runs[0], f"{out}/", *words, *option, "--overwrite")
    assert replaced.json["report"]["done"] == 1


def test_a_folder_without_the_base_weights_is_not_taken_for_one_with_them(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    words = ["export-lora", runs[0], f"{tmp_path / 'out'}/", "--format", "sat", "--json"]
    assert cogtools_cli(*words).json["report"]["done"] == 1
    assert cogtools_cli(*words, "--base", runs[0]).json["report"]["failed"] == 1
    assert cogtools_cli(*words, "--base", runs[0], "--overwrite").json["report"]["done"] == 1
    assert cogtools_cli(*words, "--base", runs[0]).json["report"]["skipped"] == 1


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversion_without_arithmetic_imports_nothing_heavy(name: Format, tmp_path: Path) -> None:
    made = PRODUCERS["diffusers_example"](tmp_path / "in")  # at scaling 1 nothing is folded
    assert imported_by("export-lora", made.path, tmp_path / "out", "--format", name) == set()
