"""Who loads a LoRA file, and how strong: what was measured of each program, for each layout and each trap."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from cogtools import export_lora, open_checkpoint
from cogtools.conversion.lora import find_lora, find_transformer, scale_of
from cogtools.conversion.options import Format
from cogtools.conversion.readers import Reader, readers_of
from cogtools.layouts.family import BESIDE_LAYERS, IN_LAYERS
from cogtools.layouts.programs import PROGRAMS
from cogtools.layouts.recognition import LAYOUTS
from tests.support.consumers import diffsynth_name
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.producers import PEFT_WORDS, PRODUCERS, after, factors, saved, spelled

NEW, OLD, PEFT, COMFYUI, KIJAI, VIDEOX, VIDEOX_OLD, DIFFSYNTH, SAT = (program.name for program in PROGRAMS)


def readers(path: Path) -> dict[str, Reader]:
    """What every program does with a file, by its name."""
    with open_checkpoint(path) as checkpoint:
        lora = find_lora(checkpoint)
        assert lora is not None
        found = readers_of(lora, scale_of(lora), find_transformer(checkpoint, lora))
    return {reader.program: reader for reader in found}


def loading(path: Path) -> dict[str, tuple[int, tuple[float, ...], float | None]]:
    """Who loads it: how many modules, at which scaling, how many times as strong as trained."""
    return {
        name: (reader.modules, reader.scalings, reader.ratio)
        for name, reader in readers(path).items()
        if reader.loads != "no"
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A SAT training of 3 layers, rank 4, alpha 1: scaling 1/4."""
    return save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4, torch.float32)), rank=4)


RIGHT = (12, (0.25,), 1.0)
FOUR_TIMES = (12, (1.0,), 4.0)
FOLDED = (12, (1.0,), 1.0)

WRITTEN: dict[tuple[Format, str], dict[str, object]] = {
    ("diffusers", "metadata"): {NEW: RIGHT, OLD: FOUR_TIMES, KIJAI: RIGHT},
    ("diffusers", "none"): {NEW: FOUR_TIMES, OLD: FOUR_TIMES, KIJAI: FOUR_TIMES},
    ("diffusers", "fold"): {NEW: FOLDED, OLD: FOLDED, KIJAI: FOLDED},
    ("peft", "metadata"): {PEFT: RIGHT},
    ("comfyui", "metadata"): {COMFYUI: RIGHT},
    ("comfyui", "fold"): {COMFYUI: FOLDED},
    ("videox-fun", "metadata"): {KIJAI: RIGHT, VIDEOX: RIGHT, VIDEOX_OLD: RIGHT},
    ("diffsynth", "fold"): {},
    ("sat", "metadata"): {SAT: RIGHT},
}


@pytest.mark.parametrize(("name", "scale"), WRITTEN, ids=lambda value: value)
def test_what_is_written_is_loaded_by_its_programs_at_the_strength_of_the_training(
    name: Format, scale: str, run: Path, tmp_path: Path
) -> None:
    report = export_lora(run, tmp_path / "out", format=name, scale=scale)  # type: ignore[arg-type]
    assert loading(report.output) == WRITTEN[name, scale]


def test_diffsynth_loads_a_lora_of_the_only_size_that_it_has(tmp_path: Path) -> None:
    a, b = torch.ones(1, 3072), torch.ones(3072, 1)
    made = {f"transformer_blocks.{layer}.attn1.to_q": (a, b) for layer in range(42)}
    path = saved(tmp_path / "a.safetensors", spelled(made, diffsynth_name, *PEFT_WORDS))
    assert loading(path) == {DIFFSYNTH: (42, (1.0,), None)}
    made |= {"ofs_embedding.linear_1": (a, b)}
    tensors = spelled(made, lambda name: diffsynth_name(name) or name, *PEFT_WORDS)
    found = readers(saved(tmp_path / "b.safetensors", tensors))[DIFFSYNTH]
    assert (found.loads, found.why) == ("no", "2 tensors that it does not know")


@pytest.mark.parametrize(
    ("producer", "expected"),
    [
        ("sats_own_exporter", {NEW: (8, (1.0,), None), OLD: (8, (1.0,), None), KIJAI: (8, (1.0,), None)}),
        ("finetrainers", {NEW: (8, (1.0,), 1.0), OLD: (8, (1.0,), 1.0), KIJAI: (8, (1.0,), 1.0)}),
        ("videox_fun_network", {KIJAI: (342, (0.5,), 1.0), VIDEOX: (342, (0.5,), 1.0), VIDEOX_OLD: (342, (0.5,), 1.0)}),
        ("videox_fun_peft", {VIDEOX: (6, (1.0,), None)}),
        ("videox_fun_compatible", {KIJAI: (6, (1.0,), None), VIDEOX: (6, (1.0,), None), VIDEOX_OLD: (6, (1.0,), None)}),
        ("peft_folder", {PEFT: (8, (2.0,), 1.0)}),
        ("peft_stabilised", {PEFT: (10, (1.0, 8 / 3, 4.0), 1.0)}),
        ("comfyui_trainer", {COMFYUI: (245, (0.25,), 1.0)}),
        ("comfyui_underscores", {COMFYUI: (8, (0.75,), 1.0)}),
        ("zero_to_fp32", {}),
        ("second_adapter", {}),
        ("saved_peft_model", {}),
        ("unknown_prefix", {}),
        ("lightning_sat", {}),
        ("sat_trainer", {SAT: (12, (0.5,), 1.0)}),
    ],
)
def test_a_trainers_own_file_is_loaded_by_those_that_read_its_names(
    producer: str, expected: dict[str, object], tmp_path: Path
) -> None:
    assert loading(PRODUCERS[producer](tmp_path).path) == expected


