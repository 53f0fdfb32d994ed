"""Whole models for tests: checkpoints in SAT's layout, small, and what their parts are loaded with."""

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers.models.embeddings import CogVideoXPatchEmbed
from safetensors.torch import load_file

from tests.support.factories import MODELS as SAT_MODELS
from tests.support.factories import (
    TEXT_ENCODER,
    TRANSFORMER,
    VAE,
    SatModel,
    StateDict,
    sat_checkpoint,
    sat_state_dict,
    save_run,
)

POSITIONS = f"{TRANSFORMER}mixins.pos_embed.pos_embedding"

SAMPLE = {"latent_width": 8, "latent_height": 8, "num_frames": 9}
"""The sizes for which the toys' 48 positions are: 3 latent frames of 4 x 4 patches."""


def save_model_run(
    folder: Path,
    model: SatModel,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float16,
    state: StateDict | None = None,
    config: bool = True,
    seed: int = 0,
) -> Path:
    """Write a save folder with a whole model; its training_config.yaml states what the trainer's does of a model."""
    state = sat_state_dict(model, rank, dtype, seed=seed) if state is None else state
    if POSITIONS in state and not model.freqs:
        state[POSITIONS] = computed_positions(model).to(state[POSITIONS].dtype)
    save_run(folder, sat_checkpoint(state), rank=rank or 4)
    path = folder / "training_config.yaml"
    if config:
        content = yaml.safe_load(path.read_text())
        content["model"] |= model_config(model)
        path.write_text(yaml.safe_dump(content))
    else:
        path.unlink()
    return folder


def computed_positions(model: SatModel) -> torch.Tensor:
    """The positions that a toy without rotary ones was trained with, as diffusers computes them."""
    embed = CogVideoXPatchEmbed(
        embed_dim=model.hidden, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=model.text_length,
        spatial_interpolation_scale=1.875,
    )  # fmt: skip
    return cast("torch.Tensor", embed.pos_embedding)


def model_config(model: SatModel) -> dict[str, Any]:
    """The model's part of training_config.yaml."""
    rotary = model.freqs or model.patch[:1] != (16,) or model.position_embeddings
    interpolation = {} if rotary else {"height_interpolation": 1.875, "width_interpolation": 1.875}
    kind = "Rotary3DPositionEmbeddingMixin" if rotary else "Basic3DPositionEmbeddingMixin"
    return {
        "scale_factor": 0.7 if rotary else 1.15258426,
        "denoiser_config": {"params": {"discretization_config": {"params": {"shift_scale": 1.0 if rotary else 3.0}}}},
        "network_config": {
            "params": {
                **SAMPLE,
                "modules": {
                    "pos_embed_config": {
                        "params": {"text_length": model.text_length, **interpolation},
                        "target": f"dit_video_concat.{kind}",
                    },
                },
            },
            "target": "dit_video_concat.DiffusionTransformer",
        },
    }


def transformer_of(state: Mapping[str, torch.Tensor]) -> StateDict:
    """The transformer's tensors of a state dict."""
    return _with_prefix(state, TRANSFORMER)


def vae_of(state: Mapping[str, torch.Tensor]) -> StateDict:
    """The VAE's tensors of a state dict, without the trainer's prefix, as in a file of its own."""
    return OrderedDict((key.removeprefix(VAE), tensor) for key, tensor in _with_prefix(state, VAE).items())


def text_encoder_of(state: Mapping[str, torch.Tensor]) -> StateDict:
    """The text encoder's tensors of a state dict."""
    return _with_prefix(state, TEXT_ENCODER)


def _with_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> StateDict:
    return OrderedDict((key, tensor) for key, tensor in state.items() if key.startswith(prefix))


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def slug_of(model: SatModel) -> str:
    """cogtools' short name of a model, or of the model whose toy it is."""
    names = [real.name for real in SAT_MODELS]
    return ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")[names.index(model.name.removeprefix("toy "))]


@contextlib.contextmanager
def without_a_word() -> Iterator[None]:
    """Fail if diffusers or transformers log a warning; what they warn of otherwise fails in every test."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    listener = Listener(logging.WARNING)
    for logger in loggers:
        logger.addHandler(listener)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
    assert said == []


def save_tokenizer(folder: Path, words: str = "a cat sits on the mat") -> None:
    """Write a T5 tokenizer of a few words, as transformers saves one."""
    from transformers import T5Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in dict.fromkeys(words.split()))]
    vocabulary = [(token, -float(number)) for number, token in enumerate(tokens)]
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=16).save_pretrained(folder)
