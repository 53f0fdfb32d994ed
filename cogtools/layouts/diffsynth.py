"""DiffSynth-Studio's layout of a CogVideoX LoRA, up to its version 1.1.9: 2.0 has no CogVideoX any more.

    blocks.N.attn1.to_q.lora_A.default.weight      (rank, in)
    blocks.N.attn1.to_q.lora_B.default.weight      (out, rank)

Nothing in the file states a scale: it has to be multiplied into the weights. The model that it loads them into is of
CogVideoX-5B's size: 42 layers of hidden size 3072.

Source: DiffSynth-Studio 1.1.9, diffsynth/models/lora.py (`GeneralLoRAFromPeft`) and cog_dit.py; measured by running
them.
"""

from __future__ import annotations

from cogtools.layouts.lora import PEFT_STYLE, LoraLayout, Names, Spelling, Usage

NAMES = Names(
    "DiffSynth-Studio's names",
    "blocks.{}.",
    {
        "q": "attn1.to_q",
        "k": "attn1.to_k",
        "v": "attn1.to_v",
        "out": "attn1.to_out",
        "ff_in": "ff.0",
        "ff_out": "ff.2",
        "norm1": "norm1.linear",
        "norm2": "norm2.linear",
        # beside the layers; the patch embedding is a convolution there, and cannot be adapted
        "text_proj": "context_embedder",
        "time_1": "time_embedder.timestep_embedder.0",
        "time_2": "time_embedder.timestep_embedder.2",
        "norm_out": "norm_out.linear",
        "proj_out": "proj_out",
    },
)
NAMES_WITH_ZERO = Names("DiffSynth-Studio's names but to_out.0 for to_out", NAMES.layer, {"out": "attn1.to_out.0"})

LAYOUT = LoraLayout(
    name="diffsynth",
    reader="DiffSynth-Studio",
    written=Spelling(NAMES, PEFT_STYLE, "", "default"),
    scale="nowhere",
    usage=Usage("Load it at lora_alpha {weight}:", ("model_manager.load_lora({path}, lora_alpha={weight})",)),
    ignores_alphas=True,
    only_size=(42, 3072),
    notes=("DiffSynth-Studio has CogVideoX up to its version 1.1.9 only.",),
    also_read=tuple(
        Spelling(NAMES, PEFT_STYLE, prefix, adapter)
        for prefix in ("", "diffusion_model.")
        for adapter in ("", "default", "default_0")
    ),
)
