"""What a LoRA is, as plain data for scripts: its modules with their ranks and scalings.

>>> lora = cogtools.read_lora("loras/disney.safetensors")
>>> lora.scalings["transformer_blocks.0.attn1.to_q"]
0.25
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.lora import find_lora, find_transformer, scale_of
from cogtools.conversion.refusals import no_lora
from cogtools.layouts.diffusers import module_path
from cogtools.layouts.family import LoraKey

if TYPE_CHECKING:
    import os

    from cogtools.checkpoint.paths import AnyPath, RemotePath


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module.

    Attributes:
        path: its path inside diffusers' transformer: "transformer_blocks.0.attn1.to_q".
        layer: the layer that it lies in; None if it lies beside the layers.
        name: cogtools' short name for it: "q", "ff_in", "proj_out" …
        rank: the rank of its factors.
        scaling: what lora_B @ lora_A is multiplied by; None if that cannot be told.
        lora_a: the key of lora_A in the file, of shape (rank, in); None if it is missing.
        lora_b: the key of lora_B, of shape (out, rank); None if it is missing.
    """

    path: str
    layer: int | None
    name: str
    rank: int
    scaling: float | None
    lora_a: str | None
    lora_b: str | None


@dataclass(frozen=True, slots=True)
class LoraSummary:
    """A LoRA, whatever layout its file is in.

    Attributes:
        file: the file that it is in.
        layout: whose names its keys have: "sat", "diffusers", "peft", "comfyui", "videox-fun" or "diffsynth"; None if
            they are no known program's.
        model: the model that it belongs to, or what can be said of it.
        models: the short names of the published models that fit.
        scale_source: where the scale is stated, as in reports: "training_config.yaml", "lora_adapter_metadata" …;
            "default" for SAT's default alpha, "nothing" where it is taken as 1; None if what is stated cannot be used.
        modules: the adapted modules: by layer, then those beside the layers.
    """

    file: AnyPath
    layout: str | None
    model: str | None
    models: tuple[str, ...]
    scale_source: str | None
    modules: tuple[LoraModule, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every module, by its path."""
        return {module.path: module.rank for module in self.modules}

    @property
    def scalings(self) -> dict[str, float | None]:
        """What the update of every module is multiplied by, by its path."""
        return {module.path: module.scaling for module in self.modules}


def read_lora(
    path: str | os.PathLike[str] | RemotePath, *, iteration: int | None = None, ema: bool = False
) -> LoraSummary:
    """Find out what the LoRA in a checkpoint or a LoRA file consists of. No weights are read.

    Args:
        path: a file or folder with a LoRA in any layout.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.

    Raises:
        CheckpointError: if it cannot be read.
        ExportError: if there is no LoRA in it.
    """
    with open_checkpoint(path, iteration=iteration, ema=ema) as checkpoint:
        lora = find_lora(checkpoint)
        if lora is None or not lora.tensors:
            raise no_lora(checkpoint)
        scale, transformer = scale_of(lora), find_transformer(checkpoint, lora)
        scalings = {} if scale is None else scale.scalings
        keys = {name: tensor.key for name, tensor in lora.tensors.items()}
        modules = tuple(
            LoraModule(
                module_path(module),
                *module,
                lora.ranks[module],
                scalings.get(module),
                keys.get(LoraKey(*module, "A")),
                keys.get(LoraKey(*module, "B")),
            )
            for module in lora.modules
            if module in lora.ranks
        )
        return LoraSummary(
            file=checkpoint.path,
            layout=None if lora.layout is None else lora.layout.name,
            model=None if transformer is None else transformer.name,
            models=() if transformer is None else tuple(model.slug for model in transformer.models),
            scale_source=None if scale is None else scale.source,
            modules=modules,
        )
