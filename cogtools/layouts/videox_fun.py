"""VideoX-Fun's layout of a CogVideoX LoRA: diffusers' module names with underscores, as kohya's scripts have them.

    lora_unet__transformer_blocks_N_attn1_to_q.lora_down.weight      (rank, in)
    lora_unet__transformer_blocks_N_attn1_to_q.lora_up.weight        (out, rank)
    lora_unet__transformer_blocks_N_attn1_to_q.alpha                 (): the product is multiplied by alpha / rank

The prefix has two underscores. Since November 2025 it also reads diffusers' names with dots and no prefix, as it
writes them with --use_peft_lora.

Source: VideoX-Fun, videox_fun/utils/lora_utils.py (`LoRANetwork`, `merge_lora`); measured by running them.
"""

from __future__ import annotations

from cogtools.layouts import diffusers
from cogtools.layouts.lora import KOHYA_STYLE, OLD_DIFFUSERS_STYLE, PEFT_STYLE, LoraLayout, Names, Spelling, Usage

PREFIX = "lora_unet__"

_UNDERSCORES = diffusers.NAMES.with_underscores("VideoX-Fun's names")
NAMES = Names(
    _UNDERSCORES.title,
    _UNDERSCORES.layer,
    # It has no embedding of the frame rate's offset.
    {name: row for name, row in _UNDERSCORES.rows.items() if not name.startswith("ofs")},
)
NAMES_WITHOUT_ZERO = diffusers.NAMES_WITHOUT_ZERO.with_underscores("VideoX-Fun's names but to_out for to_out_0")

_STYLES = (KOHYA_STYLE, PEFT_STYLE, OLD_DIFFUSERS_STYLE)

LAYOUT = LoraLayout(
    name="videox-fun",
    reader="VideoX-Fun",
    written=Spelling(NAMES, KOHYA_STYLE, PREFIX),
    scale="alpha_tensors",
    usage=Usage(
        "Load it at lora_weight {weight} (VideoX-Fun's examples have 0.55):",
        ("pipeline = merge_lora(pipeline, {path}, {weight})",),
    ),
    also_read=(
        *(Spelling(NAMES, style, prefix) for style in _STYLES for prefix in (PREFIX, "lora_unet_")),
        *(Spelling(diffusers.NAMES, style, prefix) for style in _STYLES for prefix in ("", "diffusion_model.")),
        *(Spelling(diffusers.NAMES, PEFT_STYLE, prefix, "default") for prefix in ("", "diffusion_model.")),
    ),
)
