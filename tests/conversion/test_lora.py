"""One function reads a LoRA whatever layout it is in, and says who states its scale."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtools import export_lora
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.lora import find_lora
from cogtools.conversion.plan import LoraPlan, plan_lora
from cogtools.errors import ExportError, Problem
from cogtools.layouts import diffusers
from cogtools.layouts.family import ATTENTION, IN_LAYERS, LoraKey, Module
from cogtools.layouts.lora import LoraLayout
from cogtools.layouts.recognition import BY_NAME, LAYOUTS
from tests.support.factories import TOY_2B, sat_state_dict
from tests.support.loras import LAYERS, Factors, factors, save_lora
from tests.support.oracles import torch_load

MODULES = [Module(layer, name) for layer, name in product(range(LAYERS), ATTENTION)]


def plan(path: Path, **options: Any) -> LoraPlan:
    with open_checkpoint(path) as checkpoint:
        return plan_lora(checkpoint, diffusers.LAYOUT, **options)


def read(path: Path) -> Factors:
    """The LoRA that was found, its values with it."""
    with open_checkpoint(path) as checkpoint:
        lora = find_lora(checkpoint)
        assert lora is not None
        assert (lora.unplaced, lora.unreadable, lora.collisions) == ((), {}, {})
        return {
            key: torch.frombuffer(bytearray(tensor.entry.storage.range().read()), dtype=torch.float32)
            .as_strided(tensor.entry.shape, tensor.entry.stride, tensor.entry.storage_offset)
            for key, tensor in lora.tensors.items()
        }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("saver", ["safetensors", "torch.save"])
def test_a_lora_is_read_alike_in_every_layout(layout: LoraLayout, saver: str, tmp_path: Path) -> None:
    expected = factors()
    path = save_lora(tmp_path, layout, expected, None)
    if saver == "torch.save":
        torch.save({str(layout.key(key)): tensor for key, tensor in expected.items()}, tmp_path / "lora.pt")
        path = tmp_path / "lora.pt"
    found = read(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.name != "sat"], ids=lambda one: one.name)
def test_modules_beyond_the_attention_are_read_in_every_layout_that_has_them(
    layout: LoraLayout, tmp_path: Path
) -> None:
    expected = factors(IN_LAYERS)
    path = save_lora(tmp_path, layout, expected, 2.0)
    assert read(path).keys() == expected.keys()
    found = plan(path)
    assert set(found.names) == expected.keys()
    assert len(found.modules) == LAYERS * len(IN_LAYERS)


@pytest.mark.parametrize(
    ("layout", "source"),
    [
        ("sat", "training_config.yaml"),
        ("diffusers", "lora_adapter_metadata"),
        ("peft", "adapter_config.json"),
        ("comfyui", "alpha tensors"),
        ("videox-fun", "alpha tensors"),
    ],
)
def test_the_scale_is_read_where_the_layout_states_it(layout: str, source: str, tmp_path: Path) -> None:
    found = plan(save_lora(tmp_path, BY_NAME[layout], factors(), 2.0))
    assert (found.scale.alpha, found.scale.source) == (2, source)
    assert found.scale.scalings == dict.fromkeys(MODULES, 0.5)
    assert found.notices[1:] == ()  # the first: nothing tells how many layers there are


@pytest.mark.parametrize("layout", ["diffusers", "comfyui", "videox-fun", "diffsynth"])
def test_a_scale_that_nothing_states_is_taken_as_1_with_a_note(layout: str, tmp_path: Path) -> None:
    found = plan(save_lora(tmp_path, BY_NAME[layout], factors(), None))
    assert (found.scale.source, found.scaling) == ("nothing", 1.0)
    assert found.notices[1:] == (
        "Nothing states the scale: taken as 1, as diffusers does. Trainers that lose it, with the scaling of their "
        "defaults: CogVideo's finetune 0.5, VideoX-Fun with --use_peft_lora 0.5, SAT's own exporter 1/rank. "
        "State it with --alpha, or in export-lora with --scaling.",
    )


def test_ranks_that_differ_are_no_fault_where_a_trainer_gives_every_module_its_own(tmp_path: Path) -> None:
    made = factors()
    for part in "AB":
        key = LoraKey(1, "q", part)
        made[key] = made[key][:2] if part == "A" else made[key][:, :2].contiguous()
    found = plan(save_lora(tmp_path, BY_NAME["comfyui"], made, 2.0))
    assert (found.rank, found.ranks[Module(1, "q")], found.ranks[Module(1, "k")]) == (None, 2, 4)
    assert found.scalings == dict.fromkeys(MODULES, 0.5) | {Module(1, "q"): 1.0}


# A LoRA beside the state dict


@pytest.mark.parametrize("wrapper", ["lora", "ema.weights"])
@pytest.mark.parametrize("beside", [{}, {"model": {"conv": torch.zeros(1)}}], ids=["alone", "beside-a-state-dict"])
def test_a_lora_under_a_name_of_its_own_is_found(wrapper: str, beside: dict[str, Any], tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, 4, base="telling")
    made: dict[str, Any] = state
    for name in reversed(wrapper.split(".")):
        made = {name: made}
    torch.save({"module": state}, tmp_path / "plain.pt")
    torch.save({**made, **beside}, tmp_path / "a.pt")
    expected, found = plan(tmp_path / "plain.pt", alpha=1), plan(tmp_path / "a.pt", alpha=1)
    assert (found.names, found.transformer, found.layers) == (expected.names, expected.transformer, expected.layers)
    assert found.notices == (
        *expected.notices,
        f"All keys of the LoRA have the prefix '{wrapper}.model.diffusion_model.', "
        "as no program is known to read them.",
    )
    for name in ("plain", "a"):
        export_lora(tmp_path / f"{name}.pt", tmp_path / name / "lora.safetensors", alpha=1)
    one, other = (values_of(tmp_path / name / "lora.safetensors") for name in ("plain", "a"))
    assert one == other


def values_of(path: Path) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}


def test_of_two_loras_beside_the_state_dict_none_is_chosen(tmp_path: Path) -> None:
    state, ema = (sat_state_dict(TOY_2B, 4, base="none", seed=seed) for seed in (0, 1))
    torch.save({"lora": state, "ema": {"lora": ema}}, tmp_path / "a.pt")
    with pytest.raises(ExportError) as raised:
        plan(tmp_path / "a.pt", alpha=1)
    keys = tuple(f"ema.lora.{key}" for key in state)
    assert raised.value.problems == (
        Problem(
            "unexpected",
            keys[0],
            "the prefix 'ema.lora.model.diffusion_model.', 24 keys",
            "'lora.model.diffusion_model.', as before the others",
            keys,
        ),
    )


def test_the_state_of_an_optimizer_is_not_taken_for_a_lora(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, 4, base="none")
    moments = {key: {"exp_avg": tensor, "exp_avg_sq": tensor} for key, tensor in state.items()}
    torch.save({"module": {"conv": torch.zeros(1)}, "optimizer": {"state": moments}}, tmp_path / "a.pt")
    with pytest.raises(ExportError, match="there is no LoRA in this checkpoint"):
        plan(tmp_path / "a.pt")


def test_the_real_trainers_lora_is_read_as_torch_loads_it(real: Path) -> None:
    path = real / "2b-fp32" / "1" / "mp_rank_00_model_states.pt"
    module = torch_load(path)["module"]
    with open_checkpoint(path) as checkpoint:
        lora = find_lora(checkpoint)
        assert lora is not None
        found = {tensor.key: tensor.entry.shape for tensor in lora.tensors.values()}
    assert found == {key: tuple(tensor.shape) for key, tensor in module.items() if ".matrix_" in key}
