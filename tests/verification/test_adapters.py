"""Adapters of every kind that diffusers and PEFT make: valid for them, and for `verify` with and without --load.

The oracle is the library itself: the file that it wrote, loaded into another copy of the model, gives what the model
gave that was adapted.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cogtools import VerifyReport, verify_lora
from cogtools.layouts import diffusers, peft
from cogtools.verification.report import Check
from tests.support.judge import base, load_alone, run

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
IN_LAYERS = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"]
EVERYTHING = [*IN_LAYERS, "patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1",
              "time_embedding.linear_2", "norm_out.linear", "transformer_blocks.0.ff.net.0.proj"]  # fmt: skip
LAYERS = 3

KINDS: dict[str, dict[str, Any]] = {
    "feed-forward": {"target_modules": [*ATTENTION, "ff.net.0.proj", "ff.net.2"]},
    "norms": {"target_modules": ["norm1.linear", "norm2.linear"]},
    "every-module": {"target_modules": [*EVERYTHING, r"proj_out"]},
    "convolution": {"target_modules": ["patch_embed.proj"]},
    "projection-only": {"target_modules": ["proj_out"]},
    "dora": {"target_modules": IN_LAYERS, "use_dora": True},
    "dora-of-a-convolution": {"target_modules": ["patch_embed.proj", "to_q"], "use_dora": True},
    "lora-bias": {"target_modules": IN_LAYERS, "lora_bias": True},
    "mixed-ranks": {"target_modules": IN_LAYERS, "rank_pattern": {"to_q": 8, "norm1.linear": 2},
                    "alpha_pattern": {"to_q": 3}},
    "rank-stabilised": {"target_modules": IN_LAYERS, "use_rslora": True},
    "excluded": {"target_modules": ATTENTION, "exclude_modules": ["transformer_blocks.1.attn1.to_q"]},
    "two-layers": {"target_modules": ATTENTION, "layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"},
}  # fmt: skip


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **fields})


def randomise(model: Any) -> None:
    """Give every parameter of an adapter a random value: PEFT begins some with zeros."""
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            values = torch.randn(parameter.shape, generator=random) * 0.05
            parameter.data = values.abs() if "magnitude" in name else values


def saved_by_diffusers(folder: Path, **fields: Any) -> tuple[Path, torch.Tensor]:
    """A LoRA that diffusers wrote, and the output of the model that it was in."""
    from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

    transformer = copy.deepcopy(base())
    transformer.add_adapter(config(**fields))
    randomise(transformer)
    CogVideoXLoraLoaderMixin.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return folder / diffusers.FILE_NAME, run(transformer.eval())


def saved_by_peft(
    folder: Path, change: Callable[[Any], object] = lambda _: None, **fields: Any
) -> tuple[Path, torch.Tensor]:
    """A folder that PEFT wrote, and the output of the model that it was in."""
    model = get_peft_model(copy.deepcopy(base()), config(**fields))
    randomise(model)
    change(model)
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    return folder / peft.FILE_NAME, run(model.eval().get_base_model())


def wrong(report: VerifyReport) -> dict[str, tuple[str, str]]:
    return {check.name: (check.status, check.seen) for check in report.checks if check.status in ("warn", "fail")}


def check(report: VerifyReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape")  # PEFT takes lora_B's bias for a broken lora_B
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # PEFT misses those that the file does not have
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [saved_by_diffusers, saved_by_peft])
def test_what_a_library_wrote_and_loads_again_is_valid(save: Any, kind: str, tmp_path: Path) -> None:
    path, expected = save(tmp_path, **KINDS[kind])

    plain, loaded = verify_lora(path, layers=LAYERS), verify_lora(path, layers=LAYERS, load=True)

    torch.testing.assert_close(run(load_alone(path, copy.deepcopy(base()))), expected)
    assert wrong(plain) == {}
    # PEFT misses modules to exclude: diffusers tells it those that the file has.
    misses = kind == "excluded" and save is saved_by_diffusers
    assert {name: status for name, (status, _) in wrong(loaded).items()} == ({"load": "warn"} if misses else {})


def train_biases(model: Any) -> None:
    """Change every bias of the base model, as a training with `bias` does."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(".bias"):
            parameter.data = parameter.data + 0.5


@pytest.mark.parametrize(("bias", "count"), [("lora_only", 4 * LAYERS), ("all", None)])
def test_biases_that_peft_saves_and_loads_have_a_place(bias: str, count: int | None, tmp_path: Path) -> None:
    path, expected = saved_by_peft(tmp_path, train_biases, target_modules=ATTENTION, bias=bias)
    biases = sum(key.endswith(".bias") for key in load_file(path))

    plain, loaded = verify_lora(path, layers=LAYERS), verify_lora(path, layers=LAYERS, load=True)

    torch.testing.assert_close(run(load_alone(path, copy.deepcopy(base()))), expected)
    assert biases == (count or biases) > 0
    assert (wrong(plain), wrong(loaded)) == ({}, {})
    assert check(plain, "names").seen == f"all are PEFT's names; {biases} base weights among them, which PEFT loads too"
    assert f"took {24 + biases} tensors" in check(loaded, "load").seen


