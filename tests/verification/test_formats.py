"""verify holds a file against the program that it is for, or the one that is asked for, in every layout."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from cogtools import export_lora, verify_lora
from cogtools.conversion.options import Format, Scale
from cogtools.errors import CheckpointError, OptionError
from cogtools.verification.report import VerifyReport
from tests.support.command_line import CommandLine
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.producers import PRODUCERS, saved

FORMATS: tuple[Format, ...] = get_args(Format)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A SAT training of 3 layers, rank 4, alpha 2."""
    return save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, alpha=2)


def wrong(report: VerifyReport) -> dict[str, str]:
    """The checks that do not pass."""
    return {check.name: check.status for check in report.checks if check.status in ("warn", "fail")}


def seen(report: VerifyReport, name: str) -> str:
    return next(check.seen for check in report.checks if check.name == name)


# What is written


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [None, "fold"])
def test_what_is_written_verifies_against_what_it_was_made_of(
    name: Format, scale: Scale | None, run: Path, tmp_path: Path
) -> None:
    output = export_lora(run, tmp_path / "out", format=name, scale=scale).output
    for path in (output, tmp_path / "out"):
        report = verify_lora(path, against=run)
        assert (report.layout, report.verdict, wrong(report)) == (name, "pass", {})
    assert "24 tensors equal the checkpoint's" in seen(report, "against")


@pytest.mark.parametrize("name", FORMATS)
def test_the_options_that_it_was_made_with_are_part_of_it(name: Format, run: Path, tmp_path: Path) -> None:
    lost = tmp_path / "lost.safetensors"
    saved(lost, load_file(export_lora(run, tmp_path / "plain").output))
    export_lora(lost, tmp_path / "out", format=name, scaling=0.75, dtype="fp32", allow_partial=True)
    assert wrong(verify_lora(tmp_path / "out", against=lost)) == {}
    assert seen(verify_lora(tmp_path / "out", against=lost), "against-scale").endswith(
        "(given by --scaling, as the file's record says) / rank 4" + (", folded in" if name == "diffsynth" else "")
    )


@pytest.mark.parametrize("name", FORMATS)
def test_one_lora_file_is_held_against_another_whatever_their_layouts(name: Format, run: Path, tmp_path: Path) -> None:
    first = export_lora(run, tmp_path / "first", format=name, scale="fold")
    second = export_lora(run, tmp_path / "second", format="comfyui")
    assert wrong(verify_lora(second.output, against=run)) == {}
    assert set(wrong(verify_lora(second.output, against=first.output))) == {"against", "against-scale"}
    third = export_lora(second.output, tmp_path / "third", format="peft")
    assert wrong(verify_lora(third.output, against=second.output)) == {}


# What is damaged


