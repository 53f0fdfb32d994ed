"""Every layout makes keys and reads them by the same table, and no two read each other's."""

from itertools import product

import pytest

from cogtools.layouts import comfyui, diffsynth, diffusers, sat, videox_fun
from cogtools.layouts.family import (
    ATTENTION,
    BESIDE_LAYERS,
    IN_LAYERS,
    LINEARS,
    MODELS,
    PARTS,
    LoraKey,
    Module,
    Transformer,
    recognise,
)
from cogtools.layouts.lora import LoraLayout, Spelling, lora_keys
from cogtools.layouts.recognition import BY_NAME, LAYOUTS, layout_of, read_names

LAYERS = (0, 7, 41, 999)
KEYS = [
    *(LoraKey(layer, name, part) for layer, name, part in product(LAYERS, IN_LAYERS, PARTS)),
    *(LoraKey(None, name, part) for name, part in product(BESIDE_LAYERS, PARTS)),
]
SPELLINGS = [
    pytest.param(spelling, id=f"{layout.name}-{number}")
    for layout in LAYOUTS
    for number, spelling in enumerate([layout.written, *layout.also_read])
]


def keys_of(spelling: Spelling) -> dict[str, LoraKey]:
    return {key: name for name in KEYS if (key := spelling.key(name)) is not None}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_a_table_writes_it_reads(spelling: Spelling) -> None:
    keys = keys_of(spelling)
    assert keys
    assert {key: spelling.parse(key) for key in keys} == keys


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_key_of_a_table_is_found_among_those_of_base_weights(spelling: Spelling) -> None:
    keys = keys_of(spelling)
    assert lora_keys([*keys, "patch_embed.proj.weight", "vae.alpha"]) == list(keys)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_no_other_layout_reads_its_keys_as_its_own(layout: LoraLayout) -> None:
    for other in LAYOUTS:
        if other is not layout:
            assert [key for key in keys_of(layout.written) if other.parse(key) is not None] == []


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_are_recognised_without_being_told_whose_they_are(spelling: Spelling) -> None:
    keys = {key: name for key, name in keys_of(spelling).items() if name.layer != 999}
    found = read_names(keys)
    assert found is not None
    assert {key: found.readings[key].name for key in keys} == keys
    assert layout_of(found.spelling) is layout_of(spelling)


@pytest.mark.parametrize(
    ("layout", "modules"),
    [("sat", ATTENTION), ("diffusers", None), ("peft", None), ("comfyui", None), ("videox-fun", "ofs"),
     ("diffsynth", "patch_proj ofs")],
)  # fmt: skip
def test_a_layout_has_a_name_for_every_module_that_its_program_has(layout: str, modules: object) -> None:
    named = {name for name in (linear.name for linear in LINEARS) if BY_NAME[layout].written.names.rows.get(name)}
    every = {linear.name for linear in LINEARS}
    if isinstance(modules, tuple):
        assert named == set(modules)
    else:
        lacking = {name for name in every for start in str(modules or "").split() if name.startswith(start)}
        assert named == every - lacking


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        (sat, "model.diffusion_model.transformer.layers.3.attention.query_key_value.matrix_B.1"),
        (diffusers, "transformer.transformer_blocks.3.attn1.to_k.lora_B.weight"),
        (comfyui, "diffusion_model.blocks.3.k.lora_B.weight"),
        (videox_fun, "lora_unet__transformer_blocks_3_attn1_to_k.lora_up.weight"),
        (diffsynth, "blocks.3.attn1.to_k.lora_B.default.weight"),
    ],
    ids=["sat", "diffusers", "comfyui", "videox-fun", "diffsynth"],
)
def test_one_tensor_in_every_layout(layout: object, key: str) -> None:
    assert layout.LAYOUT.key(LoraKey(3, "k", "B")) == key  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "key",
    [
        "transformer.transformer_blocks.01.attn1.to_q.lora_A.weight",
        "transformer.transformer_blocks.1000.attn1.to_q.lora_A.weight",
        "transformer.transformer_blocks.\u0661.attn1.to_q.lora_A.weight",
        "transformer.transformer_blocks.1.attn1.to_q.lora_A.weight ",
        "transformer.transformer_blocks.1.attn1.to_q.lora_A.weight\n",
        "transformer.transformer_blocks.1.attn2.to_q.lora_A.weight",
        "text_encoder.transformer_blocks.1.attn1.to_q.lora_A.weight",
        "lora_te1_transformer_blocks_1_attn1_to_q.lora_down.weight",
        "transformer_blocks.1.attn1.to_q.lora_C.weight",
        "lora_A.weight",
        "",
    ],
)
def test_what_means_nothing_is_not_read(key: str) -> None:
    assert read_names([key]) is None


