"""The plain way to do what cogtools does, with torch and diffusers.

    python -m benchmarks.plain_way export CHECKPOINT OUT_DIR
    python -m benchmarks.plain_way list CHECKPOINT

As CogVideo's `tools/export_sat_lora_weight.py` does it, and the best straightforward version of that: the
checkpoint is mapped into memory, not read, and a command imports only what it needs. It executes the
checkpoint's pickle and, as that script, it drops the LoRA's scale.
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


def list_tensors(path: str) -> None:
    """Print the key, dtype and shape of every tensor."""
    for key, tensor in load(path).items():
        print(key, tensor.dtype, tuple(tensor.shape))


def main(arguments: list[str]) -> None:
    """Run one of the two commands."""
    match arguments:
        case ["export", path, folder]:
            export(path, folder)
        case ["list", path]:
            list_tensors(path)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
