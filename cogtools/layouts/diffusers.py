"""diffusers' layout of a CogVideoX LoRA: its names, and the header entry that states its scale.

    transformer.transformer_blocks.N.attn1.to_q.lora_A.weight      (rank, in)
    transformer.transformer_blocks.N.attn1.to_q.lora_B.weight      (out, rank)

The scale, alpha / rank, stands in the safetensors header, in the entry `lora_adapter_metadata`: a JSON object as a
string, with PEFT's LoraConfig fields, each prefixed with "transformer.". The loader does not accept tensors of alphas.

Source: diffusers, loaders/lora_pipeline.py (`CogVideoXLoraLoaderMixin`), loaders/lora_base.py and utils/peft_utils.py
(`_create_lora_config`); which fields each release needs was measured with releases 0.32 to 0.42.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cogtools.layouts.family import LAYER_NUMBER, Transformer, recognise
from cogtools.layouts.lora import OLD_DIFFUSERS_STYLE, PEFT_STYLE, LoraLayout, Names, Spelling, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cogtools.layouts.family import Module

FILE_NAME = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for in a folder."""

METADATA_KEY = "lora_adapter_metadata"
PREFIX = "transformer."

NAMES = Names(
    "diffusers' names",
    "transformer_blocks.{}.",
    {
        "q": "attn1.to_q",
        "k": "attn1.to_k",
        "v": "attn1.to_v",
        "out": "attn1.to_out.0",
        "ff_in": "ff.net.0.proj",
        "ff_out": "ff.net.2",
        "norm1": "norm1.linear",
        "norm2": "norm2.linear",
        # beside the layers
        "patch_proj": "patch_embed.proj",
        "text_proj": "patch_embed.text_proj",
        "time_1": "time_embedding.linear_1",
        "time_2": "time_embedding.linear_2",
        "ofs_1": "ofs_embedding.linear_1",
        "ofs_2": "ofs_embedding.linear_2",
        "norm_out": "norm_out.linear",
        "proj_out": "proj_out",
    },
)

NAMES_WITHOUT_ZERO = Names("diffusers' names but to_out for to_out.0", NAMES.layer, {"out": "attn1.to_out"})
"""How keys that people renamed by hand miss the output projection: nobody reads these."""

LAYOUT = LoraLayout(
    name="diffusers",
    reader="diffusers",
    written=Spelling(NAMES, PEFT_STYLE, PREFIX),
    scale="header",
    usage=Usage(
        "Load it at weight 1.0: the scale is already in the file (no set_adapters or fuse_lora with 1/rank):",
        ('pipe.load_lora_weights({folder}, weight_name={name}, adapter_name="lora")',),
        ('pipe.set_adapters("lora", {weight})',),
    ),
    path=FILE_NAME,
    also_read=(Spelling(NAMES, OLD_DIFFUSERS_STYLE, PREFIX),),
    parts=("A", "B", "bias", "magnitude"),
    reads_convolutions=True,
    library="diffusers",
    stated_note="The scale is stated in the file's header, which diffusers reads from 0.34 on. For older ones, export "
    "with --scale fold; for other programs, with --format.",
)

_BASE_LAYER = re.compile(rf"transformer_blocks\.{LAYER_NUMBER}\.norm1\.norm\.weight", re.ASCII)
_HIDDEN_SIZE = "norm_final.weight"
_PATCH_EMBED = "patch_embed.proj.weight"
_OFS_EMBED = "ofs_embedding.linear_1.weight"


def module_path(module: Module) -> str:
    """A module's path inside the transformer, as diffusers and PEFT name it; every module has one."""
    path = NAMES.path(module)
    if path is None:
        raise ValueError(f"a module without a name: {module}")
    return path


def parse_module(path: str) -> Module | None:
    """The module that a path inside the transformer names; None if none."""
    return NAMES.parse(path)


def recognise_transformer(shapes: Mapping[str, tuple[int, ...]]) -> Transformer | None:
    """The transformer whose base weights, in diffusers' layout, are among these shapes; None if there are none."""
    bare = {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}
    hidden = bare.get(_HIDDEN_SIZE, ())
    layers = [match for match in map(_BASE_LAYER.fullmatch, bare) if match]
    if not layers or len(hidden) != 1:
        return None
    return recognise(hidden[0], len(layers), bare.get(_PATCH_EMBED), ofs_embed=_OFS_EMBED in bare)
