"""diffusers' layout of a CogVideoX LoRA: its keys, and the metadata that states its scale.

    transformer.transformer_blocks.N.attn1.to_q.lora_A.weight      (rank, hidden)
    transformer.transformer_blocks.N.attn1.to_q.lora_B.weight      (hidden, rank)
    … to_k, to_v, to_out.0

The scale, alpha / rank, stands in the safetensors header, in the entry `lora_adapter_metadata`: a JSON object as a
string, with peft's LoraConfig fields, each prefixed with "transformer.".

Source: diffusers, loaders/lora_pipeline.py (`CogVideoXLoraLoaderMixin`), loaders/lora_base.py and utils/peft_utils.py
(`_create_lora_config`); which fields each release needs was measured with releases 0.32 to 0.42.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from cogtools.layouts.family import LAYER_NUMBER, LoraKey, Transformer, recognise

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""

ADAPTER_METADATA_KEY = "lora_adapter_metadata"
PREFIX = "transformer."

MODULES = {"q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "out": "attn1.to_out.0"}

_PROJECTIONS = {module: projection for projection, module in MODULES.items()}
_MODULE = re.compile(rf"transformer_blocks\.{LAYER_NUMBER}\.(.+)", re.ASCII)
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")

_BASE_LAYER = re.compile(rf"transformer_blocks\.{LAYER_NUMBER}\.norm1\.norm\.weight", re.ASCII)
_HIDDEN_SIZE = "norm_final.weight"
_PATCH_EMBED = "patch_embed.proj.weight"
_OFS_EMBED = "ofs_embedding.linear_1.weight"


def module_path(key: LoraKey) -> str:
    """The module that a LoRA tensor adapts, as a path inside the transformer."""
    return f"transformer_blocks.{key.layer}.{MODULES[key.projection]}"


def parse_module(path: str) -> tuple[int, str] | None:
    """The layer and the projection that a module's path inside the transformer names; None if none."""
    match = _MODULE.fullmatch(path)
    projection = _PROJECTIONS.get(match[2]) if match else None
    return (int(match[1]), projection) if match and projection else None


def diffusers_key(key: LoraKey, prefix: str = PREFIX) -> str:
    """Diffusers' key of a LoRA tensor; with another prefix, that of a library that names modules alike."""
    return f"{prefix}{module_path(key)}.lora_{key.factor}.weight"


def parse_key(key: str, prefix: str = PREFIX) -> LoraKey | None:
    """Which LoRA tensor a key names, matched as a whole; None if none."""
    match = _FACTOR.fullmatch(key[len(prefix) :]) if key.startswith(prefix) else None
    module = parse_module(match[1]) if match else None
    return LoraKey(*module, match[2]) if match and module else None


def recognise_transformer(shapes: Mapping[str, tuple[int, ...]]) -> Transformer | None:
    """The transformer whose base weights, in diffusers' layout, are among these shapes; None if there are none."""
    bare = {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}
    hidden = bare.get(_HIDDEN_SIZE, ())
    layers = [match for match in map(_BASE_LAYER.fullmatch, bare) if match]
    if not layers or len(hidden) != 1:
        return None
    return recognise(hidden[0], len(layers), bare.get(_PATCH_EMBED), ofs_embed=_OFS_EMBED in bare)


def adapter_metadata(rank: int, alpha: float, modules: Iterable[str]) -> str:
    """The header entry that states a LoRA's scale.

    All fields are written that some release from 0.34 to 0.42 needs. `target_modules` has full module paths: so the
    file itself tells which layers it means, and peft does not warn about layers that have no adapter.

    Args:
        rank: of every module.
        alpha: so that the update is alpha / rank * lora_B @ lora_A.
        modules: the paths of the adapted modules.
    """
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(modules),
        "use_dora": False,
        "lora_bias": False,
    }
    return json.dumps({PREFIX + name: value for name, value in config.items()}, sort_keys=True)
