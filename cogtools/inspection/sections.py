"""What a tensor belongs to, told from its key: one table of rules, the first that fits counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.layouts import sat

if TYPE_CHECKING:
    from collections.abc import Callable


class Rule(NamedTuple):
    """Keys that begin so, or that a function says yes to, belong to this section."""

    section: str
    fits: tuple[str, ...] | Callable[[str], bool]


OTHER = "other"

# In what the trainer writes: SAT's keys. Beside them diffusers' and transformers' keys of the same parts.
RULES = (
    # DeepSpeed, beside the state dict
    Rule("frozen_param_fragments", ("frozen_param_fragments.",)),
    Rule("optimizer", ("optimizer.", "optimizer_state_dict.", "optimizer_states.")),
    Rule("random_states", ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_state")),
    # The state dict
    Rule("lora", sat.is_lora_key),
    Rule(
        "transformer",
        (
            *(sat.PREFIX, "transformer.", "mixins.", "time_embed.", "ofs_embed."),
            *("transformer_blocks.", "patch_embed.", "time_embedding.", "ofs_embedding."),
            *("norm_final.", "norm_out.", "proj_out."),
        ),
    ),
    Rule(
        "text_encoder",
        (
            *("conditioner.", "text_encoder.", "text_model."),
            *("shared.", "encoder.block.", "encoder.embed_tokens.", "encoder.final_layer_norm."),
        ),
    ),
    Rule("vae", ("first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.")),
)

SECTIONS = ("lora", "transformer", "text_encoder", "vae", OTHER, "frozen_param_fragments", "optimizer", "random_states")
"""In the order in which they are shown."""


def section_of(key: str) -> str:
    """The section that a key belongs to."""
    key = sat.unwrapped_key(key)
    for section, fits in RULES:
        if key.startswith(fits) if isinstance(fits, tuple) else fits(key):
            return section
    return OTHER
