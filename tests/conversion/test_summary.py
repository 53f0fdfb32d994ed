"""cogtools.read_lora: a LoRA as plain data."""

from pathlib import Path

import pytest
import torch

import cogtools
from cogtools.errors import CheckpointError, ExportError
from tests.support.producers import PRODUCERS


@pytest.mark.parametrize("producer", PRODUCERS)
def test_modules_ranks_and_scalings_are_those_of_the_training(producer: str, tmp_path: Path) -> None:
    made = PRODUCERS[producer](tmp_path)
    lora = cogtools.read_lora(made.path)
    assert lora.ranks == {path: len(a) for path, (a, _) in made.factors.items()}
    assert lora.ranks.keys() == lora.scalings.keys()
    if made.options:  # the file has lost it
        assert (set(lora.scalings.values()), lora.scale_source) == ({1.0}, "nothing")
    else:
        assert lora.scalings == pytest.approx(dict(made.scalings))


def test_a_module_is_told_with_its_keys(tmp_path: Path) -> None:
    lora = cogtools.read_lora(PRODUCERS["comfyui_trainer"](tmp_path).path)
    assert lora.modules[0] == cogtools.LoraModule(
        path="transformer_blocks.0.attn1.to_q",
        layer=0,
        name="q",
        rank=4,
        scaling=0.25,
        lora_a="diffusion_model.blocks.0.q.lora_down.weight",
        lora_b="diffusion_model.blocks.0.q.lora_up.weight",
    )
    assert lora.modules[-1].path == "proj_out"
    assert (lora.layout, lora.scale_source, lora.models) == ("comfyui", "alpha tensors", ())


def test_one_factor_without_the_other_is_a_module_all_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({key: torch.ones(4, 1920)}, tmp_path / "a.safetensors")
    (module,) = cogtools.read_lora(tmp_path / "a.safetensors").modules
    assert (module.rank, module.lora_a, module.lora_b) == (4, key, None)


def test_a_file_without_a_lora_is_an_error(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(ExportError, match="there is no LoRA in this checkpoint"):
        cogtools.read_lora(tmp_path / "a.pt")
    with pytest.raises(CheckpointError):
        cogtools.read_lora(tmp_path / "b.pt")
