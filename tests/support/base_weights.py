"""SAT's base weights under diffusers' names, for tests that run the whole transformer.

The names, and how fused rows are divided: diffusers, scripts/convert_cogvideox_to_diffusers.py.
"""

from collections.abc import Iterator, Mapping

import torch

PREFIX = "model.diffusion_model."

RENAMED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}

RENAMED_IN_LAYERS = {
    "transformer.layers.{}.input_layernorm": "norm1.norm",
    "transformer.layers.{}.post_attention_layernorm": "norm2.norm",
    "transformer.layers.{}.attention.dense.original": "attn1.to_out.0",
    "transformer.layers.{}.mlp.dense_h_to_4h": "ff.net.0.proj",
    "transformer.layers.{}.mlp.dense_4h_to_h": "ff.net.2",
    "mixins.adaln_layer.query_layernorm_list.{}": "attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{}": "attn1.norm_k",
}


def diffusers_base(module: Mapping[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The state dict of diffusers' transformer without a LoRA."""
    return {
        f"{target}.{kind}": tensor
        for kind in ("weight", "bias")
        for target, tensor in _renamed({key.removeprefix(PREFIX): value for key, value in module.items()}, kind, layers)
    }


def _renamed(module: Mapping[str, torch.Tensor], kind: str, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    for source, target in RENAMED.items():
        yield target, module[f"{source}.{kind}"]
    for layer in range(layers):
        block = f"transformer_blocks.{layer}"
        for source, target in RENAMED_IN_LAYERS.items():
            yield f"{block}.{target}", module[f"{source.format(layer)}.{kind}"]
        fused = module[f"transformer.layers.{layer}.attention.query_key_value.original.{kind}"]
        yield from zip((f"{block}.attn1.to_{name}" for name in "qkv"), fused.chunk(3), strict=True)
        chunks = module[f"mixins.adaln_layer.adaLN_modulations.{layer}.1.{kind}"].chunk(12)
        yield f"{block}.norm1.linear", torch.cat(chunks[0:3] + chunks[6:9])
        yield f"{block}.norm2.linear", torch.cat(chunks[3:6] + chunks[9:12])
