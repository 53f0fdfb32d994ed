"""LoRA files as their trainers write them: real names, small factors. One row for each producer that is known."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support import consumers
from tests.support.consumers import BESIDE, IN_LAYERS, comfyui_name, diffsynth_name

HIDDEN, TIME, TEXT = 8, 6, 10
SIZES = {  # in, out
    "ff.net.0.proj": (HIDDEN, 4 * HIDDEN),
    "ff.net.2": (4 * HIDDEN, HIDDEN),
    "norm1.linear": (TIME, 6 * HIDDEN),
    "norm2.linear": (TIME, 6 * HIDDEN),
    "patch_embed.proj": (16, HIDDEN),
    "patch_embed.text_proj": (TEXT, HIDDEN),
    "time_embedding.linear_1": (HIDDEN, TIME),
    "time_embedding.linear_2": (TIME, TIME),
    "ofs_embedding.linear_1": (TIME, TIME),
    "ofs_embedding.linear_2": (TIME, TIME),
    "norm_out.linear": (TIME, 2 * HIDDEN),
    "proj_out": (HIDDEN, 12),
}
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""lora_A and lora_B, by the module's path in diffusers."""


def size_of(path: str) -> tuple[int, int]:
    """In and out size of a module."""
    return next((size for name, size in SIZES.items() if path.endswith(name)), (HIDDEN, HIDDEN))