def with_tensor(key: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


def without(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(key)


@pytest.mark.parametrize(
    ("producer", "change", "program", "why"),
    [
        ("diffusers_example", with_tensor("transformer.transformer_blocks.0.attn1.to_q.alpha", torch.ones(())), NEW,
         "1 tensor of alphas, which it does not accept"),
        ("comfyui_underscores", without("lora_unet_blocks_1_q.lora_down.weight"), COMFYUI,
         "1 factor without the other"),
        ("videox_fun_compatible", with_tensor("foo", torch.ones(1)), VIDEOX,
         "1 key that it does not know, such as foo"),
        ("videox_fun_compatible", without("lora_unet__transformer_blocks_0_attn1_to_q.lora_up.weight"), KIJAI,
         "1 factor without the other"),
        ("diffusers_example", with_tensor("transformer.norm.weight", torch.ones(1)), NEW,
         "1 key that it does not know, such as transformer.norm.weight"),
    ],
)  # fmt: skip
def test_one_tensor_too_many_or_too_few_can_stop_a_program(
    producer: str, change: Callable[[dict[str, torch.Tensor]], None], program: str, why: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    tensors = load_file(PRODUCERS[producer](tmp_path / "in").path)
    change(tensors)
    path = saved(tmp_path / "changed.safetensors", tensors)
    assert readers(path)[program].why == why


def test_a_convolution_is_left_out_by_videox_fun_and_applied_by_comfyui(tmp_path: Path) -> None:
    made = factors()
    made |= {"patch_embed.proj": (torch.ones(4, 16, 2, 2), torch.ones(8, 4, 1, 1))}
    path = saved(tmp_path / "bare.safetensors", spelled(made, after(""), *PEFT_WORDS))
    found = readers(path)[VIDEOX]
    assert (found.loads, found.modules) == ("partly", 8)
    comfyui = export_lora(path, tmp_path / "out", format="comfyui").output
    assert loading(comfyui)[COMFYUI][0] == 9


def test_a_peft_folder_without_its_configuration_is_loaded_by_nobody(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="peft")
    (tmp_path / "out" / "adapter_config.json").unlink()
    found = readers(report.output)[PEFT]
    assert (found.loads, found.why) == ("no", "there is no adapter_config.json beside it")


@pytest.mark.parametrize(("word", "loads"), [("Orbit_left", True), ("DimensionX", True), ("plain", False)])
def test_kijais_wrapper_scales_files_of_some_names_once_more(word: str, loads: bool, run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / f"{word}.safetensors")
    notes = readers(report.output)[KIJAI].notes
    assert any("once more" in note for note in notes) == loads


def test_compatible_with_comfyui_is_not(tmp_path: Path) -> None:
    found = readers(PRODUCERS["videox_fun_compatible"](tmp_path).path)[COMFYUI]
    assert (found.loads, found.notes) == ("no", ("VideoX-Fun's name for it is wrong: ComfyUI cannot read it",))


def test_a_strength_that_cannot_be_set_is_told(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, 128, torch.float32, base="none")
    run = save_run(tmp_path / "run", sat_checkpoint(state), rank=128)
    path = export_lora(run, tmp_path / "out", format="comfyui", scale="none").output
    (note,) = readers(path)[COMFYUI].notes
    assert note == "strength 0.0078125 would be right, and cannot be set: its strength has steps of 0.01"
    kijai = export_lora(run, tmp_path / "kijai", scale="none").output
    assert readers(kijai)[KIJAI].notes[-1].startswith("strength 0.0078125 would be right")


def test_sats_folder_with_the_lora_only_is_said_to_need_the_base(run: Path, tmp_path: Path) -> None:
    alone = export_lora(run, tmp_path / "alone", format="sat").output
    whole = export_lora(run, tmp_path / "whole", format="sat", base=run).output
    notes = [any("noise" in note for note in readers(path)[SAT].notes) for path in (alone, whole)]
    assert notes == [True, False]


def test_what_nobody_loads_is_told_with_what_its_users_see(tmp_path: Path) -> None:
    found = readers(PRODUCERS["saved_peft_model"](tmp_path).path)
    assert {reader.loads for reader in found.values()} == {"no"}
    assert all(reader.why == "these are diffusers' names after diffusers' and PEFT's prefixes"
               for reader in found.values())  # fmt: skip
    assert all(reader.otherwise for reader in found.values())


# The tables


def test_every_format_has_a_program_and_every_program_a_format() -> None:
    assert {program.layout.name for program in PROGRAMS} == set(get_args(Format)) == {layout.name for layout in LAYOUTS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_program_reads_what_is_written_for_it(program: object) -> None:
    layout, ways = program.layout, program.ways  # type: ignore[attr-defined]
    assert any(layout.written in way.spellings for way in ways)
    assert all(name in (*IN_LAYERS, *BESIDE_LAYERS) for name in layout.written.names.rows)
