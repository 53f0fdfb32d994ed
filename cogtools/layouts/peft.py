"""PEFT's layout of a LoRA: a folder with the weights and a LoraConfig.

    adapter_model.safetensors      base_model.model.transformer_blocks.N.attn1.to_q.lora_A.weight … as diffusers' names
    adapter_config.json            the LoraConfig, which states the scale: lora_alpha / r

Source: peft, utils/save_and_load.py (`get_peft_model_state_dict`), peft_model.py (`PeftModel.from_pretrained`).
"""

from __future__ import annotations

from cogtools.layouts import diffusers
from cogtools.layouts.lora import PEFT_STYLE, LoraLayout, Spelling, Usage

FILE_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."

CONFIG_DEFAULTS = {
    "peft_type": "LORA",
    "bias": "none",
    "lora_dropout": 0.0,
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
}
"""The fields of adapter_config.json beside those that state the scale. PEFT needs the first; the rest is for readers
of the file."""

LAYOUT = LoraLayout(
    name="peft",
    reader="PEFT",
    written=Spelling(diffusers.NAMES, PEFT_STYLE, PREFIX),
    scale="adapter_config",
    usage=Usage(
        "Load the folder with PEFT, or with diffusers; both apply the scale:",
        (
            "PeftModel.from_pretrained(pipe.transformer, {folder})",
            'pipe.transformer.load_lora_adapter({folder}, prefix="base_model.model", weight_name={name})',
        ),
    ),
    unstated_scaling=None,
    path=FILE_NAME,
    is_folder=True,
    beside={CONFIG_NAME: None},
    also_read=(Spelling(diffusers.NAMES, PEFT_STYLE, PREFIX, "default"),),
    parts=("A", "B", "bias", "magnitude"),
    ignores_alphas=True,
    reads_convolutions=True,
    library="peft",
    loads_base_weights=True,
)
