"""What the trainer's `training_config.yaml` says of the model: what its tensors do not tell.

    model.network_config.params                                    latent_width, latent_height, num_frames
    … .modules.pos_embed_config.target                             Basic3DPositionEmbeddingMixin or Rotary3D…
    … .modules.pos_embed_config.params                             text_length; for 2B {height,time}_interpolation
    model.denoiser_config.params.discretization_config.params      shift_scale
    model.scale_factor

Source: CogVideo's sat/configs/*.yaml and sat/dit_video_concat.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cogtools.checkpoint.plausible import is_positive
from cogtools.conversion.training_config import find_training_config, invalid, load_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath

_HINT = "fix it, or move it away and state the model with --model"

_NETWORK = ("model", "network_config", "params")
_POSITIONS = (*_NETWORK, "modules", "pos_embed_config")
_NOISE = ("model", "denoiser_config", "params", "discretization_config", "params")

_MAX_SIZE = 1 << 16
"""A larger size of a video, or longer text, is not believed."""

_POSITION_KINDS = {"Basic3DPositionEmbeddingMixin": False, "Rotary3DPositionEmbeddingMixin": True}
"""SAT's classes of positions, and whether they are rotary."""


@dataclass(frozen=True, slots=True)
class ModelTraining:
    """The model's part of a training configuration. A field is None if the file does not say.

    Attributes:
        path: the file.
        rotary: whether positions are rotary embeddings.
        sample: config.json's fields of the size that videos and text had: sample_width, sample_height, sample_frames,
            max_text_seq_length.
        interpolation: config.json's fields of how computed positions are scaled.
        shift_scale: the shift of the noise levels.
        scale_factor: what latents are multiplied by.
    """

    path: AnyPath
    rotary: bool | None
    sample: dict[str, int]
    interpolation: dict[str, float]
    shift_scale: float | None
    scale_factor: float | None


def read_model_training(checkpoint: Checkpoint) -> ModelTraining | None:
    """Read the training configuration beside a checkpoint; None if there is none.

    Raises:
        CheckpointError: if it cannot be read, or a value in it is not valid.
    """
    file = find_training_config(checkpoint)
    if file is None:
        return None
    content = load_yaml(file, _HINT)
    network, positions = _inside(content, _NETWORK), _inside(content, _POSITIONS)
    params = _inside(positions, ("params",))
    sizes = {
        "sample_width": ("latent_width", network.get("latent_width")),
        "sample_height": ("latent_height", network.get("latent_height")),
        "sample_frames": ("num_frames", network.get("num_frames")),
        "max_text_seq_length": ("text_length", params.get("text_length")),
    }
    rotary = _POSITION_KINDS.get(str(positions.get("target")).rpartition(".")[2])
    scales = {
        "spatial_interpolation_scale": "height_interpolation",
        "temporal_interpolation_scale": "time_interpolation",
    }
    return ModelTraining(
        path=file.path,
        rotary=rotary,
        sample={field: _size(file.path, name, value) for field, (name, value) in sizes.items() if value is not None},
        interpolation={
            field: _number(file.path, name, params.get(name, 1.0)) or 1.0
            for field, name in (scales.items() if rotary is False else ())
        },
        shift_scale=_number(file.path, "shift_scale", _inside(content, _NOISE).get("shift_scale")),
        scale_factor=_number(file.path, "scale_factor", _inside(content, ("model",)).get("scale_factor")),
    )


def model_config_text(config: Mapping[str, object], *, rotary: bool) -> str:
    """What a training configuration says of a model: SAT does not read it there, cogtools does.

    Args:
        config: the transformer's config.json.
        rotary: whether its positions are rotary embeddings.
    """
    import yaml

    params: dict[str, object] = {"text_length": config["max_text_seq_length"]}
    if not rotary:
        spatial = config["spatial_interpolation_scale"]
        params |= {"height_interpolation": spatial, "width_interpolation": spatial}
        params["time_interpolation"] = config["temporal_interpolation_scale"]
    kind = next(name for name, is_rotary in _POSITION_KINDS.items() if is_rotary == rotary)
    content: dict[str, object] = {
        "latent_width": config["sample_width"],
        "latent_height": config["sample_height"],
        "num_frames": config["sample_frames"],
        "modules": {"pos_embed_config": {"target": f"dit_video_concat.{kind}", "params": params}},
    }
    for name in reversed(_NETWORK):
        content = {name: content}
    return yaml.safe_dump(content, sort_keys=False)


def _inside(content: object, path: tuple[str, ...]) -> dict[object, object]:
    for name in path:
        content = content.get(name) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _size(path: AnyPath, name: str, value: object) -> int:
    if type(value) is not int or not 0 < value <= _MAX_SIZE:
        raise invalid(path, name, value, "a whole number, 1 or more", _HINT)
    return value


def _number(path: AnyPath, name: str, value: object) -> float | None:
    if value is not None and not is_positive(value):
        raise invalid(path, name, value, "a number above 0", _HINT)
    return None if value is None else float(value)
