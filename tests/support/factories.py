"""Checkpoints as the SAT trainer writes them, built with torch at any size.

Three layers, each usable alone:

- `SatModel` and `module_shapes` say what a checkpoint's state dict holds: every key and its shape, in the
  trainer's order;
- `sat_state_dict` and `sat_checkpoint` make the tensors, and the dict that DeepSpeed 0.19.8 puts around them;
  `save_run` writes the folder that the trainer puts around that;
- `SAVERS` write one checkpoint in every way a checkpoint is found written, `WRAPPERS` put a state dict where
  people put it, `zoo` holds odd tensors.

Source: checkpoints that the real trainer wrote, to which `test_factories.py` holds names, shapes, storages
and types. For full sizes, and for the members of the family that no such checkpoint exists of: CogVideo,
`sat/configs/*.yaml`, `sat/dit_video_concat.py` and `sat/vae_modules/cp_enc_dec.py`.
"""

import copy
import io
import itertools
import json
import math
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import yaml

Shape: TypeAlias = tuple[int, ...]
StateDict: TypeAlias = OrderedDict[str, torch.Tensor]
Checkpoint: TypeAlias = dict[str, Any]
Base: TypeAlias = Literal["none", "telling", "full"]

TRANSFORMER = "model.diffusion_model."
TEXT_ENCODER = "conditioner.embedders.0.transformer."
VAE = "first_stage_model."

# T5 has one embedding under two keys: the second is a view of the first one's storage.
EMBEDDING = TEXT_ENCODER + "shared.weight"
TIED_EMBEDDING = TEXT_ENCODER + "encoder.embed_tokens.weight"

# What `base="telling"` keeps: the tensors that tell which model a LoRA is for, where they are small.
TELLING_KEYS = tuple(
    TRANSFORMER + key
    for key in (
        "mixins.pos_embed.pos_embedding",
        "mixins.pos_embed.freqs_sin",
        "mixins.patch_embed.proj.weight",
        "transformer.layers.0.input_layernorm.weight",
        "ofs_embed.0.weight",
    )
)
TELLING_MAX_ELEMENTS = 2**21


# --- What a model is made of ---


@dataclass(frozen=True)
class TextEncoder:
    """Sizes of a T5 v1.1 encoder. `inner` is heads x head dimension."""

    blocks: int
    width: int
    inner: int
    heads: int
    feed_forward: int
    vocabulary: int


@dataclass(frozen=True)
class VideoAutoencoder:
    """Sizes of the 3D VAE: `channels` times one of `multipliers` in each level."""

    channels: int
    multipliers: tuple[int, ...]
    blocks_per_level: int


@dataclass(frozen=True)
class SatModel:
    """One CogVideoX model: its sizes, and which of the family's optional tensors it has."""

    name: str
    layers: int
    hidden: int
    heads: int
    patch: Shape  # of patch_embed.proj.weight, without the first dimension (hidden)
    output_rows: int  # of final_layer.linear
    positions: int  # latent patches of a whole video
    text_length: int
    text_hidden: int
    time_embed_dim: int
    pos_embedding: bool  # absolute positions: computed (2B) or learned (5B-I2V)
    freqs: bool  # rotary positions as buffers
    position_embeddings: bool  # SAT's own, unused, which only the absolute-position mixin deletes
    ofs_embed_dim: int | None
    text_encoder: TextEncoder
    vae: VideoAutoencoder

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


T5_XXL = TextEncoder(blocks=24, width=4096, inner=4096, heads=64, feed_forward=10240, vocabulary=32128)
TOY_T5 = TextEncoder(blocks=1, width=32, inner=16, heads=2, feed_forward=32, vocabulary=64)
COGVIDEOX_VAE = VideoAutoencoder(channels=128, multipliers=(1, 2, 2, 4), blocks_per_level=3)
TOY_VAE = VideoAutoencoder(channels=32, multipliers=(1,), blocks_per_level=1)