@pytest.mark.parametrize(
    ("key", "oddity", "reader"),
    [
        ("transformer_blocks.1.attn1.to_q.lora_A.weight", "diffusers' names without a prefix", "VideoX-Fun"),
        ("diffusion_model.transformer_blocks.1.attn1.to_q.lora_A.weight", "diffusers' names after ComfyUI's prefix",
         "VideoX-Fun"),
        ("base_model.model.transformer_blocks.1.attn1.to_q.lora_A.weight", "PEFT's names", "PEFT"),
        ("base_model.model.transformer_blocks.1.attn1.to_q.lora_A.default.weight",
         "PEFT's names with an adapter's name (default)", "PEFT"),
        ("transformer.transformer_blocks.1.attn1.to_q.lora_down.weight",
         "diffusers' names with lora_down and lora_up for lora_A and lora_B", None),
        ("transformer.transformer_blocks.1.attn1.to_q.lora_A.mine.weight",
         "diffusers' names with an adapter's name (mine)", None),
        ("model.diffusion_model.transformer.layers.1.attention.query_key_value.matrix_A.0", "SAT's names", "SAT"),
        ("transformer.base_model.model.transformer_blocks.1.attn1.to_q.lora_A.weight",
         "diffusers' names after diffusers' and PEFT's prefixes", None),
        ("base_model.model.transformer.transformer_blocks.1.attn1.to_q.lora_A.weight",
         "diffusers' names after PEFT's and diffusers' prefixes", None),
        ("pipe.denoiser.transformer_blocks.1.attn1.to_q.lora_A.weight",
         "diffusers' names after an unknown prefix 'pipe.denoiser.'", None),
        ("diffusion_model.blocks.1.q.lora_A.weight", "ComfyUI's names", "ComfyUI"),
        ("lora_unet_blocks_1_q.lora_down.weight", "ComfyUI's names with underscores", "ComfyUI"),
        ("lora_unet__transformer_blocks_1_attn1_to_q.lora_down.weight", "VideoX-Fun's names", "VideoX-Fun"),
        ("blocks.1.attn1.to_q.lora_A.weight", "DiffSynth-Studio's names without an adapter's name", "DiffSynth-Studio"),
        ("transformer.transformer_blocks.1.attn1.to_q.lora_A", "diffusers' names without .weight", None),
    ],
)  # fmt: skip
def test_a_near_miss_is_named_with_who_reads_it(key: str, oddity: str, reader: str | None) -> None:
    found = read_names([key])
    assert found is not None
    reading = found.readings[key]
    layout = reading.layout
    assert (reading.name, reading.oddity) == (LoraKey(1, "q", "A"), oddity)
    assert (None if layout is None else layout.reader) == reader


@pytest.mark.parametrize(
    ("key", "oddity"),
    [
        ("transformer.transformer_blocks.2.attn1.to_out.lora_B.weight", "diffusers' names but to_out for to_out.0"),
        ("blocks.2.attn1.to_out.0.lora_B.weight", "DiffSynth-Studio's names but to_out.0 for to_out"),
        ("lora_unet__transformer_blocks_2_attn1_to_out.lora_up.weight", "VideoX-Fun's names but to_out for to_out_0"),
    ],
)
def test_the_output_projection_without_its_zero_is_a_near_miss_that_nobody_reads(key: str, oddity: str) -> None:
    found = read_names([key])
    assert found is not None
    assert (found.readings[key].name, found.readings[key].oddity) == (LoraKey(2, "out", "B"), oddity)
    assert found.readings[key].layout is None


def test_names_that_two_programs_share_are_told_apart_by_the_others() -> None:
    shared = "lora_unet__transformer_blocks_0_norm1_linear.lora_down.weight"
    found = read_names([shared, "lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight"])
    assert found is not None
    assert found.readings[shared].spelling.names is videox_fun.NAMES


# The family


def test_a_layer_has_eight_modules_and_a_model_those_beside_them_too() -> None:
    counts = {model.slug: len(Transformer(model.layers, model.hidden, (model,)).modules) for model in MODELS}
    # patch_embed.proj is a convolution in the 1.0 models, and counts here as a module all the same
    assert counts == {"2b": 246, "5b": 342, "5b-i2v": 342, "1.5-5b": 342, "1.5-5b-i2v": 344}


def test_models_of_one_size_are_named_together() -> None:
    known = recognise(3072, None)
    assert known is not None
    assert known.name == "CogVideoX 5B family (5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v)"
    assert Transformer(3, 64, (MODELS[0], MODELS[1])).name == "one of the CogVideoX models 2b, 5b"


def test_sizes_are_those_of_the_modules_in_diffusers() -> None:
    """Held against the class itself, which has the real shapes on the meta device."""
    import torch
    from diffusers import CogVideoXTransformer3DModel

    for model in MODELS:
        with torch.device("meta"):
            built = CogVideoXTransformer3DModel(**{**model.config, "num_layers": 1})
        shapes = {
            name: tuple(module.weight.shape) for name, module in built.named_modules() if hasattr(module, "weight")
        }
        transformer = Transformer(1, model.hidden, (model,))
        for module in transformer.modules:
            inputs, outputs = transformer.features(module.name)
            assert shapes[diffusers.module_path(module)][:2] == (outputs, inputs), (model.slug, module)
        assert not any(Module(None, name) in transformer.modules for name in ("ofs_1", "ofs_2")) or model.ofs_embed


def test_a_pipeline_class_is_named_where_all_models_that_fit_have_it() -> None:
    known = {model.slug: Transformer(model.layers, model.hidden, (model,)).pipeline for model in MODELS}
    assert known == {
        "2b": "CogVideoXPipeline",
        "5b": "CogVideoXPipeline",
        "5b-i2v": "CogVideoXImageToVideoPipeline",
        "1.5-5b": "CogVideoXPipeline",
        "1.5-5b-i2v": "CogVideoXImageToVideoPipeline",
    }
    assert Transformer(42, 3072, MODELS[1:]).pipeline is None
    assert Transformer(3, 64, ()).pipeline is None


def test_models_of_other_families_that_sat_trains_are_not_called_cogvideox() -> None:
    other = Transformer(28, 4096, ())
    assert (other.name, other.others) == (
        "not a CogVideoX: hidden size 4096, which VisualGLM-6B and CogVLM have",
        "VisualGLM-6B and CogVLM",
    )
    assert all(Transformer(model.layers, model.hidden, (model,)).others is None for model in MODELS)
