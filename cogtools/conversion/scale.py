"""Where a LoRA's alpha is stated."""

from __future__ import annotations

BY_HAND, BY_CONFIG, BY_DEFAULT = "--alpha", "training_config.yaml", "default"


ALPHA_SOURCES = {
    BY_HAND: "given by --alpha",
    BY_CONFIG: "from training_config.yaml",
    BY_DEFAULT: "SAT's default",
    "lora_adapter_metadata": "stated in the header",
    "adapter_config.json": "from adapter_config.json",
}
"""Where a LoRA's alpha comes from, by the names that reports have for it."""
