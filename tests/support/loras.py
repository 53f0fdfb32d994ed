"""LoRAs as each program has them: three layers of hidden size 128, rank 4, fp32."""

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

from cogtools.conversion.scale import carry
from cogtools.layouts.family import ATTENTION, LoraKey, Transformer
from cogtools.layouts.lora import LoraLayout

LAYERS, HIDDEN, RANK = 3, 128, 4
TRANSFORMER = Transformer(LAYERS, HIDDEN, ())
OTHER_SIZE = 64
"""Of the side of a module's factor that a model of no published size does not tell."""

Factors = dict[LoraKey, torch.Tensor]


def factors(names: tuple[str, ...] = ATTENTION, *, dtype: torch.dtype = torch.float32) -> Factors:
    """A LoRA of these modules in every layer, no two tensors alike."""
    made: Factors = {}
    for layer, name, part in product(range(LAYERS), names, "AB"):
        key = LoraKey(layer, name, part)
        shape = TRANSFORMER.lora_shape(key, RANK)
        assert shape is not None
        sizes = [OTHER_SIZE if size is None else size for size in shape]
        made[key] = torch.rand(sizes, generator=torch.Generator().manual_seed(len(made))).to(dtype)
    return made


def save_lora(folder: Path, layout: LoraLayout, tensors: Mapping[LoraKey, torch.Tensor], alpha: float | None) -> Path:
    """Save a LoRA as the program of a layout has it; with an alpha, where it states one."""
    ranks = {key.module: tensor.shape[0] for key, tensor in tensors.items() if key.part == "A"}
    header, files, alphas = ({}, {}, {}) if alpha is None else carry(layout, ranks, dict.fromkeys(ranks, alpha))
    scalars = {LoraKey(*module, "alpha"): torch.tensor(float(value)) for module, value in alphas.items()}
    named = {str(layout.key(key)): tensor for key, tensor in {**tensors, **scalars}.items()}
    path = folder / (layout.path or "lora.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout.container == "torch":
        torch.save({"module": named}, path)
    else:
        save_file(named, path, metadata=header or None)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return path


def lora_keys(layers: Iterable[int]) -> list[LoraKey]:
    """Both factors of the attention's modules in these layers."""
    return [LoraKey(layer, name, factor) for layer in layers for name in ATTENTION for factor in "AB"]