COGVIDEOX_2B = SatModel(
    name="CogVideoX-2B",
    layers=30,
    hidden=1920,
    heads=30,
    patch=(16, 2, 2),
    output_rows=64,
    positions=13 * 30 * 45,
    text_length=226,
    text_hidden=4096,
    time_embed_dim=512,
    pos_embedding=True,
    freqs=False,
    position_embeddings=False,
    ofs_embed_dim=None,
    text_encoder=T5_XXL,
    vae=COGVIDEOX_VAE,
)
COGVIDEOX_5B = replace(
    COGVIDEOX_2B,
    name="CogVideoX-5B",
    layers=42,
    hidden=3072,
    heads=48,
    pos_embedding=False,
    freqs=True,
    position_embeddings=True,
)
COGVIDEOX_5B_I2V = replace(COGVIDEOX_5B, name="CogVideoX-5B-I2V", patch=(32, 2, 2), pos_embedding=True)
# Since CogVideo's code of 1.5 (commit 3a9af5b) the rotary frequencies are no buffers, and patches are flat.
COGVIDEOX_1_5_5B = replace(
    COGVIDEOX_5B, name="CogVideoX1.5-5B", patch=(128,), output_rows=128, text_length=224, freqs=False
)
COGVIDEOX_1_5_5B_I2V = replace(COGVIDEOX_1_5_5B, name="CogVideoX1.5-5B-I2V", patch=(256,), ofs_embed_dim=512)
MODELS = (COGVIDEOX_2B, COGVIDEOX_5B, COGVIDEOX_5B_I2V, COGVIDEOX_1_5_5B, COGVIDEOX_1_5_5B_I2V)


def toy(model: SatModel) -> SatModel:
    """The same member of the family at the size of the real toy checkpoints."""
    return replace(
        model,
        name=f"toy {model.name}",
        layers=3,
        hidden=128,
        heads=2,
        positions=3 * 4 * 4,
        text_length=16,
        text_hidden=32,
        time_embed_dim=32,
        ofs_embed_dim=None if model.ofs_embed_dim is None else 32,
        text_encoder=TOY_T5,
        vae=TOY_VAE,
    )


TOY_2B = toy(COGVIDEOX_2B)
TOY_5B = toy(COGVIDEOX_5B)
TOY_5B_I2V = toy(COGVIDEOX_5B_I2V)
TOY_1_5_5B = toy(COGVIDEOX_1_5_5B)
TOY_1_5_5B_I2V = toy(COGVIDEOX_1_5_5B_I2V)
TOY_MODELS = (TOY_2B, TOY_5B, TOY_5B_I2V, TOY_1_5_5B, TOY_1_5_5B_I2V)


# --- Keys and shapes ---


def module_shapes(model: SatModel, rank: int | None, layers: Collection[int] | None = None) -> dict[str, Shape]:
    """Every key of the state dict in the trainer's order, and its shape.

    Args:
        rank: of the LoRA; None: a model without LoRA.
        layers: those with LoRA (the trainer's `layer_range`); None: all.
    """
    return (
        _transformer_shapes(model, rank, range(model.layers) if layers is None else layers)
        | _text_encoder_shapes(model.text_encoder)
        | _vae_shapes(model.vae)
    )


def is_lora(key: str) -> bool:
    """Whether a SAT key is one of a LoRA's matrices."""
    return ".matrix_A." in key or ".matrix_B." in key


def _prefixed(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {prefix + key: shape for key, shape in shapes.items()}


def _affine(name: str, rows: int, *columns: int) -> dict[str, Shape]:
    """Weight (rows, *columns) and bias (rows,) of a linear layer, a convolution or (no columns) a norm."""
    return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}


