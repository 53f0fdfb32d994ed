"""What a tensor belongs to, told from its key: one table of rules, the first that fits counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.layouts import sat
from cogtools.layouts.lora import is_lora_key

if TYPE_CHECKING:
    from collections.abc import Callable


class Rule(NamedTuple):
    """Keys that begin so, or that a function says yes to, belong to this section."""

    section: str
    fits: tuple[str, ...] | Callable[[str], bool]


OTHER = "other"
SECTIONS = ("lora", "transformer", "text_encoder", "vae", OTHER, "frozen_param_fragments", "optimizer", "random_states")
"""In the order in which they are shown."""

CONTAINERS = {
    "frozen_param_fragments": "frozen_param_fragments",
    "optimizer": "optimizer",
    "optimizer_state_dict": "optimizer",
    "optimizer_states": "optimizer",
    "random_rng_state": "random_states",
    "np_rng_state": "random_states",
    "torch_rng_state": "random_states",
    "cuda_rng_state": "random_states",
    "rng_state": "random_states",
}
"""The section of what lies under such a name, whatever its keys are."""

# In what the trainer writes: SAT's keys. Beside them diffusers' and transformers' keys of the same parts.
# fmt: off
RULES = (
    Rule("lora", is_lora_key),
    Rule("transformer", (
        sat.PREFIX, "diffusion_model.", "transformer.", "mixins.", "time_embed.", "ofs_embed.",
        "transformer_blocks.", "patch_embed.", "time_embedding.", "ofs_embedding.",
        "norm_final.", "norm_out.", "proj_out.",
    )),
    Rule("text_encoder", (
        "conditioner.", "text_encoder.", "text_model.",
        "shared.", "encoder.block.", "encoder.embed_tokens.", "encoder.final_layer_norm.",
    )),
    Rule("vae", (
        "first_stage_model.", "vae.", "encoder.", "decoder.", "quant_conv.", "post_quant_conv.",
    )),
)
# fmt: on

MAX_CONTAINER_NAMES = 16
"""How many names on the way to a key are looked at: a hostile file has thousands."""


def section_of(key: str) -> str:
    """The section that a key of the state dict belongs to."""
    key = sat.unwrapped_key(key)
    container = CONTAINERS.get(key.partition(".")[0])
    if container is not None:
        return container
    for section, fits in RULES:
        if key.startswith(fits) if isinstance(fits, tuple) else fits(key):
            return section
    return OTHER


def section_beside(container: str, key: str) -> str:
    """The section of a tensor beside the state dict.

    It is that of its container, where the name of that says what is in it; else that of its key, whatever the
    container is called, so that a copy of the weights counts as what they are.

    Args:
        container: the names that lead to the dict that the tensor is in, joined with dots; "" for the top level.
        key: its key there.
    """
    names = container.split(".")[-MAX_CONTAINER_NAMES:] if container else []
    told = next((CONTAINERS[name] for name in (*names, key.partition(".")[0]) if name in CONTAINERS), None)
    if told is not None:
        return told
    # "lora" as a segment of a key tells a LoRA; as the name of a container it may mean a whole checkpoint.
    names = [name for name in names if name != "lora"]
    paths = (".".join((*names[first:], key)) for first in range(len(names) + 1))
    return next((section for section in map(section_of, paths) if section != OTHER), OTHER)
