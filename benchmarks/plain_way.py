"""The plain way to do what cogtools does, with torch and diffusers.

    python -m benchmarks.plain_way export CHECKPOINT OUT_DIR
    python -m benchmarks.plain_way list CHECKPOINT
    python -m benchmarks.plain_way model CHECKPOINT OUT_DIR

As CogVideo's `tools/export_sat_lora_weight.py` does it, and the best straightforward version of that: the
checkpoint is mapped into memory, not read, and a command imports only what it needs. It executes the
checkpoint's pickle and, as that script, it drops the LoRA's scale. A model (2B's transformer) is renamed, assigned to
diffusers' class without weights of its own, and saved by it.
"""

import re
import sys

import torch

PROJECTIONS = {
    "query_key_value": ("to_q", "to_k", "to_v"),
    "dense": ("to_out.0",),
}
LORA_KEY = re.compile(
    r"model\.diffusion_model\.transformer\.layers\.(\d+)\.attention\.(query_key_value|dense)\.matrix_([AB])\.(\d)"
)


def load(path: str) -> dict[str, torch.Tensor]:
    """Open a checkpoint and return its state dict, the tensors mapped into memory."""
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    state: dict[str, torch.Tensor] = checkpoint["module"]
    return state


def export(path: str, folder: str) -> None:
    """Write the LoRA as diffusers writes one."""
    from diffusers.loaders.lora_base import LoraBaseMixin

    lora = {}
    for key, tensor in load(path).items():
        if match := LORA_KEY.fullmatch(key):
            layer, projection, matrix, part = match.groups()
            target = PROJECTIONS[projection][int(part)]
            lora[f"transformer.transformer_blocks.{layer}.attn1.{target}.lora_{matrix}.weight"] = tensor
    LoraBaseMixin.write_lora_layers(
        state_dict=lora,
        save_directory=folder,
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
    )


RENAMED = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "mixins.patch_embed": "patch_embed",
    "transformer.final_layernorm": "norm_final",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}
RENAMED_IN_LAYERS = {
    "input_layernorm": "norm1.norm",
    "post_attention_layernorm": "norm2.norm",
    "attention.dense": "attn1.to_out.0",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
}
LAYER_KEY = re.compile(r"transformer\.layers\.(\d+)\.(.+)\.(weight|bias)")
ADALN_KEY = re.compile(r"mixins\.adaln_layer\.(adaLN_modulations|query_layernorm_list|key_layernorm_list)\.(\d+)\.(.+)")


def model(path: str, folder: str) -> None:
    """Write the transformer as diffusers writes one."""
    from diffusers import CogVideoXTransformer3DModel

    state: dict[str, torch.Tensor] = {}
    for key, tensor in load(path).items():
        name = key.removeprefix("model.diffusion_model.").replace(".original.", ".")
        if name != key.replace(".original.", ".") and ".matrix_" not in name and "pos_embed" not in name:
            state |= renamed(name, tensor)
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(num_layers=30, num_attention_heads=30)
    transformer.load_state_dict(state, assign=True, strict=True)
    transformer.save_pretrained(folder, max_shard_size="5GB")


def renamed(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a tensor becomes: fused rows are divided."""
    if match := LAYER_KEY.fullmatch(name):
        layer, module, kind = match.groups()
        block = f"transformer_blocks.{layer}"
        if module == "attention.query_key_value":
            return {f"{block}.attn1.to_{part}.{kind}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
        return {f"{block}.{RENAMED_IN_LAYERS[module]}.{kind}": tensor}
    if match := ADALN_KEY.fullmatch(name):
        module, layer, rest = match.groups()
        block = f"transformer_blocks.{layer}"
        if module == "adaLN_modulations":
            chunks, kind = tensor.chunk(12), rest.removeprefix("1.")
            video, text = torch.cat(chunks[0:3] + chunks[6:9]), torch.cat(chunks[3:6] + chunks[9:12])
            return {f"{block}.norm1.linear.{kind}": video, f"{block}.norm2.linear.{kind}": text}
        return {f"{block}.attn1.norm_{module[0]}.{rest}": tensor}
    for old, new in RENAMED.items():
        if name.startswith(f"{old}."):
            return {new + name.removeprefix(old): tensor}
    raise ValueError(name)


def list_tensors(path: str) -> None:
    """Print the key, dtype and shape of every tensor."""
    for key, tensor in load(path).items():
        print(key, tensor.dtype, tuple(tensor.shape))


def main(arguments: list[str]) -> None:
    """Run one of the commands."""
    match arguments:
        case ["export", path, folder]:
            export(path, folder)
        case ["list", path]:
            list_tensors(path)
        case ["model", path, folder]:
            model(path, folder)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