def test_modules_that_peft_saves_whole_are_a_doubt_until_they_are_loaded(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data = parameter.data + 0.5

    path, expected = saved_by_peft(tmp_path, change, target_modules=ATTENTION, modules_to_save=["proj_out"])

    plain, loaded = verify_lora(path, layers=LAYERS), verify_lora(path, layers=LAYERS, load=True)

    torch.testing.assert_close(run(load_alone(path, copy.deepcopy(base()))), expected)
    assert {name: status for name, (status, _) in wrong(plain).items()} == {"scale": "warn"}
    assert wrong(loaded) == {}


@pytest.mark.parametrize(
    "key", ["transformer_blocks.0.attn1.to_q.bias", "norm_out.norm.base_layer.bias", "nothing.bias"]
)
def test_a_bias_that_peft_passes_over_has_no_place(key: str, tmp_path: Path) -> None:
    path, _ = saved_by_peft(tmp_path, target_modules=ATTENTION)
    save_file({**load_file(path), peft.PREFIX + key: torch.ones(128)}, path)

    plain, loaded = verify_lora(path, layers=LAYERS), verify_lora(path, layers=LAYERS, load=True)

    assert wrong(plain) == {"names": ("fail", "1 key of 25 with no place in the model")}
    assert [str(problem) for problem in check(loaded, "load").problems] == [
        f"unexpected: {peft.PREFIX}{key} (found in the file, not in the model)"
    ]


def test_base_weights_that_loading_changes_are_found(tmp_path: Path) -> None:
    path, _ = saved_by_peft(tmp_path, target_modules=ATTENTION)
    place = path.with_name(peft.CONFIG_NAME)
    place.write_text(place.read_text().replace('"init_lora_weights": false', '"init_lora_weights": "pissa"'))

    plain, loaded = verify_lora(path, layers=LAYERS), verify_lora(path, layers=LAYERS, load=True)

    changed = PeftModel.from_pretrained(copy.deepcopy(base()), str(tmp_path)).get_base_model()
    weight = "transformer_blocks.0.attn1.to_q"
    assert not torch.equal(changed.get_submodule(weight).base_layer.weight, base().get_submodule(weight).weight)
    assert {name: status for name, (status, _) in wrong(plain).items()} == {"scale": "warn"}
    assert check(loaded, "load").status == "fail"


def test_alpha_tensors_among_diffusers_names_are_refused_by_diffusers(tmp_path: Path) -> None:
    path, _ = saved_by_diffusers(tmp_path, target_modules=ATTENTION)
    tensors = load_file(path)
    save_file({**tensors, "transformer.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(4.0)}, path)

    report = verify_lora(path, layers=LAYERS)

    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        load_alone(path, copy.deepcopy(base()))
    assert check(report, "names").status == "fail"
    assert [str(problem) for problem in check(report, "names").problems] == [
        "unexpected: transformer.transformer_blocks.0.attn1.to_q.alpha (found 1 tensor that holds an alpha, "
        "expected keys such as transformer.transformer_blocks.0.attn1.to_q.lora_A.weight)"
    ]


def test_a_lora_in_float8_is_loaded_right_and_valid(tmp_path: Path) -> None:
    path, _ = saved_by_diffusers(tmp_path, target_modules=ATTENTION)
    rounded = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(path).items()}
    loaded_alone = []
    for tensors in (rounded, {key: tensor.float() for key, tensor in rounded.items()}):
        save_file(tensors, path)
        loaded_alone.append(run(load_alone(path, copy.deepcopy(base()))))
    save_file(rounded, path)

    report = verify_lora(path, layers=LAYERS, load=True)

    torch.testing.assert_close(*loaded_alone)
    assert set(wrong(report)) == {"scale"}  # not stated
    assert check(report, "dtype").seen == "float8_e4m3fn, which diffusers casts to the dtype of the model"
    assert [check(report, name).seen for name in ("finite", "untrained", "constant")] == [
        "all values of 24 tensors", "no lora_B is zero", "no lora_A is constant"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil", "seen"),
    [
        ("to_q.lora_A.weight", lambda codes: codes.index_fill(0, torch.tensor([0]), 0x7F), "NaN or infinity"),
        ("to_q.lora_B.weight", lambda codes: codes * 0 + 0x80, "1 of 12 lora_B are zero: their modules do nothing"),
        ("to_q.lora_A.weight", lambda codes: codes * 0 + 0x38, "1 lora_A of one value"),
    ],
)  # fmt: skip
def test_values_in_float8_are_looked_at(name: str, spoil: Any, seen: str, tmp_path: Path) -> None:
    path, _ = saved_by_diffusers(tmp_path, target_modules=ATTENTION)
    tensors = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(path).items()}
    key = f"transformer.transformer_blocks.1.attn1.{name}"
    save_file({**tensors, key: spoil(tensors[key].view(torch.uint8)).view(torch.float8_e4m3fn)}, path)

    assert seen in {text for _, text in wrong(verify_lora(path, layers=LAYERS)).values()}