def _transformer_shapes(model: SatModel, rank: int | None, lora_layers: Collection[int]) -> dict[str, Shape]:
    hidden, time = model.hidden, model.time_embed_dim
    shapes: dict[str, Shape] = {}
    if model.pos_embedding:
        shapes["mixins.pos_embed.pos_embedding"] = (1, model.text_length + model.positions, hidden)
    if model.freqs:
        shapes["mixins.pos_embed.freqs_sin"] = (model.positions, model.head_dim)
        shapes["mixins.pos_embed.freqs_cos"] = (model.positions, model.head_dim)
    shapes |= _affine("mixins.patch_embed.proj", hidden, *model.patch)
    shapes |= _affine("mixins.patch_embed.text_proj", hidden, model.text_hidden)
    for layer in range(model.layers):
        shapes |= _affine(f"mixins.adaln_layer.adaLN_modulations.{layer}.1", 12 * hidden, time)
    for part, layer in itertools.product(("query", "key"), range(model.layers)):
        shapes |= _affine(f"mixins.adaln_layer.{part}_layernorm_list.{layer}", model.head_dim)
    shapes |= _affine("mixins.final_layer.norm_final", hidden)
    shapes |= _affine("mixins.final_layer.linear", model.output_rows, hidden)
    shapes |= _affine("mixins.final_layer.adaLN_modulation.1", 2 * hidden, time)
    if model.position_embeddings:
        shapes["transformer.position_embeddings.weight"] = (64, hidden)
    for layer in range(model.layers):
        layer_rank = rank if layer in lora_layers else None
        shapes |= _prefixed(f"transformer.layers.{layer}.", _layer_shapes(hidden, layer_rank))
    shapes |= _affine("transformer.final_layernorm", hidden)
    shapes |= _affine("time_embed.0", time, hidden)
    shapes |= _affine("time_embed.2", time, time)
    if model.ofs_embed_dim is not None:
        shapes |= _affine("ofs_embed.0", model.ofs_embed_dim, model.ofs_embed_dim)
        shapes |= _affine("ofs_embed.2", model.ofs_embed_dim, model.ofs_embed_dim)
    return _prefixed(TRANSFORMER, shapes)


def _layer_shapes(hidden: int, rank: int | None) -> dict[str, Shape]:
    return (
        _affine("input_layernorm", hidden)
        | _projection_shapes("attention.query_key_value", hidden, 3, rank)
        | _projection_shapes("attention.dense", hidden, 1, rank)
        | _affine("post_attention_layernorm", hidden)
        | _affine("mlp.dense_h_to_4h", 4 * hidden, hidden)
        | _affine("mlp.dense_4h_to_h", hidden, 4 * hidden)
    )


def _projection_shapes(name: str, hidden: int, parts: int, rank: int | None) -> dict[str, Shape]:
    """An attention projection of `parts` fused parts, each with a LoRA of its own (rank None: no LoRA)."""
    if rank is None:
        return _affine(name, parts * hidden, hidden)
    shapes = _affine(f"{name}.original", parts * hidden, hidden)
    shapes |= {f"{name}.matrix_A.{part}": (rank, hidden) for part in range(parts)}
    shapes |= {f"{name}.matrix_B.{part}": (hidden, rank) for part in range(parts)}
    return shapes


def _text_encoder_shapes(t5: TextEncoder) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        "shared.weight": (t5.vocabulary, t5.width),
        "encoder.embed_tokens.weight": (t5.vocabulary, t5.width),
    }
    for block in range(t5.blocks):
        attention, feed_forward = f"encoder.block.{block}.layer.0", f"encoder.block.{block}.layer.1"
        for part in ("q", "k", "v"):
            shapes[f"{attention}.SelfAttention.{part}.weight"] = (t5.inner, t5.width)
        shapes[f"{attention}.SelfAttention.o.weight"] = (t5.width, t5.inner)
        if block == 0:
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (32, t5.heads)
        shapes[f"{attention}.layer_norm.weight"] = (t5.width,)
        for part in ("wi_0", "wi_1"):
            shapes[f"{feed_forward}.DenseReluDense.{part}.weight"] = (t5.feed_forward, t5.width)
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (t5.width, t5.feed_forward)
        shapes[f"{feed_forward}.layer_norm.weight"] = (t5.width,)
    shapes["encoder.final_layer_norm.weight"] = (t5.width,)
    return _prefixed(TEXT_ENCODER, shapes)


_RGB, _LATENT = 3, 16  # channels of a video, and of a latent


def _vae_shapes(vae: VideoAutoencoder) -> dict[str, Shape]:
    widths = [vae.channels * multiplier for multiplier in vae.multipliers]
    return _prefixed(VAE + "encoder.", _vae_encoder_shapes(vae, widths)) | _prefixed(
        VAE + "decoder.", _vae_decoder_shapes(vae, widths)
    )