def factors(
    names: Iterable[str] = ATTENTION,
    *,
    layers: int = 2,
    beside: Iterable[str] = (),
    ranks: Callable[[str], int] = lambda _: 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Factors:
    """Random factors for these modules in every layer, and for those beside the layers."""
    generator = torch.Generator().manual_seed(seed)
    every = [f"transformer_blocks.{layer}.{name}" for layer in range(layers) for name in names] + list(beside)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {path: (drawn(ranks(path), size_of(path)[0]), drawn(size_of(path)[1], ranks(path))) for path in every}


def spelled(made: Factors, name: Callable[[str], str | None], a: str, b: str) -> dict[str, torch.Tensor]:
    """The tensors under these keys, each with a storage of its own."""
    return {f"{name(path)}.{word}": tensor.clone()
            for path, pair in made.items() for word, tensor in zip((a, b), pair, strict=True)}  # fmt: skip


PEFT_WORDS, KOHYA_WORDS = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")


def after(prefix: str) -> Callable[[str], str]:
    """Names after a prefix."""
    return lambda path: prefix + path


def underscores(prefix: str) -> Callable[[str], str]:
    """Names with underscores for dots, after a prefix."""
    return lambda path: prefix + path.replace(".", "_")


def alphas(made: Factors, name: Callable[[str], str], alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A tensor for each module that states its alpha."""
    return {f"{name(path)}.alpha": torch.tensor(alpha, dtype=dtype) for path in made}


@dataclass
class Produced:
    """A file, and what it means.

    Attributes:
        path: what cogtools is given.
        factors: its modules.
        scalings: what each module's update was multiplied by in training.
        options: what has to be stated by hand, since the file has lost it.
    """

    path: Path
    factors: Factors
    scalings: Mapping[str, float]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def updates(self) -> consumers.Updates:
        """The change of every module's weight in the training."""
        return {path: consumers.product(*pair, self.scalings[path]) for path, pair in self.factors.items()}

    @property
    def formats(self) -> list[str]:
        """Those that can hold it, by what the programs know."""
        names = {path.partition("transformer_blocks.")[2].partition(".")[2] or path for path in self.factors}
        ranks = {len(a) for a, _ in self.factors.values()}
        refused = set()
        if not names <= set(ATTENTION) or len(ranks) > 1 or len(set(self.scalings.values())) > 1:
            refused.add("sat")
        if names & {"patch_embed.proj", "ofs_embedding.linear_1", "ofs_embedding.linear_2"}:
            refused.add("diffsynth")
        if names & {"ofs_embedding.linear_1", "ofs_embedding.linear_2"}:
            refused.add("videox-fun")
        return [name for name in consumers.CONSUMERS if name not in refused]


def produced(path: Path, made: Factors, trained: float | Mapping[str, float], **options: object) -> Produced:
    """A file whose modules all have one scaling, or each its own."""
    scalings = dict.fromkeys(made, trained) if isinstance(trained, (int, float)) else trained
    return Produced(path, made, scalings, dict(options))


def saved(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata or {"format": "pt"})
    return path


def config(made: Factors, folder: Path, **fields: object) -> None:
    """Write PEFT's adapter_config.json."""
    content = {"peft_type": "LORA", "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "bias": "none", **fields}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(content))
    assert made


# Producers


def sat_trainer(folder: Path) -> Produced:
    """SAT's trainer: its save folder, whose configuration states alpha."""
    from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run

    state = sat_state_dict(TOY_2B, 4, torch.bfloat16, base="none")
    save_run(folder / "run", sat_checkpoint(state), rank=4, alpha=2)
    made = {}
    for layer in range(TOY_2B.layers):
        key = f"model.diffusion_model.transformer.layers.{layer}.attention."
        for place, name in enumerate(ATTENTION):
            fused, index = ("query_key_value", place) if place < 3 else ("dense", 0)
            pair = (state[f"{key}{fused}.matrix_A.{index}"], state[f"{key}{fused}.matrix_B.{index}"])
            made[f"transformer_blocks.{layer}.{name}"] = pair
    return produced(folder / "run", made, 0.5)


def lightning_sat(folder: Path) -> Produced:
    """Lightning around SAT: one more prefix, which all keys share."""
    made = factors(dtype=torch.float16)
    state: dict[str, torch.Tensor] = {}
    for path, (a, b) in made.items():
        _, layer, name = path.split(".", 2)
        place = ATTENTION.index(name)
        fused, index = ("query_key_value", place) if place < 3 else ("dense", 0)
        key = f"model.model.diffusion_model.transformer.layers.{layer}.attention.{fused}"
        state |= {f"{key}.matrix_A.{index}": a, f"{key}.matrix_B.{index}": b}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.4.0"}, folder / "epoch=3.ckpt")
    return produced(folder / "epoch=3.ckpt", made, 0.25)


def sats_own_exporter(folder: Path) -> Produced:
    """CogVideo's tools/export_sat_lora_weight.py: diffusers' names, the scale lost: 1/r."""
    made = factors(dtype=torch.bfloat16)
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    return produced(saved(folder / "pytorch_lora_weights.safetensors", tensors), made, 0.25, alpha=1)


def cogvideo_finetune(folder: Path) -> Produced:
    """CogVideo's finetune/: diffusers' names, r 128 and alpha 64 lost."""
    made = factors(dtype=torch.bfloat16)
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    return produced(saved(folder / "pytorch_lora_weights.safetensors", tensors), made, 0.5, scaling=0.5)


def diffusers_example(folder: Path) -> Produced:
    """diffusers' examples/cogvideo: alpha = rank, not stated."""
    made = factors(dtype=torch.float16)
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    return produced(saved(folder / "pytorch_lora_weights.safetensors", tensors), made, 1.0)


def old_diffusers(folder: Path) -> Produced:
    """diffusers before PEFT: lora.down and lora.up."""
    made = factors()
    tensors = spelled(made, after("transformer."), "lora.down.weight", "lora.up.weight")
    return produced(saved(folder / "pytorch_lora_weights.safetensors", tensors), made, 1.0)


def finetrainers(folder: Path) -> Produced:
    """finetrainers: diffusers' names, the scale in a header entry of its own, target_modules a regular expression."""
    made = factors(dtype=torch.bfloat16)
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    stated = {"r": 4, "lora_alpha": 4.0, "init_lora_weights": True,
              "target_modules": "transformer_blocks.*(to_q|to_k|to_v|to_out.0)"}  # fmt: skip
    path = folder / "lora_weights" / "001000" / "pytorch_lora_weights.safetensors"
    return produced(saved(path, tensors, {"format": "pt", "lora_config": json.dumps(stated)}), made, 1.0)


def videox_fun_network(folder: Path) -> Produced:
    """VideoX-Fun's own network (reward LoRAs): all Linears of a 1.5 model, alphas in the weights' dtype."""
    made = factors(IN_LAYERS, layers=42, beside=[name for name in BESIDE if not name.startswith("ofs")],
                   dtype=torch.bfloat16)  # fmt: skip
    assert len(made) == 342
    name = underscores("lora_unet__")
    tensors = spelled(made, name, *KOHYA_WORDS) | alphas(made, name, 2, torch.bfloat16)
    return produced(saved(folder / "CogVideoX-Fun-V1.5-5b-HPS2.1.safetensors", tensors), made, 0.5)


def videox_fun_peft(folder: Path) -> Produced:
    """VideoX-Fun with --use_peft_lora: bare names, q, k and v only, r 64 and alpha 32 lost."""
    made = factors(("attn1.to_q", "attn1.to_k", "attn1.to_v"), dtype=torch.bfloat16)
    path = saved(folder / "checkpoint-100.safetensors", spelled(made, after(""), *PEFT_WORDS))
    return produced(path, made, 0.5, scaling=0.5)


def videox_fun_compatible(folder: Path) -> Produced:
    """The other file that it writes: VideoX-Fun's names without alphas."""
    made = factors(("attn1.to_q", "attn1.to_k", "attn1.to_v"), dtype=torch.bfloat16)
    tensors = spelled(made, underscores("lora_unet__"), *KOHYA_WORDS)
    path = saved(folder / "checkpoint-100-compatible_with_comfyui.safetensors", tensors)
    return produced(path, made, 0.5, alpha=2)


def peft_folder(folder: Path) -> Produced:
    """A PEFT folder (VideoGPA): alpha a float, a scaling above 1."""
    made = factors()
    saved(folder / "adapter_model.safetensors", spelled(made, after("base_model.model."), *PEFT_WORDS))
    config(made, folder, r=4, lora_alpha=8.0)
    return produced(folder, made, 2.0)


def peft_stabilised(folder: Path) -> Produced:
    """A PEFT folder with rank-stabilised scaling, feed-forward modules and ranks and alphas by module."""
    names = (*ATTENTION, "ff.net.0.proj")
    made = factors(names, ranks=lambda path: 9 if path.endswith("to_v") else 4)
    saved(folder / "adapter_model.safetensors", spelled(made, after("base_model.model."), *PEFT_WORDS))
    config(made, folder, r=4, lora_alpha=8, use_rslora=True, rank_pattern={"to_v": 9}, alpha_pattern={"to_q": 2},
           target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"])  # fmt: skip
    scalings = {path: {"to_v": 8 / 3, "to_q": 1.0}.get(path.rpartition(".")[2], 4.0) for path in made}
    return produced(folder, made, scalings)


def saved_peft_model(folder: Path) -> Produced:
    """The state dict of a PeftModel that diffusers saved: both prefixes."""
    made = factors()
    tensors = spelled(made, after("transformer.base_model.model."), *PEFT_WORDS)
    return produced(saved(folder / "pytorch_lora_weights.safetensors", tensors), made, 1.0)


def zero_to_fp32(folder: Path) -> Produced:
    """DeepSpeed's zero_to_fp32.py: a .bin with PEFT's bare names and the adapter's name in them."""
    made = factors()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = spelled(made, after(""), "lora_A.default.weight", "lora_B.default.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    return produced(folder / "pytorch_model.bin", made, 0.75, scaling=0.75)


def second_adapter(folder: Path) -> Produced:
    """An adapter that diffusers called default_0, saved by torch.save."""
    made = factors()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = spelled(made, after("transformer."), "lora_A.default_0.weight", "lora_B.default_0.weight")
    torch.save({"state_dict": tensors}, folder / "lora.pt")
    return produced(folder / "lora.pt", made, 1.0)


def unknown_prefix(folder: Path) -> Produced:
    """Somebody's own wrapper: one prefix that all keys share."""
    made = factors()
    tensors = spelled(made, after("pipe.denoising_model."), *PEFT_WORDS)
    return produced(saved(folder / "lora.safetensors", tensors), made, 1.0)


def diffsynth_exvideo(folder: Path) -> Produced:
    """DiffSynth-Studio (ExVideo): its own names, with an adapter's name, on every module that it can adapt."""
    beside = [name for name in BESIDE if diffsynth_name(name) is not None]
    made = factors(IN_LAYERS, beside=beside)
    tensors = spelled(made, diffsynth_name, "lora_A.default.weight", "lora_B.default.weight")
    return produced(saved(folder / "ExVideo-LoRA.safetensors", tensors), made, 1.0)


def diffsynth_plain(folder: Path) -> Produced:
    """The same without an adapter's name."""
    made = factors()
    return produced(saved(folder / "lora.safetensors", spelled(made, diffsynth_name, *PEFT_WORDS)), made, 1.0)


def comfyui_trainer(folder: Path) -> Produced:
    """ComfyUI's TrainLoraNode: lora_up and lora_down of all Linears of 2B, alphas, and differences of norms and biases.

    The patch embedding of 2B is a convolution, which it leaves out.
    """
    made = factors(
        IN_LAYERS, layers=30, beside=[name for name in BESIDE if not name.startswith(("ofs", "patch_embed.p"))]
    )
    assert len(made) == 245

    def name(path: str) -> str:
        return f"diffusion_model.{comfyui_name(path)}"

    tensors = spelled(made, name, *KOHYA_WORDS) | alphas(made, name, 1.0, torch.float32)
    tensors |= {
        "diffusion_model.blocks.0.norm_q.diff": torch.ones(4),
        "diffusion_model.proj_out.diff_b": torch.ones(12),
    }
    return produced(saved(folder / "ComfyUI_trained_lora.safetensors", tensors), made, 0.25)


def comfyui_underscores(folder: Path) -> Produced:
    """ComfyUI's second spelling: one underscore after lora_unet."""
    made = factors()

    def name(path: str) -> str:
        return f"lora_unet_{comfyui_name(path).replace('.', '_')}"

    tensors = spelled(made, name, *KOHYA_WORDS) | alphas(made, name, 3.0, torch.float32)
    return produced(saved(folder / "lora.safetensors", tensors), made, 0.75)


def mixed_ranks(folder: Path) -> Produced:
    """diffusers' names, two ranks, nothing stated."""
    made = factors(ranks=lambda path: 8 if path.endswith("to_q") else 4)
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    return produced(saved(folder / "pytorch_lora_weights.safetensors", tensors), made, 1.0)


def all_linears_of_5b(folder: Path) -> Produced:
    """Every Linear of 5B, in diffusers' names."""
    made = factors(
        IN_LAYERS, layers=42, beside=[name for name in BESIDE if not name.startswith(("ofs", "patch_embed.p"))]
    )
    assert len(made) == 341
    tensors = spelled(made, after("transformer."), *PEFT_WORDS)
    return produced(saved(folder / "pytorch_lora_weights.safetensors", tensors), made, 2.0, scaling=2.0)


PRODUCERS: dict[str, Callable[[Path], Produced]] = {
    producer.__name__: producer
    for producer in (
        sat_trainer,
        lightning_sat,
        sats_own_exporter,
        cogvideo_finetune,
        diffusers_example,
        old_diffusers,
        finetrainers,
        videox_fun_network,
        videox_fun_peft,
        videox_fun_compatible,
        peft_folder,
        peft_stabilised,
        saved_peft_model,
        zero_to_fp32,
        second_adapter,
        unknown_prefix,
        diffsynth_exvideo,
        diffsynth_plain,
        comfyui_trainer,
        comfyui_underscores,
        mixed_ranks,
        all_linears_of_5b,
    )
}
