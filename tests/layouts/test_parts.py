"""The VAE's and the text encoder's key maps and configurations, held against diffusers' and transformers' classes."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler
from transformers import T5Config, T5EncoderModel

from cogtools.layouts import pipeline, text_encoder, vae
from cogtools.layouts.family import BY_SLUG, MODELS, Model
from cogtools.layouts.key_map import Mapped, Run
from tests.support.factories import (
    COGVIDEOX_2B,
    COGVIDEOX_VAE,
    TEXT_ENCODER,
    TOY_2B,
    VAE,
    SatModel,
    Shape,
    module_shapes,
)

by_size = pytest.mark.parametrize("model", [COGVIDEOX_2B, TOY_2B], ids=["real size", "toy"])


def keys_of(model: SatModel, prefix: str) -> dict[str, Shape]:
    return {key: shape for key, shape in module_shapes(model, None).items() if key.startswith(prefix)}


@by_size
def test_the_vae_has_the_keys_and_shapes_of_diffusers_class_in_its_order(model: SatModel) -> None:
    shapes = keys_of(model, VAE)
    structure = vae.structure_in_sat(shapes)
    assert structure is not None
    mapped = vae.to_diffusers(shapes, structure)
    found = {target: shapes[runs[0].key] for target, runs in mapped.targets.items()}
    with torch.device("meta"):
        built = AutoencoderKLCogVideoX(**structure.config(BY_SLUG["2b"]))
    expected = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    assert list(found.items()) == list(expected.items())
    assert {item.diffusers: item.shape for item in vae.tensors(structure)} == expected
    assert (mapped.dropped, mapped.unknown, mapped.twice) == ({}, (), ())
    assert vae.structure_in_diffusers(expected) == structure
    assert vae.structure_of_config(structure.config(BY_SLUG["2b"])) == structure


def test_the_released_vae_has_436_tensors_of_four_levels() -> None:
    structure = vae.structure_in_sat(keys_of(COGVIDEOX_2B, VAE))
    assert structure == vae.Structure((128, 256, 256, 512), 3, 16)
    assert len(vae.tensors(structure)) == 436


def test_a_vae_alone_has_no_prefix_and_its_loss_is_dropped() -> None:
    keys = ["encoder.conv_in.conv.bias", "loss.discriminator.blocks.0.weight", "quant_conv.weight"]
    mapped = vae.to_diffusers(keys, vae.Structure((32,), 1))
    assert mapped == Mapped({keys[0]: (Run(keys[0]),)}, {keys[1]: vae.LOSS_DROPPED}, (keys[2],))


@pytest.mark.parametrize("levels", [1, 2, 4, 5])
def test_the_decoders_levels_are_counted_from_the_other_end(levels: int) -> None:
    tensors = vae.tensors(vae.Structure((8,) * levels, 1))
    names = {item.sat: item.diffusers for item in tensors}
    for level in range(levels):
        key = f"decoder.up.{level}.block.1.conv1.conv.weight"
        assert names[key] == f"decoder.up_blocks.{levels - 1 - level}.resnets.1.conv1.conv.weight"


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": None},
        {"block_out_channels": []},
        {"block_out_channels": [0]},
        {"block_out_channels": [8] * 99},
        {"layers_per_block": True},
        {"layers_per_block": 10**6},
        {"latent_channels": "16"},
    ],
)
def test_a_config_that_states_no_sizes_is_none(change: dict[str, object]) -> None:
    assert vae.structure_of_config(vae.Structure((32,), 1).config(BY_SLUG["5b"]) | change) is None


@by_size
def test_the_text_encoder_has_the_keys_and_shapes_of_transformers_class_in_its_order(model: SatModel) -> None:
    shapes = keys_of(model, TEXT_ENCODER)
    structure = text_encoder.structure(shapes)
    assert structure is not None
    mapped = text_encoder.to_transformers(shapes, structure)
    found = {target: shapes[runs[0].key] for target, runs in mapped.targets.items()}
    with torch.device("meta"):
        built = T5EncoderModel(T5Config.from_dict(structure.config("float16")))
    expected = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    del expected[text_encoder.TIED_EMBEDDING]
    assert list(found.items()) == list(expected.items())
    assert {item.diffusers: item.shape for item in text_encoder.tensors(structure)} == expected
    assert mapped.dropped == {TEXT_ENCODER + text_encoder.TIED_EMBEDDING: text_encoder.TIED_DROPPED}
    assert text_encoder.structure_of_config(structure.config("float16")) == structure


def test_the_sizes_of_the_released_text_encoder() -> None:
    structure = text_encoder.structure(keys_of(COGVIDEOX_2B, TEXT_ENCODER))
    assert structure == text_encoder.Structure(24, 4096, 4096, 64, 10240, 32128, 32)


def test_an_embedding_under_its_other_name_alone_is_taken() -> None:
    shapes = keys_of(TOY_2B, TEXT_ENCODER)
    del shapes[TEXT_ENCODER + text_encoder.EMBEDDING]
    structure = text_encoder.structure(shapes)
    assert structure is not None
    mapped = text_encoder.to_transformers(shapes, structure)
    assert mapped.targets[text_encoder.EMBEDDING] == (Run(TEXT_ENCODER + text_encoder.TIED_EMBEDDING),)
    assert mapped.dropped == {}


@pytest.mark.parametrize("model", MODELS, ids=[model.slug for model in MODELS])
def test_the_scheduler_is_made_as_released(model: Model) -> None:
    config = pipeline.scheduler_config(model)
    made = CogVideoXDDIMScheduler.from_config(config)
    assert {key: made.config[key] for key in config if not key.startswith("_")} == {
        key: value for key, value in config.items() if not key.startswith("_")
    }
    assert config["snr_shift_scale"] == (3.0 if model.slug == "2b" else 1.0)
    # The beginning and the end of SAT's noise levels: sqrt of the cumulative alphas, which end at 0.
    assert made.alphas_cumprod[-1] == 0


def test_the_index_of_a_pipeline_is_that_of_the_released_ones() -> None:
    assert json.dumps(pipeline.model_index(BY_SLUG["5b-i2v"]), indent=2) == json.dumps(
        {
            "_class_name": "CogVideoXImageToVideoPipeline",
            "_diffusers_version": "0.31.0.dev0",
            "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
            "text_encoder": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "T5Tokenizer"],
            "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
            "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        },
        indent=2,
    )
    classes = {model.slug: model.pipeline for model in MODELS}
    assert classes == dict.fromkeys(["2b", "5b", "1.5-5b"], "CogVideoXPipeline") | dict.fromkeys(
        ["5b-i2v", "1.5-5b-i2v"], "CogVideoXImageToVideoPipeline"
    )


def test_what_the_vaes_of_the_models_have_apart() -> None:
    structure = vae.Structure((128, 256, 256, 512), 3)
    apart = {
        model.slug: (config["scaling_factor"], config.get("invert_scale_latents"))
        for model in MODELS
        if (config := structure.config(model))
    }
    assert apart == {
        "2b": (1.15258426, None),
        "5b": (0.7, None),
        "5b-i2v": (0.7, None),
        "1.5-5b": (0.7, True),
        "1.5-5b-i2v": (0.7, True),
    }


def test_a_vae_of_other_sizes_is_known_by_its_tensors() -> None:
    model = replace(TOY_2B, vae=replace(COGVIDEOX_VAE, channels=32))
    assert vae.structure_in_sat(keys_of(model, VAE)) == vae.Structure((32, 64, 64, 128), 3)