def _vae_encoder_shapes(vae: VideoAutoencoder, widths: list[int]) -> dict[str, Shape]:
    shapes = _conv3d("conv_in", vae.channels, _RGB)
    width = vae.channels
    for level, next_width in enumerate(widths):
        for block in range(vae.blocks_per_level):
            shapes |= _resnet(f"down.{level}.block.{block}", width, next_width, _group_norm)
            width = next_width
        if level != len(widths) - 1:
            shapes |= _affine(f"down.{level}.downsample.conv", width, width, 3, 3)
    for block in (1, 2):
        shapes |= _resnet(f"mid.block_{block}", width, width, _group_norm)
    return shapes | _group_norm("norm_out", width) | _conv3d("conv_out", 2 * _LATENT, width)


def _vae_decoder_shapes(vae: VideoAutoencoder, widths: list[int]) -> dict[str, Shape]:
    width = widths[-1]
    shapes = _conv3d("conv_in", width, _LATENT)
    for block in (1, 2):
        shapes |= _resnet(f"mid.block_{block}", width, width, _spatial_norm)
    levels: dict[int, dict[str, Shape]] = {}
    for level in reversed(range(len(widths))):  # the narrowest is level 0, as in the encoder
        inside: dict[str, Shape] = {}
        for block in range(vae.blocks_per_level + 1):
            inside |= _resnet(f"up.{level}.block.{block}", width, widths[level], _spatial_norm)
            width = widths[level]
        if level:
            inside |= _affine(f"up.{level}.upsample.conv", width, width, 3, 3)
        levels[level] = inside
    for level in range(len(widths)):
        shapes |= levels[level]
    return shapes | _spatial_norm("norm_out", width) | _conv3d("conv_out", _RGB, width)


def _conv3d(name: str, outputs: int, inputs: int, kernel: int = 3) -> dict[str, Shape]:
    return _affine(f"{name}.conv", outputs, inputs, kernel, kernel, kernel)


def _group_norm(name: str, width: int) -> dict[str, Shape]:
    return _affine(name, width)


def _spatial_norm(name: str, width: int) -> dict[str, Shape]:
    return (
        _affine(f"{name}.norm_layer", width)
        | _conv3d(f"{name}.conv_y", width, _LATENT, kernel=1)
        | _conv3d(f"{name}.conv_b", width, _LATENT, kernel=1)
    )


