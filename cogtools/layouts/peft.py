"""PEFT's layout of a LoRA, and what its LoraConfig means: diffusers' header entry states one, a PEFT folder has a file.

    adapter_model.safetensors      base_model.model.transformer_blocks.N.attn1.to_q.lora_A.weight … as diffusers' names
    adapter_config.json            a LoraConfig

Source: peft 0.21, tuners/lora/config.py (`LoraConfig`), tuners/lora/layer.py (`LoraLayer.update_layer`: the scaling),
tuners/tuners_utils.py (`check_target_module_exists`), utils/other.py (`get_pattern_key`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

FILE_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
TYPE = "LORA"
"""The `peft_type` of a LoRA."""

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

MAX_PATTERNS = 1000
"""The most keys of a rank_pattern or alpha_pattern that are evaluated. Real ones have 168 at most, a key per module."""

_PLAIN_PATTERN = re.compile(r"[\w.^$\\-]{1,200}", re.ASCII)
"""Patterns come from the file. Those with repetitions could be made to take for ever, so they are not evaluated."""


class Pattern(NamedTuple):
    """A key of rank_pattern or alpha_pattern: a module's path or the end of one, perhaps anchored; and its value."""

    key: str
    modules: re.Pattern[str]
    value: float


def plain_pattern(key: str, value: float) -> Pattern | None:
    """A key of rank_pattern or alpha_pattern; None if it is an expression that is not evaluated."""
    if not _PLAIN_PATTERN.fullmatch(key):
        return None
    try:
        return Pattern(key, re.compile(rf"(.*\.)?({key})$"), value)
    except re.error:
        return None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a LoraConfig that says how strong a LoRA is and where it goes. None: not stated, or not usable.

    Attributes:
        rank: `r`.
        alpha: `lora_alpha`.
        rank_pattern: the ranks of modules that have another one; None if some key of it is not evaluated.
        alpha_pattern: the same of alphas.
        rank_stabilised: `use_rslora`.
        targets: `target_modules`, where it is a list.
        excluded: `exclude_modules`, where it is a list.
        has_expression: whether one of these two is a regular expression, which is not evaluated.
        layers: `layers_to_transform`: the only layers that are adapted.
    """

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: tuple[Pattern, ...] | None = ()
    alpha_pattern: tuple[Pattern, ...] | None = ()
    rank_stabilised: bool = False
    targets: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()
    has_expression: bool = False
    layers: frozenset[int] | None = None

    def is_targeted(self, module: str, layer: int) -> bool:
        """Whether `target_modules` names a module: by its whole path, or by the end of it in one of the layers."""
        if self.targets is None or not self.excluded.isdisjoint(path_ends(module)):
            return False
        is_meant = self.layers is None or layer in self.layers
        return module in self.targets or (is_meant and not self.targets.isdisjoint(path_ends(module)))

    def idle_patterns(self, modules: Iterable[str]) -> list[tuple[str, str]]:
        """The keys of rank_pattern and alpha_pattern that are about none of these modules, with the field's name."""
        paths = list(modules)
        return [
            (name, pattern.key)
            for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern in patterns or ()
            if not any(map(pattern.modules.match, paths))
        ]

    def rank_of(self, module: str) -> float | None:
        """The rank that a module has; None if that is not known."""
        return _pattern_value(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float | None:
        """The alpha that a module has; None if that is not known."""
        return _pattern_value(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float | None:
        """What a module's lora_B @ lora_A is multiplied by; None if that is not known."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        if rank is None or alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def path_ends(module: str) -> set[str]:
    """A module's path, and every end of it that begins with a segment."""
    segments = module.split(".")
    return {".".join(segments[first:]) for first in range(len(segments))}


def _pattern_value(patterns: tuple[Pattern, ...] | None, module: str, default: float | None) -> float | None:
    if patterns is None:
        return None
    return next((pattern.value for pattern in patterns if pattern.modules.match(module)), default)
