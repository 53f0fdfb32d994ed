"""The 3D VAE: what diffusers and SAT call its tensors, and its configuration in diffusers.

Both have the same tensors, row for row. diffusers counts the levels of the decoder from the other end:

    encoder.down.I.block.J      encoder.down_blocks.I.resnets.J
    encoder.mid.block_1, _2     encoder.mid_block.resnets.0, .1          (the decoder's the same)
    decoder.up.I.block.J        decoder.up_blocks.(levels - 1 - I).resnets.J
    ….downsample.conv           ….downsamplers.0.conv
    ….upsample.conv             ….upsamplers.0.conv
    ….nin_shortcut              ….conv_shortcut

Sources: CogVideo, sat/vae_modules/cp_enc_dec.py; diffusers' AutoencoderKLCogVideoX; the released config.json files. The
map was held against encoding and decoding by both.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from cogtools.layouts import sat
from cogtools.layouts.family import LATENT_CHANNELS
from cogtools.layouts.key_map import Mapped, NamedTensor, renamed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cogtools.layouts.family import Model

CLASS_NAME = "AutoencoderKLCogVideoX"
PREFIX = "first_stage_model."
"""What SAT's trainer puts before the keys; a file of the VAE alone has nothing there."""

MAX_LEVELS = 10
"""More levels, or blocks in a level, are not believed. The released VAE has 4 and 3."""

_LOSS = "loss."
LOSS_DROPPED = "the loss and its discriminator: needed to train a VAE only"