def _resnet(name: str, inputs: int, outputs: int, norm: Callable[[str, int], dict[str, Shape]]) -> dict[str, Shape]:
    shapes = norm(f"{name}.norm1", inputs) | _conv3d(f"{name}.conv1", outputs, inputs)
    shapes |= norm(f"{name}.norm2", outputs) | _conv3d(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        shapes |= _affine(f"{name}.nin_shortcut", outputs, inputs, 1, 1, 1)
    return shapes


# --- Tensors ---


def sat_state_dict(
    model: SatModel,
    rank: int | None,
    dtype: torch.dtype = torch.float16,
    *,
    base: Base = "full",
    seed: int = 0,
    layers: Collection[int] | None = None,
    flat: bool = True,
) -> StateDict:
    """A state dict with random weights, keys in the trainer's order.

    Args:
        base: the base weights beside the LoRA: none, the few small ones that tell the model, or all.
        seed: of all values; the LoRA's do not depend on `base`.
        layers: those with LoRA; None: all.
        flat: the LoRA's tensors are views of one storage, as ZeRO-1 and ZeRO-2 leave them; else each has
            its own, as ZeRO-0 leaves them.
    """
    shapes = {
        key: shape
        for key, shape in module_shapes(model, rank, layers).items()
        if is_lora(key) or _is_kept(key, shape, base)
    }
    state = allocate(shapes, dtype, flat=flat)
    fill_lora(state, seed)
    fill_base(state, seed)
    return state


def _is_kept(key: str, shape: Shape, base: Base) -> bool:
    if base == "telling":
        return key in TELLING_KEYS and math.prod(shape) <= TELLING_MAX_ELEMENTS
    return base == "full"


def allocate(shapes: Mapping[str, Shape], dtype: torch.dtype, *, flat: bool = True) -> StateDict:
    """Tensors with the trainer's storages and without values: memory that nobody touched yet."""
    storage = torch.empty(sum(math.prod(shape) for key, shape in shapes.items() if is_lora(key)), dtype=dtype)
    state: StateDict = OrderedDict()
    start = 0
    for key, shape in shapes.items():
        if flat and is_lora(key):
            end = start + math.prod(shape)
            state[key] = storage[start:end].view(shape)
            start = end
        elif key == TIED_EMBEDDING:
            state[key] = state[EMBEDDING].detach()
        else:
            state[key] = torch.empty(shape, dtype=dtype)
    state._metadata = _module_versions(state)  # type: ignore[attr-defined]
    return state


def _module_versions(keys: Iterable[str]) -> OrderedDict[str, dict[str, int]]:
    """What `torch.nn.Module.state_dict` hangs on a state dict: each module's version."""
    paths = (key.split(".")[:depth] for key in keys for depth in range(key.count(".") + 1))
    return OrderedDict((".".join(path), {"version": 1}) for path in paths)


def fill_lora(state: StateDict, seed: int) -> None:
    """Draw a trained LoRA's values: A as it is initialised (kaiming), B small and not zero."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in state.items():
        if ".matrix_A." in key:
            bound = 1 / math.sqrt(tensor.shape[1])
            tensor.uniform_(-bound, bound, generator=generator)
        elif ".matrix_B." in key:
            tensor.normal_(std=1e-3, generator=generator)


def fill_base(state: StateDict, seed: int) -> None:
    """Draw values for everything that is no LoRA."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in state.items():
        if not is_lora(key):
            tensor.normal_(std=0.02, generator=generator)


# --- What is written around them ---


def sat_checkpoint(
    module: StateDict,
    *,
    iteration: int = 1000,
    mp_world_size: int = 1,
    duplicate_frozen: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """The whole dict that DeepSpeed 0.19.8 saves for SAT under ZeRO-2.

    Args:
        mp_world_size: tensor-parallel ranks.
        duplicate_frozen: the frozen weights' second mention has storages of its own, as on GPU runs,
            where it is a copy on the CPU; else it shares the state dict's.
        seed: of the random states.
    """
    buffers = [key for key in module if key.endswith(("freqs_sin", "freqs_cos"))]
    shared = {TIED_EMBEDDING: EMBEDDING} if TIED_EMBEDDING in module else {}
    lora = {key: tensor for key, tensor in module.items() if is_lora(key)}
    frozen = {key: tensor for key, tensor in module.items() if key not in {*buffers, *shared, *lora}}
    return {
        "module": module,
        "buffer_names": buffers,
        "optimizer": None,
        "param_shapes": [OrderedDict((key, tensor.shape) for key, tensor in lora.items())],
        "frozen_param_shapes": OrderedDict((key, tensor.shape) for key, tensor in frozen.items()),
        "shared_params": shared,
        "frozen_param_fragments": OrderedDict(
            (key, tensor.clone() if duplicate_frozen else tensor.detach()) for key, tensor in frozen.items()
        ),
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": iteration,
        "global_samples": iteration,
        "dp_world_size": 1,
        "mp_world_size": mp_world_size,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": mp_world_size},
        "ds_config": _deepspeed_config(next(iter(module.values())).dtype),
        "ds_version": "0.19.8",
        "iteration": iteration,
        "client_lr_scheduler": {
            "start_lr": 1e-05,
            "warmup_iter": 0.01,
            "num_iters": iteration + 1,
            "decay_style": "linear",
            "end_iter": iteration,
            "decay_ratio": 10.0,
        },
        "random_rng_state": random.Random(seed).getstate(),
        "np_rng_state": np.random.RandomState(seed).get_state(),
        "torch_rng_state": torch.Generator().manual_seed(seed).get_state(),
        "cuda_rng_state": torch.arange(16, dtype=torch.uint8),
    }


def _deepspeed_config(dtype: torch.dtype) -> dict[str, Any]:
    half = {
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return {
        "activation_checkpointing": {"contiguous_memory_optimization": False, "partition_activations": False},
        **({} if dtype == torch.float32 else half),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.1,
        "hysteresis": 2,
        "loss_scale": 0,
        "loss_scale_window": 400,
        "min_loss_scale": 1,
        "steps_per_print": 50,
        "train_micro_batch_size_per_gpu": 1,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "allgather_bucket_size": 1000000,
            "contiguous_gradients": False,
            "cpu_offload": False,
            "load_from_fp32_weights": False,
            "overlap_comm": False,
            "reduce_bucket_size": 1000000,
            "reduce_scatter": True,
            "stage": 2,
        },
    }


def zero3_checkpoint(module: StateDict) -> Checkpoint:
    """The dict that a ZeRO-3 run of one data-parallel rank saves (as `z3_rank_00_model_states.pt`): whole.

    Keys have one more prefix, and every parameter is flat, its true shape an attribute `ds_shape` beside it.
    """
    return {
        "module": OrderedDict(
            (f"module.{key}", tensor if key.endswith(("freqs_sin", "freqs_cos")) else _flattened(tensor))
            for key, tensor in module.items()
        )
    }


def _flattened(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    flat.ds_shape = tensor.shape  # type: ignore[attr-defined]
    return flat


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor of a checkpoint, in the order of its pickle."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def save_run(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    iteration: int = 1000,
    ema: Checkpoint | None = None,
    rank: int,
    alpha: float | None = None,
    layer_range: list[int] | None = None,
) -> Path:
    """Write a trainer's save folder around a checkpoint; return the checkpoint's path in it.

    Args:
        ema: the checkpoint with EMA weights; None: the run had none.
        alpha, layer_range: named in `training_config.yaml` only where given, as a user's config names them.
    """
    params = {"r": rank, "lora_alpha": alpha, "layer_range": layer_range}
    path = _save_iteration(folder / str(iteration), checkpoint)
    if ema is not None:
        _save_iteration(folder / f"{iteration}-ema", ema)
    (folder / "latest").write_text(str(iteration))
    (folder / "model_config.json").write_text(
        json.dumps({"model_class": "SATVideoDiffusionEngine", "model_parallel_size": 1}, indent=4)
    )
    (folder / "training_config.yaml").write_text(
        yaml.safe_dump(_training_config({key: value for key, value in params.items() if value is not None}, iteration))
    )
    return path


def _save_iteration(folder: Path, checkpoint: Checkpoint) -> Path:
    folder.mkdir(parents=True)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save(checkpoint, path)
    return path


def _training_config(lora_params: dict[str, Any], iteration: int) -> dict[str, Any]:
    """The merged config that the trainer writes, without the parts that say nothing about a LoRA."""
    return {
        "args": {
            "experiment_name": "lora-disney",
            "mode": "finetune",
            "model_parallel_size": 1,
            "train_iters": iteration,
        },
        "deepspeed": {"zero_optimization": {"stage": 2}},
        "model": {
            "network_config": {
                "params": {
                    "modules": {
                        "lora_config": {
                            "params": lora_params,
                            "target": "sat.model.finetune.lora2.LoraMixin",
                        }
                    }
                },
                "target": "dit_video_concat.DiffusionTransformer",
            },
            "not_trainable_prefixes": ["all"],
        },
    }


# --- Where people put a state dict ---

WRAPPERS: dict[str, Callable[[StateDict], Any]] = {
    "bare": lambda module: module,
    "module": lambda module: {"module": module},
    "model": lambda module: {"model": module},
    "state_dict": lambda module: {"state_dict": module},
    "state_dict.module": lambda module: {"state_dict": {"module": module}},
}


def with_module_prefix(module: StateDict) -> StateDict:
    """Every key with `module.` before it, as DistributedDataParallel and ZeRO-3 name it."""
    return OrderedDict((f"module.{key}", tensor) for key, tensor in module.items())


def without_prefix(module: StateDict) -> StateDict:
    """The transformer alone, its keys without `model.diffusion_model.`."""
    return OrderedDict(
        (key.removeprefix(TRANSFORMER), tensor) for key, tensor in module.items() if key.startswith(TRANSFORMER)
    )


# --- How a checkpoint is written ---


def save_zip(checkpoint: Any, path: Path) -> None:
    """Write as torch does by default: a zip archive, nothing compressed, with CRC-32s."""
    torch.save(checkpoint, path)


def save_legacy(checkpoint: Any, path: Path) -> None:
    """Write as torch did before 1.6: pickles one after another, then the storages; no zip."""
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)


def save_without_crc32(checkpoint: Any, path: Path) -> None:
    """Write a zip archive whose CRC-32s are all zero: not computed."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint, path)
    finally:
        torch.serialization.set_crc32_options(before)


def save_numpy1(checkpoint: Any, path: Path) -> None:
    """Write with the names that NumPy 1 gives its globals."""
    _save_edited(checkpoint, path, {"data.pkl": _replacing(b"cnumpy._core.", b"cnumpy.core.")})


def save_cuda_tagged(checkpoint: Any, path: Path) -> None:
    """Write with every storage tagged as lying on `cuda:0`."""
    tag, cuda_tag = _pickled_string("cpu"), _pickled_string("cuda:0")
    _save_edited(checkpoint, path, {"data.pkl": _replacing(tag, cuda_tag)})


def save_big_endian(checkpoint: Any, path: Path) -> None:
    """Write as a big-endian machine does."""
    swapped = copy.deepcopy(checkpoint)
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_in(swapped)}
    for tensor in storages.values():
        tensor.untyped_storage().byteswap(tensor.dtype)  # type: ignore[no-untyped-call]
    _save_edited(swapped, path, {"byteorder": _replacing(b"little", b"big")})


def save_deflated(checkpoint: Any, path: Path) -> None:
    """Write as someone's zip tool packs it again: compressed, records not aligned."""
    with (
        zipfile.ZipFile(_saved(checkpoint)) as archive,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in archive.namelist():
            target.writestr(name, archive.read(name))


SAVERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": save_zip,
    "legacy": save_legacy,
    "without-crc32": save_without_crc32,
    "numpy1": save_numpy1,
    "cuda": save_cuda_tagged,
    "big-endian": save_big_endian,
    "deflated": save_deflated,
}

Edit: TypeAlias = Callable[[bytes], bytes]


def _saved(checkpoint: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer


def _save_edited(checkpoint: Any, path: Path, edits: Mapping[str, Edit]) -> None:
    """Write with some records changed, by torch's own writer: layout, alignment and CRC-32s are its."""
    writer = torch._C.PyTorchFileWriter(str(path))
    with zipfile.ZipFile(_saved(checkpoint)) as archive:
        for entry in archive.namelist():
            name = entry.partition("/")[2]
            if name in {"version", ".data/serialization_id"}:  # the writer adds its own
                continue
            record = archive.read(entry)
            if name in edits:
                record = edits[name](record)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()


def _replacing(old: bytes, new: bytes) -> Edit:
    def edit(record: bytes) -> bytes:
        if old not in record:
            raise ValueError(f"the record does not hold {old!r}")
        return record.replace(old, new)

    return edit


def _pickled_string(text: str) -> bytes:
    """A string as pickle protocol 2 writes it: opcode X, length in 4 little-endian bytes, UTF-8."""
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


# --- Odd tensors ---

# What both torch.save (from 2.6 on) and safetensors know.
ZOO_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


def zoo() -> dict[str, torch.Tensor]:
    """Tensors of every dtype, and of every way to lie in a storage."""
    counting = torch.arange(24, dtype=torch.float32)
    grid = counting.reshape(4, 6)
    animals = {str(dtype).removeprefix("torch."): torch.arange(6).to(dtype).reshape(2, 3) for dtype in ZOO_DTYPES}
    return animals | {
        "0-d": torch.tensor(3.5),
        "empty": torch.empty(0),
        "empty (0, 5)": torch.empty(0, 5),
        "transposed": grid.clone().T,
        "sliced with steps": grid.clone()[::2, 1::3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
        "permuted 4-d": counting.clone().reshape(2, 3, 2, 2).permute(3, 1, 0, 2),
        "tied": grid,
        "tied again": grid.view(6, 4),
        "offset view": counting.clone()[7:19].view(3, 4),
        "parameter": torch.nn.Parameter(grid.clone(), requires_grad=False),
        "parameter requiring grad": torch.nn.Parameter(grid.clone() + 1),
        "with an attribute": _flattened(grid.clone() + 2),
    }
