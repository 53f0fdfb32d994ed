"""LoRA files in diffusers' layout, with any modules, ranks and scales; and what they add to weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cogtools.conversion.scale import carry
from cogtools.layouts import diffusers
from cogtools.layouts.family import BY_NAME, IN_LAYERS, LoraKey, Module

SIZES = {"h": 128, "4h": 512, "time": 32, "6h": 768, "2h": 256, "patch_out": 64, "patch_in": 64, "text": 32, "ofs": 32}
"""The sizes of the modules of a toy model; `patch_in` and `patch_out` are those of the 1.0 models for text only."""


@dataclass
class ToyLora:
    """A LoRA of a toy transformer.

    Attributes:
        ranks: of its modules.
        alphas: the same; a module that is not in it has its rank for alpha.
        dtype: of its tensors.
        seed: of its values.
        size: the standard deviation of lora_B.
        sizes: of the modules that are not as in `SIZES`.
        convolution: the channels of the patch embedding, where that is a convolution.
    """

    ranks: Mapping[Module, int]
    alphas: Mapping[Module, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    size: float = 0.02
    sizes: Mapping[str, int] = field(default_factory=dict)
    convolution: int | None = None

    def factors(self) -> dict[LoraKey, torch.Tensor]:
        """Its tensors."""
        generator, sizes = torch.Generator().manual_seed(self.seed), {**SIZES, **self.sizes}
        found = {}
        for module, rank in self.ranks.items():
            linear = BY_NAME[module.name]
            a = torch.randn(rank, sizes[linear.inputs], generator=generator) / 11
            b = torch.randn(sizes[linear.outputs], rank, generator=generator) * self.size
            if module.name == "patch_proj" and self.convolution is not None:
                a, b = a.view(rank, self.convolution, 2, 2), b.view(-1, rank, 1, 1)
            found[LoraKey(*module, "A")] = a.to(self.dtype)
            found[LoraKey(*module, "B")] = b.to(self.dtype)
        return found

    def updates(self) -> dict[Module, torch.Tensor]:
        """What it adds to each module's weight, in double precision."""
        factors = self.factors()
        return {
            module: self.scaling(module)
            * (factors[LoraKey(*module, "B")].double().flatten(1) @ factors[LoraKey(*module, "A")].double().flatten(1))
            for module in self.ranks
        }

    def scaling(self, module: Module) -> float:
        """Its alpha over its rank."""
        return self.alphas.get(module, self.ranks[module]) / self.ranks[module]

    def save(self, path: Path) -> Path:
        """Write it as diffusers has it."""
        alphas = {module: self.alphas.get(module, float(rank)) for module, rank in self.ranks.items()}
        tensors = {diffusers.LAYOUT.key(name) or "": tensor for name, tensor in self.factors().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=carry(diffusers.LAYOUT, self.ranks, alphas).header)
        return path


def attention(rank: int, layers: int = 3) -> dict[Module, int]:
    """This rank in the attention of every layer."""
    return {Module(layer, name): rank for layer in range(layers) for name in ("q", "k", "v", "out")}


def every_module(rank: int, *, ofs: bool = False) -> dict[Module, int]:
    """This rank in every module that LoRAs can adapt, of three layers."""
    beside = [name for name, linear in BY_NAME.items() if not linear.in_layers and (ofs or not name.startswith("ofs"))]
    in_layers = {Module(layer, name): rank for layer in range(3) for name in IN_LAYERS}
    return in_layers | {Module(None, name): rank for name in beside}


def updates_in(path: Path) -> dict[Module, torch.Tensor]:
    """What a file in diffusers' layout adds to each module's weight where its scaling is 1, in double precision."""
    found = {diffusers.LAYOUT.parse(key): tensor.double() for key, tensor in load_file(path).items()}
    factors = {name: tensor for name, tensor in found.items() if name is not None}
    assert len(factors) == len(found)
    return {name.module: factors[name._replace(part="B")] @ factors[name] for name in factors if name.part == "A"}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The Frobenius norm of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())
