"""diffusers loads an export whole, at the training's scale, and computes with it what the trainer computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file

from cogtools.conversion.options import Scale
from cogtools.export.export import export_lora
from cogtools.layouts.diffusers import FILE_NAME
from tests.support.base_weights import diffusers_base
from tests.support.damage import Outcome
from tests.support.diffusers_alone import diffusers_alone, toy_transformer
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run


def loaded(folder: Path, base: dict[str, torch.Tensor] | None = None) -> Any:
    """A toy transformer in single precision with the LoRA of a folder, loaded as users load it."""
    # Made anew: what was rounded to half precision stays rounded, the positions too.
    transformer = CogVideoXTransformer3DModel.from_config(toy_transformer().config)
    if base is not None:
        transformer.load_state_dict(base)
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)
    pipeline.load_lora_weights(str(folder), weight_name=FILE_NAME, adapter_name="lora")
    return transformer


def test_diffusers_takes_every_tensor_of_a_real_checkpoint_in_silence(real_run: Path, tmp_path: Path) -> None:
    export_lora(real_run, tmp_path)
    assert diffusers_alone(tmp_path / FILE_NAME) == Outcome("silent", "", 12, 0, (0.25,))


@pytest.mark.parametrize(
    ("alpha", "scale", "scaling"), [(8, "metadata", 2.0), (8, "fold", 1.0), (0.5, "metadata", 0.125), (8, "none", 1.0)]
)
def test_diffusers_runs_an_export_at_the_scaling_it_states(
    tmp_path: Path, alpha: float, scale: Scale, scaling: float
) -> None:
    run = save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, alpha=alpha)
    export_lora(run, tmp_path / "out", scale=scale)
    assert diffusers_alone(tmp_path / "out" / FILE_NAME) == Outcome("silent", "", 12, 0, (scaling,))


def test_diffusers_takes_a_lora_of_some_layers_in_silence(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, layers=[0, 2]))
    export_lora(save_run(tmp_path / "run", checkpoint, rank=4, layer_range=[0, 2]), tmp_path / "out")
    assert diffusers_alone(tmp_path / "out" / FILE_NAME) == Outcome("silent", "", 8, 0, (0.25,))


@pytest.mark.parametrize("module", ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])
def test_a_layer_computes_what_the_lora_means(tmp_path: Path, module: str) -> None:
    run = save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4, torch.float32)), rank=4, alpha=3)
    export_lora(run, tmp_path)
    layer = loaded(tmp_path).get_submodule(f"transformer_blocks.1.{module}")
    lora = load_file(tmp_path / FILE_NAME)
    a, b = (lora[f"transformer.transformer_blocks.1.{module}.lora_{factor}.weight"] for factor in "AB")
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 3 / 4 * (x @ a.T @ b.T))


@pytest.mark.parametrize("scale", ["metadata", "fold"])
@pytest.mark.parametrize(
    ("eps", "difference"), [pytest.param(1e-5, 3e-5, id="diffusers'-eps"), pytest.param(1e-6, 5e-6, id="sat's-eps")]
)
def test_the_whole_transformer_gives_what_the_trainer_gave(
    real: Path, tmp_path: Path, scale: Scale, eps: float, difference: float
) -> None:
    run = real / "2b-fp32"
    module = torch.load(run / "1" / "mp_rank_00_model_states.pt", weights_only=False, map_location="cpu")["module"]
    passes = load_file(run / "forward.safetensors")
    export_lora(run, tmp_path, scale=scale)
    transformer = loaded(tmp_path, diffusers_base(module, layers=3))
    transformer.norm_out.norm.eps = eps
    with torch.no_grad():
        (found,) = transformer(passes["x"], passes["context"], passes["timesteps"], return_dict=False)
    assert (found - passes["out_lora"]).abs().max() < difference
    assert (found - passes["out_scale1"]).abs().max() > 0.1
    assert (found - passes["out_base"]).abs().max() > 0.01