_VIDEO_CHANNELS = 3
_COMMON_CONFIG: dict[str, object] = {
    "act_fn": "silu",
    "force_upcast": True,
    "in_channels": _VIDEO_CHANNELS,
    "latents_mean": None,
    "latents_std": None,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": _VIDEO_CHANNELS,
    "sample_height": 480,
    "sample_width": 720,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


class Structure(NamedTuple):
    """The sizes of a VAE.

    Attributes:
        channels: of each level of the encoder.
        blocks: resnets in each level of the encoder; the decoder's levels have one more.
        latent: channels of a latent video.
    """

    channels: tuple[int, ...]
    blocks: int
    latent: int = LATENT_CHANNELS

    def config(self, model: Model, scaling_factor: float | None = None) -> dict[str, object]:
        """The fields of diffusers' config.json.

        Args:
            model: the model whose VAE it is. The weights do not tell.
            scaling_factor: what latents are multiplied by, where the training had another one than the model.
        """
        config = {
            **_COMMON_CONFIG,
            "block_out_channels": list(self.channels),
            "down_block_types": ["CogVideoXDownBlock3D"] * len(self.channels),
            "latent_channels": self.latent,
            "layers_per_block": self.blocks,
            "scaling_factor": model.scaling_factor if scaling_factor is None else scaling_factor,
            "up_block_types": ["CogVideoXUpBlock3D"] * len(self.channels),
        }
        if model.patch_size_t is not None:  # before 0.32 diffusers warns of a field that it does not know
            config["invert_scale_latents"] = True
        return dict(sorted(config.items()))


def bare_key(key: str) -> str:
    """A key without what the trainer and wrappers put before it."""
    return sat.unwrapped_key(key).removeprefix(PREFIX)


def to_diffusers(keys: Iterable[str], structure: Structure) -> Mapped:
    """What the keys of SAT's VAE become in diffusers."""
    bare = {key: bare_key(key) for key in keys}
    dropped = {key: LOSS_DROPPED for key, name in bare.items() if name.startswith(_LOSS)}
    return renamed(bare, tensors(structure), dropped)


_BLOCK_IN_SAT = re.compile(r"encoder\.down\.(\d)\.block\.(\d)\.conv1\.conv\.weight", re.ASCII)
_BLOCK_IN_DIFFUSERS = re.compile(r"encoder\.down_blocks\.(\d)\.resnets\.(\d)\.conv1\.conv\.weight", re.ASCII)


def structure_in_sat(shapes: Mapping[str, tuple[int, ...]]) -> Structure | None:
    """The sizes of the VAE whose tensors, in SAT's layout, are among these; None if there is none, or not all tells."""
    return _structure({bare_key(key): shape for key, shape in shapes.items()}, _BLOCK_IN_SAT)


def structure_in_diffusers(shapes: Mapping[str, tuple[int, ...]]) -> Structure | None:
    """The same in diffusers' layout."""
    return _structure(shapes, _BLOCK_IN_DIFFUSERS)


def _structure(shapes: Mapping[str, tuple[int, ...]], block: re.Pattern[str]) -> Structure | None:
    rows = {(int(match[1]), int(match[2])): shapes[key][:1] for key in shapes if (match := block.fullmatch(key))}
    levels = 1 + max((level for level, _ in rows), default=-1)
    blocks = 1 + max((number for _, number in rows), default=-1)
    channels = [size for level in range(levels) for size in rows.get((level, 0), ())]
    latent = shapes.get("decoder.conv_in.conv.weight", ())
    if not levels or len(channels) != levels or len(latent) != 5:
        return None
    return Structure(tuple(channels), blocks, latent[1])


def structure_of_config(config: Mapping[str, object]) -> Structure | None:
    """The sizes that a config.json of diffusers states; None if it does not state them."""
    channels, blocks, latent = (
        config.get("block_out_channels"),
        config.get("layers_per_block"),
        config.get("latent_channels"),
    )
    if not isinstance(channels, list) or not 0 < len(channels) <= MAX_LEVELS or not all(map(_is_size, channels)):
        return None
    if not (_is_size(blocks) and _is_size(latent) and blocks <= MAX_LEVELS):
        return None
    return Structure(tuple(channels), blocks, latent)


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def tensors(structure: Structure) -> list[NamedTensor]:
    """Every tensor of a VAE, by both names."""
    return [*_encoder(structure), *_decoder(structure)]


def _encoder(structure: Structure) -> list[NamedTensor]:
    channels, last = structure.channels, len(structure.channels) - 1
    found = _conv3d("encoder.conv_in", channels[0], _VIDEO_CHANNELS)
    width = channels[0]
    for level, outputs in enumerate(channels):
        for block in range(structure.blocks):
            names = f"encoder.down_blocks.{level}.resnets.{block}", f"encoder.down.{level}.block.{block}"
            found += _resnet(*names, width, outputs)
            width = outputs
        if level < last:
            names = f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
            found += _weight_and_bias(*names, (width, width, 3, 3))
    for block in (0, 1):
        found += _resnet(f"encoder.mid_block.resnets.{block}", f"encoder.mid.block_{block + 1}", width, width)
    return [*found, *_norm("encoder.norm_out", width), *_conv3d("encoder.conv_out", 2 * structure.latent, width)]


def _decoder(structure: Structure) -> list[NamedTensor]:
    last, latent = len(structure.channels) - 1, structure.latent
    width = structure.channels[-1]
    found = _conv3d("decoder.conv_in", width, latent)
    for block in (0, 1):
        names = f"decoder.mid_block.resnets.{block}", f"decoder.mid.block_{block + 1}"
        found += _resnet(*names, width, width, latent)
    for level, outputs in enumerate(reversed(structure.channels)):
        for block in range(structure.blocks + 1):
            names = f"decoder.up_blocks.{level}.resnets.{block}", f"decoder.up.{last - level}.block.{block}"
            found += _resnet(*names, width, outputs, latent)
            width = outputs
        if level < last:
            names = f"decoder.up_blocks.{level}.upsamplers.0.conv", f"decoder.up.{last - level}.upsample.conv"
            found += _weight_and_bias(*names, (width, width, 3, 3))
    return [
        *found,
        *_norm("decoder.norm_out", width, latent=latent),
        *_conv3d("decoder.conv_out", _VIDEO_CHANNELS, width),
    ]


def _resnet(name: str, sat: str, inputs: int, outputs: int, latent: int | None = None) -> list[NamedTensor]:
    found = [
        *_norm(f"{name}.norm1", inputs, f"{sat}.norm1", latent),
        *_norm(f"{name}.norm2", outputs, f"{sat}.norm2", latent),
        *_conv3d(f"{name}.conv1", outputs, inputs, f"{sat}.conv1"),
        *_conv3d(f"{name}.conv2", outputs, outputs, f"{sat}.conv2"),
    ]
    if inputs != outputs:
        found += _weight_and_bias(f"{name}.conv_shortcut", f"{sat}.nin_shortcut", (outputs, inputs, 1, 1, 1))
    return found


def _norm(name: str, width: int, sat: str | None = None, latent: int | None = None) -> list[NamedTensor]:
    """A norm; where it depends on a latent video, as all of the decoder's do, with two convolutions of that."""
    sat = name if sat is None else sat
    if latent is None:
        return _weight_and_bias(name, sat, (width,))
    found = _weight_and_bias(f"{name}.norm_layer", f"{sat}.norm_layer", (width,))
    for conv in ("conv_y", "conv_b"):
        found += _conv3d(f"{name}.{conv}", width, latent, f"{sat}.{conv}", kernel=1)
    return found


def _conv3d(name: str, outputs: int, inputs: int, sat: str | None = None, kernel: int = 3) -> list[NamedTensor]:
    sat = name if sat is None else sat
    return _weight_and_bias(f"{name}.conv", f"{sat}.conv", (outputs, inputs, kernel, kernel, kernel))


def _weight_and_bias(name: str, sat: str, weight: tuple[int, ...]) -> list[NamedTensor]:
    return [
        NamedTensor(f"{name}.weight", f"{sat}.weight", weight),
        NamedTensor(f"{name}.bias", f"{sat}.bias", weight[:1]),
    ]
