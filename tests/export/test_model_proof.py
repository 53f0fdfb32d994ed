"""What cogtools exports computes in diffusers what it computed in SAT.

The truth is what SAT's own code computed on the CPU, in the folders that `COGTOOLS_REAL_CHECKPOINTS` and
`COGTOOLS_MODEL_TRUTH` name. The whole difference of a forward pass is the epsilon of the last norm, which is 1e-6 in
SAT and 1e-5 in diffusers, as in the blocks of both; where it is set to SAT's, only the order of sums differs.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file
from transformers import T5EncoderModel

import cogtools
from tests.support.models import without_a_word

by_eps = pytest.mark.parametrize(
    ("eps", "most"), [pytest.param(1e-5, 3e-5, id="diffusers'-eps"), pytest.param(1e-6, 5e-6, id="sat's-eps")]
)
FORWARD = ["2b", "5b-i2v", "1.5-5b"]


def run_of(name: str, real: Path, truth: Path) -> Path:
    return {"2b": real / "2b-fp32", "5b-i2v": truth / "5b-i2v-fp32", "1.5-5b": truth / "15-5b-fp32"}[name]


def forward(transformer: Any, passes: dict[str, torch.Tensor]) -> torch.Tensor:
    """One forward pass, with the positions that the pipeline gives."""
    video = passes["x"]
    if "concat_images" in passes:
        video = torch.cat([video, passes["concat_images"]], dim=2)
    frames, height, width = video.shape[1], 8 * video.shape[-2], 8 * video.shape[-1]
    rotary = None
    if transformer.config.use_rotary_positional_embeddings:
        pipeline = cast("CogVideoXPipeline", SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8))
        prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
        rotary = prepare(pipeline, height, width, frames, torch.device("cpu"))
    with torch.no_grad():
        (found,) = transformer(
            video, passes["context"], passes["timesteps"], image_rotary_emb=rotary, return_dict=False
        )
    return cast("torch.Tensor", found)


def load(folder: Path, eps: float) -> Any:
    with without_a_word():
        transformer = CogVideoXTransformer3DModel.from_pretrained(folder)
    transformer.norm_out.norm.eps = eps
    return transformer


@by_eps
@pytest.mark.parametrize("name", FORWARD)
def test_the_base_computes_what_it_did_in_sat(
    name: str, eps: float, most: float, real: Path, truth: Path, tmp_path: Path
) -> None:
    run = run_of(name, real, truth)
    passes = load_file(run / "forward.safetensors")
    cogtools.export_model(run, tmp_path)
    difference = (forward(load(tmp_path / "transformer", eps), passes) - passes["out_base"]).abs().max()
    assert difference < most


@by_eps
@pytest.mark.parametrize("name", FORWARD)
def test_the_base_with_the_exported_lora_computes_what_it_did_in_sat(
    name: str, eps: float, most: float, real: Path, truth: Path, tmp_path: Path
) -> None:
    run = run_of(name, real, truth)
    passes = load_file(run / "forward.safetensors")
    cogtools.export_model(run, tmp_path / "model")
    cogtools.export_lora(run, tmp_path / "lora")
    transformer = load(tmp_path / "model/transformer", eps)
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)
    pipeline.load_lora_weights(str(tmp_path / "lora"), weight_name="pytorch_lora_weights.safetensors")
    assert (forward(transformer, passes) - passes["out_lora"]).abs().max() < most
    assert (forward(transformer, passes) - passes["out_base"]).abs().max() > 0.01


@pytest.mark.parametrize("name", FORWARD)
def test_there_and_back_gives_sat_its_own_bytes(name: str, real: Path, truth: Path, tmp_path: Path) -> None:
    run = run_of(name, real, truth)
    cogtools.export_model(run, tmp_path / "out")
    cogtools.export_model(tmp_path / "out/transformer", tmp_path / "back", format="sat")
    original = torch.load(run / "1/mp_rank_00_model_states.pt", weights_only=False)["module"]
    back = torch.load(tmp_path / "back/1/mp_rank_00_model_states.pt", weights_only=True)["module"]
    unused = "model.diffusion_model.transformer.position_embeddings.weight"
    base = {key.replace(".original.", "."): tensor for key, tensor in original.items()}
    expected = {
        key: torch.zeros_like(tensor) if key == unused else tensor
        for key, tensor in base.items()
        if key.startswith("model.diffusion_model.") and ".matrix_" not in key and "freqs_" not in key
        if name == "5b-i2v" or not key.endswith("pos_embedding")
    }
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in expected.items())


def posterior(vae: Any, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        found = vae.encode(video).latent_dist
    return found.mean, found.logvar


def decoded(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        (found,) = vae.decode(latent, return_dict=False)
    return cast("torch.Tensor", found)


@pytest.mark.parametrize("name", ["2b-fp16", "2b-fp32", "5b-bf16", "2b-bf16-plain"])
def test_a_trainers_vae_and_text_encoder_compute_what_they_did(
    name: str, real: Path, truth: Path, tmp_path: Path
) -> None:
    passes = load_file(truth / f"real-{name}" / "vae.safetensors")
    cogtools.export_model(real / name, tmp_path)
    with without_a_word():
        vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae")
        text_encoder = T5EncoderModel.from_pretrained(tmp_path / "text_encoder", dtype=torch.float32)
    mean, logvar = posterior(vae, passes["video"])
    assert (mean - passes["latent_mean"]).abs().max() < 1e-5
    assert (logvar - passes["latent_logvar"]).abs().max() < 1e-5
    assert (decoded(vae, passes["latent"]) - passes["decoded"]).abs().max() < 1e-5
    passes = load_file(truth / f"real-{name}" / "t5.safetensors")
    with torch.no_grad():
        (hidden,) = text_encoder(passes["input_ids"], return_dict=False)
    assert torch.equal(hidden, passes["hidden"])


def test_a_vae_of_the_real_structure_computes_what_it_did_in_sat(truth: Path, tmp_path: Path) -> None:
    folder = truth / "vae-full-3d-vae-pt"
    passes = load_file(folder / "vae.safetensors")
    report = cogtools.export_model(folder / "3d-vae.pt", tmp_path, model="2b")
    assert report.plan is None
    with without_a_word():
        vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae")
    mean, logvar = posterior(vae, passes["video"])
    assert (mean - passes["latent_mean"]).abs().max() < 1e-5
    assert (logvar - passes["latent_logvar"]).abs().max() < 1e-5
    assert (decoded(vae, passes["latent"]) - passes["decoded"]).abs().max() < 1e-5
    # diffusers takes five latents in chunks of three and two; the truth was computed so
    assert (decoded(vae, passes["latent5"]) - passes["decoded5_in_chunks_3_2"]).abs().max() < 1e-5


def test_a_text_encoder_of_several_blocks_computes_what_it_did(truth: Path, tmp_path: Path) -> None:
    folder = truth / "t5-two-blocks"
    cogtools.export_model(folder / "mp_rank_00_model_states.pt", tmp_path)
    passes = load_file(folder / "t5.safetensors")
    with without_a_word():
        text_encoder = T5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    with torch.no_grad():
        (hidden,) = text_encoder(passes["input_ids"], return_dict=False)
    # The truth is the sum of another order of operations: with the same weights it differs in the last bits.
    assert (hidden - passes["hidden"]).abs().max() < 1e-5
    original = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    found = text_encoder.state_dict()
    assert all(torch.equal(found[key.split(".", 4)[4]], tensor) for key, tensor in original.items())


def test_wrong_positions_would_be_seen(real: Path, tmp_path: Path) -> None:
    """The proof can fail: with the published sizes in place of the training's, the output is another."""
    passes = load_file(real / "2b-fp32/forward.safetensors")
    cogtools.export_model(real / "2b-fp32", tmp_path)
    config = tmp_path / "transformer/config.json"
    config.write_text(
        config.read_text().replace('"spatial_interpolation_scale": 1.875', '"spatial_interpolation_scale": 1.0')
    )
    found = forward(load(tmp_path / "transformer", 1e-6), passes)
    assert (found - passes["out_base"]).abs().max() > 0.01


@by_eps
@pytest.mark.parametrize("name", FORWARD)
def test_the_merged_model_computes_what_sats_merged_model_and_its_lora_did(
    name: str, eps: float, most: float, real: Path, truth: Path, tmp_path: Path
) -> None:
    run = run_of(name, real, truth)
    passes = load_file(run / "forward.safetensors")
    cogtools.merge(run, out=tmp_path)
    found = forward(load(tmp_path / "transformer", eps), passes)
    for expected in ("out_merged", "out_lora"):
        assert (found - passes[expected]).abs().max() < most
    assert (found - passes["out_base"]).abs().max() > 0.01
