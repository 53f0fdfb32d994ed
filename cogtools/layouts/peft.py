"""PEFT's layout of a LoRA, and what its LoraConfig means: diffusers' header entry states one, a PEFT folder has a file.

    adapter_model.safetensors      base_model.model.transformer_blocks.N.attn1.to_q.lora_A.weight … as diffusers' names
    adapter_config.json            a LoraConfig

Source: peft 0.21, tuners/lora/config.py (`LoraConfig`), tuners/lora/layer.py (`LoraLayer.update_layer`: the scaling),
tuners/tuners_utils.py (`check_target_module_exists`), utils/other.py (`get_pattern_key`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."

# fmt: off
CONFIG_FIELDS = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path",
    "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "monteclora_config", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
    "use_rslora", "velora_config",
})
# fmt: on
"""Every field of LoraConfig. diffusers hands all that a file states to it, and a field that it has not is an error."""

_PLAIN_PATTERN = re.compile(r"[\w.^$\\-]{1,200}", re.ASCII)
"""Patterns come from the file. Those with repetitions could be made to take for ever, so they are not evaluated."""


def is_plain_pattern(pattern: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern is a module's path or the end of one, perhaps anchored."""
    if not _PLAIN_PATTERN.fullmatch(pattern):
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a LoraConfig that says how strong a LoRA is and where it goes. None: not stated, or not usable.

    Attributes:
        rank: `r`.
        alpha: `lora_alpha`.
        rank_pattern: the ranks of modules that have another one.
        alpha_pattern: the alphas of modules that have another one.
        rank_stabilised: `use_rslora`.
        targets: `target_modules`, where it is a list.
        layers: `layers_to_transform`: the only layers that are adapted.
    """

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False
    targets: frozenset[str] | None = None
    layers: frozenset[int] | None = None

    def is_targeted(self, module: str, layer: int) -> bool:
        """Whether `target_modules` names a module: by its whole path, or by the end of it in one of the layers."""
        if self.targets is None or module in self.targets:
            return self.targets is not None
        segments = module.split(".")
        ends = (".".join(segments[first:]) for first in range(1, len(segments)))
        return any(end in self.targets for end in ends) and (self.layers is None or layer in self.layers)

    def rank_of(self, module: str) -> float | None:
        """The rank that a module has."""
        return _pattern_value(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float | None:
        """The alpha that a module has."""
        return _pattern_value(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float | None:
        """What a module's lora_B @ lora_A is multiplied by."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        if rank is None or alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _pattern_value(pattern: Mapping[str, float], module: str, default: float | None) -> float | None:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