def edited(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A file with other tensors and the same header."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    return saved(path, {key: tensor.clone() for key, tensor in tensors.items()}, metadata)


def bit_flipped(path: Path) -> Path:
    """A file with one bit of its last byte of tensors changed."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    content[8 + length] ^= 1
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "key", "check"),
    [
        ("comfyui", "diffusion_model.blocks.1.k.lora_A.weight", {"complete", "pairs"}),
        ("videox-fun", "lora_unet__transformer_blocks_1_attn1_to_k.lora_up.weight", {"complete", "pairs"}),
        ("diffsynth", "blocks.1.attn1.to_out.lora_B.default.weight", {"complete", "pairs"}),
        ("comfyui", "diffusion_model.blocks.1.k.alpha", {"record"}),
        ("videox-fun", "lora_unet__transformer_blocks_1_attn1_to_k.alpha", {"record"}),
    ],
)
def test_a_tensor_that_is_missing_is_found(name: Format, key: str, check: set[str], run: Path, tmp_path: Path) -> None:
    path = edited(export_lora(run, tmp_path / "out", format=name).output, lambda tensors: tensors.pop(key))
    assert set(wrong(verify_lora(path))) == check


@pytest.mark.parametrize("name", ["comfyui", "videox-fun", "diffsynth"])
def test_a_flipped_bit_is_found_against_the_checkpoint(name: Format, run: Path, tmp_path: Path) -> None:
    path = bit_flipped(export_lora(run, tmp_path / "out", format=name).output)
    assert wrong(verify_lora(path, against=run)) != {}


def test_an_alpha_that_was_changed_is_found(run: Path, tmp_path: Path) -> None:
    path = export_lora(run, tmp_path / "out", format="comfyui").output
    edited(path, lambda tensors: tensors.update({key: tensor * 2 for key, tensor in tensors.items() if "alpha" in key}))
    assert wrong(verify_lora(path)) == {"record": "fail"}
    assert wrong(verify_lora(path, against=run)) == {"record": "fail", "against-scale": "fail"}


def test_a_sat_folder_is_damaged_in_its_weights_or_its_configuration(run: Path, tmp_path: Path) -> None:
    output = export_lora(run, tmp_path / "out", format="sat").output
    config = tmp_path / "out" / "training_config.yaml"
    config.write_text(config.read_text().replace("lora_alpha: 2", "lora_alpha: 4"))
    assert wrong(verify_lora(tmp_path / "out", against=run)) == {"record": "fail", "against-scale": "fail"}
    config.write_text(config.read_text().replace("lora_alpha: 4", "lora_alpha: 2"))
    content = bytearray(output.read_bytes())
    content[len(content) // 2] ^= 1
    output.write_bytes(content)
    assert "fail" in wrong(verify_lora(tmp_path / "out", against=run)).values()


# For whom


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("asked", FORMATS)
def test_a_file_is_right_for_its_own_program_only(name: Format, asked: Format, run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "out", format=name)
    report = verify_lora(tmp_path / "out", format=asked)
    assert (report.layout, "names" in wrong(report)) == (asked, name != asked)


def test_what_is_asked_for_is_a_program_that_is_known(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "out")
    with pytest.raises(OptionError, match="there is no such format"):
        verify_lora(tmp_path / "out", format="kohya")


def test_a_trainers_checkpoint_is_verified_only_if_that_is_asked_for(run: Path) -> None:
    with pytest.raises(CheckpointError, match="this is a checkpoint, not an exported LoRA"):
        verify_lora(run)
    report = verify_lora(run, format="sat", layers=3)
    assert (report.verdict, report.scaling) == ("pass", (0.5,))


def test_sats_names_in_a_safetensors_file_are_read_by_nobody(run: Path, tmp_path: Path) -> None:
    module = torch.load(run, weights_only=False)["module"]
    path = saved(tmp_path / "a.safetensors", {key: tensor.clone() for key, tensor in module.items() if "matrix" in key})
    report = verify_lora(path, layers=3)
    assert (report.layout, wrong(report)) == ("sat", {"names": "fail"})
    assert seen(report, "names") == "SAT reads no safetensors files"


@pytest.mark.parametrize(
    ("producer", "layout", "failing"),
    [
        ("videox_fun_network", "videox-fun", set()),
        ("videox_fun_peft", "videox-fun", set()),
        ("comfyui_trainer", "comfyui", set()),
        ("diffsynth_exvideo", "diffsynth", set()),
        ("peft_folder", "peft", set()),
        ("saved_peft_model", "diffusers", {"names"}),
        ("sats_own_exporter", "diffusers", set()),
    ],
)
def test_a_trainers_own_file_is_held_against_the_program_that_it_is_for(
    producer: str, layout: str, failing: set[str], tmp_path: Path
) -> None:
    report = verify_lora(PRODUCERS[producer](tmp_path).path, layers=42)
    failed = {name for name, status in wrong(report).items() if status == "fail"}
    assert (report.layout, failed & {"names", "scale"}) == (layout, failing)


def test_another_adapter_is_called_what_it_is(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        key = f"lycoris_transformer_blocks_{layer}_attn1_to_q"
        tensors |= {
            f"{key}.lokr_w1": torch.ones(4, 4),
            f"{key}.lokr_w2": torch.ones(2, 2),
            f"{key}.alpha": torch.ones(()),
        }
    report = verify_lora(saved(tmp_path / "pytorch_lora_weights.safetensors", tensors))
    assert seen(report, "names") == "this is a LyCORIS LoKr, not a LoRA"
    (check,) = (check for check in report.checks if check.name == "names")
    assert str(check.hint) == "load it with lycoris (create_lycoris_from_weights, merge_to)"


# What it says


def test_the_first_line_names_the_program_and_the_last_lines_who_loads_it(
    cogtools_cli: CommandLine, run: Path, tmp_path: Path
) -> None:
    output = export_lora(run, tmp_path / "out", format="comfyui").output
    lines = cogtools_cli("verify", output).out.splitlines()
    assert lines[0].startswith(f"file     {output} (")
    assert lines[0].endswith("), held against ComfyUI")
    assert lines[-5:] == [
        "",
        "loaded by  ComfyUI >= 0.20.1: 12 modules of 12, the scale from the alpha tensors; scaling 0.5, as trained",
        "not by     diffusers >= 0.34, diffusers < 0.34, PEFT, kijai's ComfyUI-CogVideoXWrapper, VideoX-Fun, "
        "VideoX-Fun before November 2025, DiffSynth-Studio <= 1.1.9, SAT: these are ComfyUI's names",
        "",
        "verified: all 12 checks passed",
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_json_keeps_to_its_schema_for_every_layout(
    name: Format, cogtools_cli: CommandLine, run: Path, tmp_path: Path
) -> None:
    written = cogtools_cli("export-lora", run, tmp_path / "out", "--format", name, "--json").json["report"]
    assert (written["format"], len(written["files"])) == (name, {"peft": 2, "sat": 3}.get(name, 1))
    report = cogtools_cli("verify", tmp_path / "out", "--against", run, "--json").json["report"]
    assert (report["layout"], len(report["readers"])) == (name, 9)
    inspected = cogtools_cli("inspect", tmp_path / "out", "--json").json["report"]["checkpoints"][0]["lora"]
    assert inspected["readers"] == report["readers"]
    assert inspected["export"]["formats"] == list(FORMATS)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "diffusers"])
def test_the_hint_for_a_damaged_file_makes_it_again_in_its_own_format(
    name: Format, cogtools_cli: CommandLine, run: Path, tmp_path: Path
) -> None:
    output = export_lora(run, tmp_path / "out", format=name, alpha=3).output
    if name == "sat":
        content = torch.load(output, weights_only=True)
        content["module"].popitem()
        torch.save(content, output)
    else:
        edited(output, lambda tensors: tensors.pop(next(key for key in tensors if "A" in key or "down" in key)))
    report = verify_lora(tmp_path / "out", against=run)
    commands = {check.hint.command for check in report.checks if check.hint is not None and check.status == "fail"}
    (command,) = {command for command in commands if command is not None and "export-lora" in command}
    assert cogtools_cli(*command.split()[1:]).code == 0
    assert verify_lora(tmp_path / "out", format=name).verdict == "pass"


# A scale that was assumed


@pytest.fixture
def lost(run: Path, tmp_path: Path) -> Path:
    """A LoRA in diffusers' names that states no scale."""
    path = tmp_path / "lost.safetensors"
    saved(path, load_file(export_lora(run, tmp_path / "plain").output))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_a_scale_that_was_assumed_is_a_warning_however_often_it_was_converted(
    name: Format, lost: Path, tmp_path: Path
) -> None:
    export_lora(lost, tmp_path / "once", allow_partial=True)
    export_lora(tmp_path / "once", tmp_path / "twice", format=name)
    for path in (tmp_path / "once", tmp_path / "twice"):
        report = verify_lora(path)
        assert (report.verdict, wrong(report)) == ("warn", {"scale": "warn"})
        (check,) = [check for check in report.checks if check.name == "scale"]
        assert [str(problem) for problem in check.problems] == [
            "scale: what it was made of states no scale (found 1, assumed, expected the training's alpha / rank)"
        ]


def test_an_assumption_that_is_put_right_by_hand_is_none(lost: Path, tmp_path: Path) -> None:
    export_lora(lost, tmp_path / "once", allow_partial=True)
    export_lora(tmp_path / "once", tmp_path / "right", alpha=2)
    assert wrong(verify_lora(tmp_path / "right")) == {}


def test_a_file_that_is_checked_as_another_program_loads_it_was_not_changed_for_that(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "out")
    report = verify_lora(tmp_path / "out", format="comfyui")
    assert next(check.status for check in report.checks if check.name == "record") == "pass"


# A scaling that is not alpha / rank


@pytest.fixture
def stabilised(run: Path, tmp_path: Path) -> Path:
    """The same LoRA as PEFT saves a rank-stabilised one: alpha 2, rank 4, scaling 2 / sqrt(4)."""
    folder = tmp_path / "stabilised"
    export_lora(run, folder, format="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    tensors = load_file(folder / "adapter_model.safetensors")
    saved(folder / "adapter_model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [None, "fold"])
def test_a_rank_stabilised_lora_keeps_its_scaling(
    name: Format, scale: Scale | None, stabilised: Path, tmp_path: Path
) -> None:
    report = export_lora(stabilised, tmp_path / "out", format=name, scale=scale, verify=True)
    assert report.scaling == 1
    assert report.verification is not None
    assert (report.verification.verdict, wrong(report.verification)) == ("pass", {})


def test_a_scaling_that_is_not_stated_is_found_again_in_the_record(stabilised: Path, tmp_path: Path) -> None:
    export_lora(stabilised, tmp_path / "none", scale="none")
    for name in ("comfyui", "peft"):
        assert export_lora(tmp_path / "none", tmp_path / name, format=name).scaling == 1
