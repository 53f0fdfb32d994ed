"""A pipeline of diffusers: its folders, what is in them, and the files that say so.

    model_index.json     which classes the parts are of
    transformer/         config.json, diffusion_pytorch_model.safetensors or shards of it with their index
    vae/                 the same
    text_encoder/        config.json, model.safetensors or shards of it with their index
    tokenizer/           spiece.model, tokenizer_config.json …: nothing of it is in a checkpoint
    scheduler/           scheduler_config.json

Sources: the released CogVideoX pipelines; diffusers' DiffusionPipeline and CogVideoXDDIMScheduler. The scheduler's
values give the noise levels and time steps of SAT's ZeroSNRDDPMDiscretization; the defaults of its class do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cogtools.layouts import text_encoder, vae

if TYPE_CHECKING:
    from cogtools.layouts.family import Model

INDEX = "model_index.json"
CONFIG = "config.json"
TRANSFORMER = "transformer"


class Part(NamedTuple):
    """One folder of a pipeline.

    Attributes:
        name: of the folder, and of the argument that takes it.
        library: that has its class.
        class_name: of its class.
        stem: how the files of its weights are named; None where it has none.
        config: how its configuration is named.
    """

    name: str
    library: str
    class_name: str
    stem: str | None
    config: str = CONFIG

    @property
    def weights_name(self) -> str:
        """The name of its weights where they are in one file."""
        return f"{self.stem}.safetensors"

    @property
    def shard_index(self) -> str:
        """The name of the index of its shards."""
        return f"{self.stem}.safetensors.index.json"

    def shard_name(self, number: int, count: int) -> str:
        """The name of a shard; numbers begin with 1."""
        return f"{self.stem}-{number:05d}-of-{count:05d}.safetensors"


PARTS = {
    part.name: part
    for part in (
        Part(TRANSFORMER, "diffusers", "CogVideoXTransformer3DModel", "diffusion_pytorch_model"),
        Part("vae", "diffusers", vae.CLASS_NAME, "diffusion_pytorch_model"),
        Part("text_encoder", "transformers", text_encoder.CLASS_NAME, "model"),
        Part("tokenizer", "transformers", "T5Tokenizer", None, "tokenizer_config.json"),
        Part("scheduler", "diffusers", "CogVideoXDDIMScheduler", None, "scheduler_config.json"),
    )
}
"""The parts, by their folders' names."""

TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
"""Files of which a tokenizer has one. Without them transformers makes one of 104 tokens, without a word."""

_SCHEDULER: dict[str, object] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def model_index(model: Model) -> dict[str, object]:
    """What model_index.json says."""
    parts = {name: [part.library, part.class_name] for name, part in sorted(PARTS.items())}
    return {"_class_name": model.pipeline, "_diffusers_version": model.diffusers_version, **parts}


def scheduler_config(model: Model, shift_scale: float | None = None) -> dict[str, object]:
    """What scheduler_config.json says.

    Args:
        model: the model.
        shift_scale: the shift of its noise levels, where the training had another one than the model.
    """
    return {
        "_class_name": PARTS["scheduler"].class_name,
        "_diffusers_version": model.diffusers_version,
        **_SCHEDULER,
        "snr_shift_scale": model.snr_shift_scale if shift_scale is None else shift_scale,
    }


def part_config(name: str, model: Model, fields: dict[str, object]) -> dict[str, object]:
    """A config.json of diffusers: its fields, after the class and the release that made it."""
    head = {"_class_name": PARTS[name].class_name, "_diffusers_version": model.diffusers_version}
    return head | fields
