"""One LoRA, every consumer, and back: held against readers that are written from each consumer's own rules."""

import json
import struct
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cogtools import export_lora, inspect_checkpoint, open_checkpoint, read_lora
from cogtools.conversion.options import Format
from cogtools.errors import ExportError, OptionError, OutputError, Problem
from tests.support.base_weights import diffusers_base
from tests.support.command_line import CommandLine
from tests.support.consumers import CONSUMERS, Updates, diffusers_of_peft, opened, sat
from tests.support.diffusers_alone import toy_transformer
from tests.support.factories import COGVIDEOX_5B_I2V, TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.producers import (
    ATTENTION,
    KOHYA_WORDS,
    PEFT_WORDS,
    PRODUCERS,
    after,
    alphas,
    factors,
    saved,
    spelled,
)

FORMATS: tuple[Format, ...] = get_args(Format)
WITHOUT_ARITHMETIC = tuple(name for name in FORMATS if name != "diffsynth")


def assert_same_updates(found: Updates, wanted: Updates, tolerance: float = 0.0) -> None:
    """The same modules, and each update equal to within a share of its norm."""
    assert found.keys() == wanted.keys()
    for path, update in wanted.items():
        error = (found[path] - update).norm().item()
        assert error <= tolerance * update.norm().item(), path


# Every producer, every format


@pytest.mark.parametrize("producer", PRODUCERS)
def test_what_a_trainer_wrote_is_right_in_every_program_that_can_hold_it(producer: str, tmp_path: Path) -> None:
    made = PRODUCERS[producer](tmp_path / "in")
    dtype = next(iter(made.factors.values()))[0].dtype
    for name in made.formats:
        report = export_lora(made.path, tmp_path / name, format=name, **made.options)  # type: ignore[arg-type]
        found = CONSUMERS[name](report.output)
        # Folding rounds to the factors' dtype; alphas that are no float32 are rounded to one.
        tolerance = 1e-15 if report.scale == "metadata" else {torch.float32: 2**-22}.get(dtype, 2**-7)
        assert_same_updates(found, made.updates, 1e-6 if producer == "peft_stabilised" else tolerance)
    refused = [name for name in FORMATS if name not in made.formats]
    for name in refused:
        with pytest.raises(ExportError):
            export_lora(made.path, tmp_path / name, format=name, **made.options)
        assert not (tmp_path / name).exists()


def test_the_scale_that_is_lost_is_asked_for_by_name(tmp_path: Path) -> None:
    made = PRODUCERS["cogvideo_finetune"](tmp_path / "in")
    report = export_lora(made.path, tmp_path / "out", format="comfyui")
    assert report.notices[1] == (
        "Nothing states the scale: taken as 1, as diffusers does. Trainers that lose it, with the scaling of their "
        "defaults: CogVideo's finetune 0.5, VideoX-Fun with --use_peft_lora 0.5, SAT's own exporter 1/rank. "
        "State it with --alpha, or in export-lora with --scaling."
    )
    assert (report.alpha, report.alpha_source, report.scaling) == (None, "nothing", 1.0)


def test_a_published_lora_that_has_lost_its_scale_is_repaired(tmp_path: Path) -> None:
    made = PRODUCERS["sats_own_exporter"](tmp_path / "in")
    report = export_lora(made.path, tmp_path / "fixed", alpha=1)
    assert (report.alpha, report.alpha_source, report.scaling) == (1, "--alpha", 0.25)
    assert_same_updates(CONSUMERS["diffusers"](report.output), made.updates)
    before, after_it = load_file(made.path), load_file(report.output)
    assert all(torch.equal(before[key], tensor) for key, tensor in after_it.items())


def test_what_differs_from_what_the_file_states_is_said_with_both(tmp_path: Path) -> None:
    made = PRODUCERS["finetrainers"](tmp_path / "in")
    report = export_lora(made.path, tmp_path / "a", scaling=0.5)
    assert report.notices[1] == "scaling is 0.5, as --scaling states; lora_config states alpha 4."
    made = PRODUCERS["comfyui_underscores"](tmp_path / "in2")
    report = export_lora(made.path, tmp_path / "b", alpha=1)
    assert report.notices[1] == "alpha is 1, as --alpha states; alpha tensors states 3."


