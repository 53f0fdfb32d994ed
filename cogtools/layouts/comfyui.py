"""ComfyUI's layout of a CogVideoX LoRA, as its core reads it since CogVideoX is native there.

    diffusion_model.blocks.N.q.lora_A.weight      (rank, in)
    diffusion_model.blocks.N.q.lora_B.weight      (out, rank)
    diffusion_model.blocks.N.q.alpha              (): lora_B @ lora_A is multiplied by alpha / rank, by 1 without it

Source: ComfyUI, comfy/ldm/cogvideo/model.py for the names, comfy/lora.py (`model_lora_keys_unet`) for the prefixes,
comfy/weight_adapter/lora.py for the parts; measured by running its loader.
"""

from __future__ import annotations

from cogtools.layouts.lora import (
    KOHYA_STYLE,
    LINEAR_LAYER_STYLE,
    OLD_DIFFUSERS_STYLE,
    PEFT_STYLE,
    LoraLayout,
    Names,
    Spelling,
    Usage,
)

PREFIX = "diffusion_model."

NAMES = Names(
    "ComfyUI's names",
    "blocks.{}.",
    {
        "q": "q",
        "k": "k",
        "v": "v",
        "out": "attn_out",
        "ff_in": "ff_proj",
        "ff_out": "ff_out",
        "norm1": "norm1.linear",
        "norm2": "norm2.linear",
        # beside the layers
        "patch_proj": "patch_embed.proj",
        "text_proj": "patch_embed.text_proj",
        "time_1": "time_embedding_linear_1",
        "time_2": "time_embedding_linear_2",
        "ofs_1": "ofs_embedding_linear_1",
        "ofs_2": "ofs_embedding_linear_2",
        "norm_out": "norm_out.linear",
        "proj_out": "proj_out",
    },
)

UNDERSCORES = NAMES.with_underscores("ComfyUI's names with underscores")
"""Its second spelling: one underscore after lora_unet, where VideoX-Fun has two."""

_STYLES = (PEFT_STYLE, KOHYA_STYLE, OLD_DIFFUSERS_STYLE, LINEAR_LAYER_STYLE)

LAYOUT = LoraLayout(
    name="comfyui",
    reader="ComfyUI",
    written=Spelling(NAMES, PEFT_STYLE, PREFIX),
    scale="alpha_tensors",
    usage=Usage(
        "Copy it to ComfyUI/models/loras, and load it with the node LoraLoaderModelOnly:",
        ("lora_name {name}, strength_model {weight}",),
    ),
    reads_convolutions=True,
    notes=(
        "ComfyUI itself has CogVideoX since 0.20.1 (April 2026). kijai's wrapper does not read this layout: for that, "
        "export with --format diffusers or videox-fun.",
    ),
    also_read=(
        *(Spelling(NAMES, style, PREFIX) for style in _STYLES),
        *(Spelling(UNDERSCORES, style, "lora_unet_") for style in _STYLES),
        Spelling(NAMES, PEFT_STYLE, PREFIX, "default"),
        Spelling(UNDERSCORES, PEFT_STYLE, "lora_unet_", "default"),
    ),
)