def test_alpha_and_scaling_are_not_given_together(tmp_path: Path) -> None:
    made = PRODUCERS["diffusers_example"](tmp_path / "in")
    with pytest.raises(OptionError, match="--alpha and --scaling both say how strong the LoRA is"):
        export_lora(made.path, tmp_path / "out", alpha=1, scaling=1)


@pytest.mark.parametrize("scaling", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_that_cannot_be_is_refused(tmp_path: Path, scaling: float) -> None:
    made = PRODUCERS["diffusers_example"](tmp_path / "in")
    with pytest.raises(OptionError, match="scaling must be a number above 0"):
        export_lora(made.path, tmp_path / "out", scaling=scaling)


def test_differences_of_weights_beside_a_lora_are_left_out_with_a_note(tmp_path: Path) -> None:
    made = PRODUCERS["comfyui_trainer"](tmp_path / "in")
    report = export_lora(made.path, tmp_path / "out")
    assert "Not exported: 2 tensors of a full difference of weights, which only ComfyUI applies." in report.notices


def test_a_prefix_that_all_keys_share_is_accepted_with_a_note(tmp_path: Path) -> None:
    made = PRODUCERS["unknown_prefix"](tmp_path / "in")
    assert any("pipe.denoising_model." in text for text in export_lora(made.path, tmp_path / "out").notices)


def test_alphas_after_an_unknown_prefix_count(tmp_path: Path) -> None:
    made = factors(beside=["patch_embed.proj"])
    name = after("my.own.")
    tensors = spelled(made, name, *KOHYA_WORDS) | alphas(made, name, 2, torch.float32)
    path = saved(tmp_path / "a.safetensors", tensors)
    report = export_lora(path, tmp_path / "out")
    assert (report.modules, report.alpha, report.scaling, report.alpha_source) == (9, 2, 0.5, "alpha tensors")
    assert inspect_checkpoint(path).lora is not None
    assert {tensor.section for tensor in inspect_checkpoint(path).tensors} == {"lora"}


def test_a_rank_of_2048_is_as_good_as_any(tmp_path: Path) -> None:
    a, b = torch.ones(2048, 3072, dtype=torch.float16), torch.full((3072, 2048), 0.5, dtype=torch.float16)
    key = "transformer.transformer_blocks.0.attn1.to_q"
    saved(tmp_path / "in.safetensors", {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b})
    for name in WITHOUT_ARITHMETIC:
        report = export_lora(tmp_path / "in.safetensors", tmp_path / name, format=name, alpha=4096, allow_partial=True)
        assert (report.rank, report.scaling) == (2048, 2)
        assert read_lora(report.output).scalings == {"transformer_blocks.0.attn1.to_q": 2.0}


# Golden examples


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A SAT training of 3 layers, rank 4, alpha 1."""
    return save_run(tmp_path / "lora-disney", sat_checkpoint(sat_state_dict(TOY_2B, 4, torch.float32)), rank=4)


def golden_keys(*names: str, prefix: str, parts: tuple[str, ...]) -> set[str]:
    return {prefix.format(layer) + f"{name}.{part}" for layer in range(3) for name in names for part in parts}


GOLDEN: dict[Format, set[str]] = {
    "diffusers": golden_keys("to_q", "to_k", "to_v", "to_out.0", prefix="transformer.transformer_blocks.{}.attn1.",
                             parts=("lora_A.weight", "lora_B.weight")),
    "peft": golden_keys("to_q", "to_k", "to_v", "to_out.0", prefix="base_model.model.transformer_blocks.{}.attn1.",
                        parts=("lora_A.weight", "lora_B.weight")),
    "comfyui": golden_keys("q", "k", "v", "attn_out", prefix="diffusion_model.blocks.{}.",
                           parts=("lora_A.weight", "lora_B.weight", "alpha")),
    "videox-fun": golden_keys("to_q", "to_k", "to_v", "to_out_0", prefix="lora_unet__transformer_blocks_{}_attn1_",
                              parts=("lora_down.weight", "lora_up.weight", "alpha")),
    "diffsynth": golden_keys("to_q", "to_k", "to_v", "to_out", prefix="blocks.{}.attn1.",
                             parts=("lora_A.default.weight", "lora_B.default.weight")),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_keys_are_those_of_the_golden_example(name: Format, run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format=name)
    found = load_file(report.output)
    assert found.keys() == GOLDEN[name]
    shapes = {"lora_A": (4, 128), "lora_down": (4, 128), "lora_B": (128, 4), "lora_up": (128, 4), "alpha": ()}
    for key, tensor in found.items():
        word = next(word for word in shapes if f".{word}" in key)
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, shapes[word])
        assert word != "alpha" or tensor.item() == 1.0


def test_sats_folder_is_that_of_the_golden_example(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="sat")
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in report.files) == [
        "1/mp_rank_00_model_states.pt",
        "latest",
        "training_config.yaml",
    ]
    assert (tmp_path / "out" / "latest").read_text() == "1"
    content = torch.load(report.output, weights_only=True)
    assert content.keys() == {"module"}
    original = torch.load(run, weights_only=False)["module"]
    lora = {key: tensor for key, tensor in original.items() if ".matrix_" in key}
    assert content["module"].keys() == lora.keys()
    assert all(torch.equal(content["module"][key], tensor) for key, tensor in lora.items())
    mapped = torch.load(report.output, weights_only=True, mmap=True)["module"]
    assert all(torch.equal(mapped[key], tensor) for key, tensor in lora.items())


def test_pefts_configuration_and_header_are_those_of_the_golden_example(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="peft")
    modules = sorted(f"transformer_blocks.{layer}.{name}" for layer in range(3) for name in ATTENTION)
    stated = {"r": 4, "lora_alpha": 1, "target_modules": modules, "rank_pattern": {}, "alpha_pattern": {},
              "use_dora": False, "lora_bias": False}  # fmt: skip
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        **stated,
        "bias": "none",
        "lora_dropout": 0.0,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    with safe_open(report.output, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert header == {f"base_model.model.{name}": value for name, value in stated.items()}


def test_alphas_have_a_storage_each(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="comfyui", alpha=2.5)
    header = report.output.read_bytes()
    (length,) = struct.unpack("<Q", header[:8])
    offsets = [tuple(entry["data_offsets"]) for key, entry in json.loads(header[8 : 8 + length]).items()
               if key.endswith(".alpha")]  # fmt: skip
    assert len(set(offsets)) == len(offsets) == 12
    assert {tensor.item() for key, tensor in load_file(report.output).items() if key.endswith(".alpha")} == {2.5}


# The real trainer's checkpoints


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_update_of_the_real_trainers_lora(name: Format, real_run: Path, tmp_path: Path) -> None:
    with open_checkpoint(real_run) as checkpoint:
        file = checkpoint.path
    loaded = torch.load(str(file), weights_only=False)
    module = loaded.get("module", loaded)
    wanted = {}
    for layer in range(3):
        key = f"model.diffusion_model.transformer.layers.{layer}.attention"
        for place, path in enumerate(ATTENTION):
            fused, index = ("query_key_value", place) if place < 3 else ("dense", 0)
            a, b = (module[f"{key}.{fused}.matrix_{factor}.{index}"].double() for factor in "AB")
            wanted[f"transformer_blocks.{layer}.{path}"] = b @ a / 4
    report = export_lora(real_run, tmp_path / "out", format=name)
    assert_same_updates(CONSUMERS[name](report.output), wanted, 0 if name != "diffsynth" else 1e-15)
    if name == "peft":
        assert_same_updates(diffusers_of_peft(report.output), wanted)


@pytest.mark.parametrize("name", WITHOUT_ARITHMETIC)
def test_sat_to_any_format_and_back_is_the_same_file(name: Format, real_run: Path, tmp_path: Path) -> None:
    direct = export_lora(real_run, tmp_path / "direct", format="sat")
    there = export_lora(real_run, tmp_path / "there", format=name)
    back = export_lora(there.output, tmp_path / "back", format="sat")
    assert back.output.read_bytes() == direct.output.read_bytes()
    assert back.scaling == direct.scaling == 0.25


# How the scale travels


def test_what_sat_multiplies_by_itself_is_not_folded_in(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="sat", alpha=8, scale="fold")
    module = torch.load(report.output, weights_only=True)["module"]
    original = torch.load(run, weights_only=False)["module"]
    key = "model.diffusion_model.transformer.layers.1.attention.dense.matrix_{}.0"
    assert torch.equal(module[key.format("A")], original[key.format("A")])
    assert torch.equal(module[key.format("B")], original[key.format("B")] * 8)
    original_scale = CONSUMERS["diffusers"](export_lora(run, tmp_path / "d", alpha=8).output)
    assert_same_updates(sat(report.output, alpha=1), original_scale)
    assert_same_updates(sat(report.output), original_scale)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folded_file_is_right_where_nothing_is_stated(name: Format, run: Path, tmp_path: Path) -> None:
    wanted = CONSUMERS["diffusers"](export_lora(run, tmp_path / "d", alpha=3).output)
    report = export_lora(run, tmp_path / "out", format=name, alpha=3, scale="fold")
    assert report.scale == "fold"
    assert_same_updates(CONSUMERS[name](report.output), wanted, 2**-22)
    again = export_lora(report.output, tmp_path / "again")
    assert_same_updates(CONSUMERS["diffusers"](again.output), wanted, 2**-22)
    assert not any("Nothing states" in text for text in again.notices)


def test_diffsynth_has_no_place_for_a_scale(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="diffsynth")
    assert report.scale == "fold"
    assert "DiffSynth-Studio reads the scale from no file: it is multiplied into the weights." in report.notices
    with pytest.raises(OptionError, match="--scale metadata: DiffSynth-Studio reads the scale from no file"):
        export_lora(run, tmp_path / "other", format="diffsynth", scale="metadata")


def test_peft_loads_nothing_without_a_scale(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--scale none: PEFT loads nothing where the scale is not stated"):
        export_lora(run, tmp_path / "out", format="peft", scale="none")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("peft", "sat")])
def test_a_scale_that_is_left_out_is_found_in_the_record(name: Format, run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format=name, alpha=3, scale="none")
    assert (report.scale, report.weight) == ("none", 0.75)
    assert_same_updates(
        {path: update * 0.75 for path, update in CONSUMERS[name](report.output).items()},
        CONSUMERS["diffusers"](export_lora(report.output, tmp_path / "d").output),
    )


def test_a_scale_of_1_is_folded_in_without_arithmetic(tmp_path: Path, run: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="diffsynth", alpha=4)
    assert (report.scaling, report.largest_relative_error) == (1.0, None)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), 2.0**-70])
def test_an_alpha_in_a_file_that_cannot_be_is_refused_by_name(alpha: float, tmp_path: Path) -> None:
    tensors, _ = opened(PRODUCERS["comfyui_underscores"](tmp_path / "in").path)
    path = saved(tmp_path / "a.safetensors", tensors | {"lora_unet_blocks_1_k.alpha": torch.tensor(alpha)})
    (problem,) = refusal(path, tmp_path / "out", "comfyui").problems
    assert problem == Problem("scale", "alpha tensors: layer 1: k", f"alpha {alpha:.10g}", "a number above 0")
    assert export_lora(path, tmp_path / "out", format="comfyui", alpha=3).scaling == 0.75


def test_an_alpha_of_two_numbers_is_refused_by_name(tmp_path: Path) -> None:
    tensors, _ = opened(PRODUCERS["comfyui_underscores"](tmp_path / "in").path)
    path = saved(tmp_path / "a.safetensors", tensors | {"lora_unet_blocks_1_k.alpha": torch.tensor([1.0, 2.0])})
    (problem,) = refusal(path, tmp_path / "out", "comfyui").problems
    assert problem == Problem("scale", "alpha tensors: layer 1: k", "not a single number", "a number above 0")


# What a format cannot hold


def refusal(path: Path, out: Path, name: Format, **options: float) -> ExportError:
    with pytest.raises(ExportError) as caught:
        export_lora(path, out, format=name, **options)  # type: ignore[arg-type]
    assert not out.exists()
    return caught.value


def test_what_sat_cannot_adapt_is_refused_by_name(tmp_path: Path) -> None:
    made = PRODUCERS["comfyui_trainer"](tmp_path / "in")
    (in_layers, beside) = refusal(made.path, tmp_path / "out", "sat").problems
    assert in_layers.subject == (
        "layers 0-29: ff.net.0.proj lora_A and lora_B, ff.net.2 lora_A and lora_B, norm1.linear lora_A and lora_B, "
        "norm2.linear lora_A and lora_B"
    )
    assert in_layers.expected == "a module and a part that SAT has, for --format sat"
    assert beside.subject.startswith("patch_embed.text_proj lora_A and lora_B")


def test_ranks_that_differ_are_refused_where_one_is_needed(tmp_path: Path) -> None:
    made = PRODUCERS["mixed_ranks"](tmp_path / "in")
    assert refusal(made.path, tmp_path / "out", "sat").problems == (
        Problem("rank", "layers 0-1: k, v, out", "4", "one rank throughout, as SAT has it"),
        Problem("rank", "layers 0-1: q", "8", "one rank throughout, as SAT has it"),
    )


def test_alphas_that_differ_go_into_sats_folder_only_if_they_are_folded_in(tmp_path: Path) -> None:
    made = factors()
    tensors = spelled(made, after("base_model.model."), *PEFT_WORDS)
    saved(tmp_path / "in" / "adapter_model.safetensors", tensors)
    stated = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}, "target_modules": ["to_q"]}
    stated["target_modules"] = [name.removeprefix("attn1.") for name in ATTENTION]
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(stated))
    error = refusal(tmp_path / "in", tmp_path / "out", "sat")
    assert error.what == "SAT has one alpha for all modules, and this LoRA has different ones"
    assert (error.found, str(error.hint)) == ("2, 4", "export with --scale fold")
    folded = export_lora(tmp_path / "in", tmp_path / "out", format="sat", scale="fold")
    wanted = CONSUMERS["peft"](tmp_path / "in" / "adapter_model.safetensors")
    assert_same_updates(sat(folded.output, alpha=1), wanted)


@pytest.mark.parametrize(("name", "problem"), [
    ("diffsynth", "a module and a part that DiffSynth-Studio has, for --format diffsynth"),
    ("videox-fun", "that of a Linear"),
])  # fmt: skip
def test_a_convolutions_lora_is_refused_where_it_cannot_be_applied(name: Format, problem: str, tmp_path: Path) -> None:
    made = factors()
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    tensors |= {"transformer.patch_embed.proj.lora_A.weight": torch.ones(4, 16, 2, 2),
                "transformer.patch_embed.proj.lora_B.weight": torch.ones(8, 4, 1, 1)}  # fmt: skip
    path = saved(tmp_path / "in.safetensors", tensors)
    (found,) = refusal(path, tmp_path / "out", name).problems
    assert (found.subject, found.expected) == ("patch_embed.proj lora_A and lora_B", problem)
    report = export_lora(path, tmp_path / "comfyui", format="comfyui")
    assert CONSUMERS["comfyui"](report.output)["patch_embed.proj"].shape == (8, 64)


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "lora_B.bias"])
def test_what_else_an_adapter_has_goes_only_where_it_is_applied(part: str, tmp_path: Path) -> None:
    made = factors()
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    tensors |= {f"transformer.{path}.{part}": torch.ones(8) for path in made}
    path = saved(tmp_path / "in.safetensors", tensors)
    for name in ("comfyui", "videox-fun", "diffsynth", "sat"):
        assert refusal(path, tmp_path / "out", name).problems[0].kind == "unexpected"
    report = export_lora(path, tmp_path / "peft", format="peft", scaling=0.5)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["lora_bias"]) == (part != "lora_B.bias", part == "lora_B.bias")
    assert len(load_file(report.output)) == 24


def test_a_bias_is_multiplied_by_what_is_folded_in(tmp_path: Path) -> None:
    made = factors()
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    tensors |= {f"transformer.{path}.lora_B.bias": torch.arange(8.0) for path in made}
    path = saved(tmp_path / "in.safetensors", tensors)
    report = export_lora(path, tmp_path / "out", scaling=0.25, scale="fold")
    found = load_file(report.output)
    assert torch.equal(found["transformer.transformer_blocks.0.attn1.to_q.lora_B.bias"], torch.arange(8.0) / 4)


def test_a_size_that_a_program_does_not_have_is_only_a_note(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="diffsynth")
    assert (
        "DiffSynth-Studio has CogVideoX with 42 layers of hidden size 3072 only: it cannot load this LoRA, of 3 layers "
        "of hidden size 128." in report.notices
    )


def test_one_factor_without_the_other_is_refused(tmp_path: Path) -> None:
    tensors = spelled(factors(), after("transformer."), *PEFT_WORDS)
    del tensors["transformer.transformer_blocks.1.attn1.to_k.lora_A.weight"]
    path = saved(tmp_path / "in.safetensors", tensors)
    for name in FORMATS:
        assert refusal(path, tmp_path / "out", name).problems == (Problem("missing", "layer 1: to_k lora_A"),)


def test_a_lora_of_another_sat_model_is_not_called_a_cogvideox(tmp_path: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for layer in (0, 14):
        for fused, parts in (("query_key_value", 3), ("dense", 1)):
            for part in range(parts):
                key = f"transformer.layers.{layer}.attention.{fused}"
                state[f"{key}.matrix_A.{part}"] = torch.ones(10, 4096, dtype=torch.float16)
                state[f"{key}.matrix_B.{part}"] = torch.ones(4096, 10, dtype=torch.float16)
    torch.save({"module": state}, tmp_path / "mp_rank_00_model_states.pt")
    report = export_lora(tmp_path / "mp_rank_00_model_states.pt", tmp_path / "out", allow_partial=True)
    assert report.model == "not a CogVideoX: hidden size 4096, which VisualGLM-6B and CogVLM have"
    assert "No CogVideoX has hidden size 4096: VisualGLM-6B and CogVLM have, which SAT trains too." in report.notices


# Files and folders


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("diffusers", ["pytorch_lora_weights.safetensors"]),
        ("peft", ["adapter_model.safetensors", "adapter_config.json"]),
        ("comfyui", ["lora-disney-1000_comfyui.safetensors"]),
        ("videox-fun", ["lora-disney-1000_videox-fun.safetensors"]),
        ("diffsynth", ["lora-disney-1000_diffsynth.safetensors"]),
        ("sat", ["1/mp_rank_00_model_states.pt", "latest", "training_config.yaml"]),
    ],
)
def test_files_have_the_names_that_their_programs_look_for(
    name: Format, files: list[str], run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = export_lora(run, out, format=name)
    assert report.files == tuple(out / file for file in files)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == sorted(report.files)
    assert report.size_bytes == sum(path.stat().st_size for path in report.files)
    assert (report.folder, report.output) == (out, out / files[0])


def test_a_file_that_is_converted_again_does_not_gather_names(run: Path, tmp_path: Path) -> None:
    first = export_lora(run, tmp_path, format="comfyui")
    second = export_lora(first.output, tmp_path, format="videox-fun")
    assert second.output.name == "lora-disney-1000_videox-fun.safetensors"


@pytest.mark.parametrize("name", ["peft", "sat"])
def test_a_format_of_several_files_is_not_written_into_one(name: Format, run: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"--format {name} is a folder of several files"):
        export_lora(run, tmp_path / "a.safetensors", format=name)


@pytest.mark.parametrize("name", ["peft", "sat"])
def test_a_folder_is_replaced_only_if_cogtools_wrote_all_of_it(name: Format, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_lora(run, out, format=name)
    with pytest.raises(OutputError, match="the output exists already"):
        export_lora(run, out, format=name)
    report = export_lora(run, out, format=name, alpha=2, overwrite=True)
    assert read_lora(report.output).scalings.popitem()[1] == 0.5
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="the output would replace a folder that cogtools did not write"):
        export_lora(run, out, format=name, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_a_trainers_folder_is_never_replaced(run: Path) -> None:
    with pytest.raises(OutputError):
        export_lora(run, run.parents[1], format="sat", overwrite=True)
    assert run.is_file()


def test_a_format_that_is_not_known_is_an_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        export_lora(run, tmp_path / "out", format="kohya")  # type: ignore[arg-type]
    assert (caught.value.found, caught.value.expected) == (
        "kohya", "diffusers, peft, comfyui, videox-fun, diffsynth, sat",
    )  # fmt: skip


# SAT


def test_a_folder_with_the_lora_only_says_first_that_it_is_not_enough(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", format="sat")
    assert report.notices[0].startswith("This folder holds the LoRA only.")
    assert "noise" in report.notices[0]


def test_the_base_weights_are_written_beside_the_lora_as_they_are(run: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.pt"
    state = sat_state_dict(TOY_2B, None, torch.float32, seed=3)
    torch.save({"module": state}, base)
    lora = export_lora(run, tmp_path / "lora", alpha=2)
    report = export_lora(lora.output, tmp_path / "whole", format="sat", base=base)
    found = torch.load(report.output, weights_only=True)["module"]
    transformer = {key: tensor for key, tensor in state.items() if key.startswith("model.diffusion_model.")}
    trained = torch.load(run, weights_only=False)["module"]
    wanted = transformer | {key: tensor for key, tensor in trained.items() if ".matrix_" in key}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    assert report.has_base
    assert not any("LoRA only" in text for text in report.notices)
    assert read_lora(report.output).scalings.popitem()[1] == 0.5


def test_the_base_may_be_a_model_of_diffusers(run: Path, tmp_path: Path) -> None:
    trained = torch.load(run, weights_only=False)["module"]
    base = saved(tmp_path / "model" / "diffusion_pytorch_model.safetensors", contiguous(diffusers_base(trained, 3)))
    with pytest.raises(ExportError) as caught:
        export_lora(run, tmp_path / "whole", format="sat", base=base)
    assert str(caught.value.hint) == "give the folder with its config.json or training_config.yaml"
    toy_transformer().save_config(base.parent)
    report = export_lora(run, tmp_path / "whole", format="sat", base=base.parent)
    found = torch.load(report.output, weights_only=True)["module"]
    # What diffusers computes itself is not in its file.
    wanted = {key.replace(".original.", "."): tensor for key, tensor in trained.items()
              if key.startswith("model.diffusion_model.") and "pos_embedding" not in key}  # fmt: skip
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def test_the_base_of_another_model_is_refused(tmp_path: Path) -> None:
    made = PRODUCERS["sats_own_exporter"](tmp_path / "in")
    base = tmp_path / "base.pt"
    torch.save({"module": sat_state_dict(TOY_2B, None)}, base)
    with pytest.raises(ExportError, match="the base weights are of another model than the LoRA"):
        export_lora(made.path, tmp_path / "out", format="sat", base=base)


def test_base_weights_go_into_sats_folder_only(run: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--base does not go with --format peft"):
        export_lora(run, tmp_path / "out", format="peft", base=run)


def test_a_checkpoint_without_base_weights_is_not_a_base(run: Path, tmp_path: Path) -> None:
    lora = export_lora(run, tmp_path / "lora")
    with pytest.raises(ExportError, match="there are no base weights of a transformer in this checkpoint"):
        export_lora(run, tmp_path / "out", format="sat", base=lora.output)


def test_some_layers_stay_some_layers_in_a_sat_folder(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, 4, torch.float32, layers=[0, 2], base="full")
    run = save_run(tmp_path / "run", sat_checkpoint(state), rank=4, layer_range=[0, 2])
    there = export_lora(run, tmp_path / "there")
    back = export_lora(there.output, tmp_path / "back", format="sat")
    assert back.layers == (0, 2)
    assert "layer_range: [0, 2]" in (tmp_path / "back" / "training_config.yaml").read_text()
    assert export_lora(back.output, tmp_path / "again").layers == (0, 2)


# What is printed


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("peft", ["pipe = CogVideoXImageToVideoPipeline.from_pretrained(...)",
                  "PeftModel.from_pretrained(pipe.transformer, {folder})",
                  'pipe.transformer.load_lora_adapter({folder}, prefix="base_model.model", '
                  'weight_name="adapter_model.safetensors")']),
        ("comfyui", ['lora_name "i2v-1000_comfyui.safetensors", strength_model 1.0']),
        ("videox-fun", ["pipeline = merge_lora(pipeline, {path}, 1.0)"]),
        ("diffsynth", ["model_manager.load_lora({path}, lora_alpha=1.0)"]),
        ("sat", ['load_checkpoint(model, args, "BASE_FOLDER")', "load_checkpoint(model, args, {folder})"]),
        ("diffusers", ["pipe = CogVideoXImageToVideoPipeline.from_pretrained(...)",
                       'pipe.load_lora_weights({folder}, weight_name="pytorch_lora_weights.safetensors", '
                       'adapter_name="lora")']),
    ],
)  # fmt: skip
def test_the_last_lines_say_how_its_program_loads_it_with_the_models_pipeline_class(
    name: Format, lines: list[str], cogtools_cli: CommandLine, tmp_path: Path
) -> None:
    state = sat_state_dict(COGVIDEOX_5B_I2V, 4, torch.bfloat16, base="telling")
    run = save_run(tmp_path / "i2v", sat_checkpoint(state), rank=4, alpha=2)
    result = cogtools_cli("export-lora", run, tmp_path / "out", "--format", name)
    report = cogtools_cli("export-lora", run, tmp_path / "out", "--format", name, "--overwrite", "--dry-run", "--json")
    output = report.json["report"]["output"]
    facts = {"folder": json.dumps(str(tmp_path / "out")), "path": json.dumps(output)}
    printed = [line.strip() for line in result.out.splitlines()]
    wanted = [line.format_map(facts) for line in lines]
    start = printed.index(wanted[0])
    assert printed[start : start + len(wanted)] == wanted
    assert "model     CogVideoX-5B-I2V" in printed
    yaml = "Load it into SAT after the base weights, with r: 4 and lora_alpha: 2 in lora_config of the yaml:"
    assert (printed[start - 1] == yaml) == (name == "sat")


# What is beside the LoRA in its file


def test_tensors_that_no_lora_has_are_left_out_by_name(tmp_path: Path) -> None:
    made = factors()
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    more = {"transformer.patch_embed.proj.weight": torch.ones(3), "something.else": torch.ones(3)}
    path = saved(tmp_path / "a.safetensors", tensors | more)
    report = export_lora(path, tmp_path / "out")
    (text,) = [text for text in report.notices if "no LoRA has it" in text]
    assert all(key in text for key in more)
    assert set(load_file(report.output)) == set(tensors)


def test_an_alpha_of_a_module_that_is_not_adapted_states_nothing(tmp_path: Path) -> None:
    made = factors()
    tensors = spelled(made, after("diffusion_model."), *KOHYA_WORDS)
    stray = "diffusion_model.transformer_blocks.0.ff.net.0.proj.alpha"
    path = saved(tmp_path / "a.safetensors", tensors | {stray: torch.tensor(3.0)})
    report = export_lora(path, tmp_path / "out", allow_partial=True)
    assert (report.scaling, report.alpha_source) == (1, "nothing")
    assert any("Not exported, since no LoRA has it" in text and stray in text for text in report.notices)


def test_modules_without_an_alpha_among_others_are_counted(tmp_path: Path) -> None:
    made = factors()
    name = after("diffusion_model.")
    some = dict(list(made.items())[:5])
    path = saved(tmp_path / "a.safetensors", spelled(made, name, *KOHYA_WORDS) | alphas(some, name, 2, torch.float32))
    report = export_lora(path, tmp_path / "out")
    assert "3 of 8 modules have no alpha tensor: their scaling is taken as 1." in report.notices


def test_what_is_cut_to_a_rank_says_what_becomes_of_its_scale(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", rank=2)
    assert "What is cut to a lower rank has its scale multiplied in." in report.notices
    assert not any("from no file" in text for text in report.notices)
    with pytest.raises(OptionError, match="--scale metadata does not go with --rank"):
        export_lora(run, tmp_path / "other", rank=2, scale="metadata")
