"""What diffusers alone does with a LoRA file: measured on a toy CogVideoX transformer, loaded as users do."""

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.support.damage import PREFIX, Outcome

with warnings.catch_warnings():
    # What these libraries say of each other while they are imported is not of interest here.
    warnings.simplefilter("ignore")
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
    from peft.tuners.lora import LoraLayer

LIBRARIES = ("diffusers", "peft", "transformers", "huggingface_hub")


def diffusers_alone(path: Path) -> Outcome:
    """Load the only LoRA file of a folder into a CogVideoX pipeline with 3 layers, and tell what happened.

    The pipeline is new each time, so that nothing stays of the file before.
    """
    transformer = copy.deepcopy(toy_transformer())
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)
    with everything_said() as said:
        try:
            pipeline.load_lora_weights(str(path.parent))
        except Exception as error:  # noqa: BLE001 - whatever it raises is what is measured
            return Outcome("error", type(error).__name__, taken=0, scaling=(), text=shortened(str(error)))
    tensors = load_file(path)
    adapters = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    taken = [filled(adapter, tensors, PREFIX + name) for name, adapter in adapters.items()]
    return Outcome(
        "warning" if said else "silent",
        ", ".join(sorted({library for library, _ in said})),
        taken.count(True),
        taken.count(False),
        tuple(sorted({scaling for adapter in adapters.values() for scaling in adapter.scaling.values()})),
        text=shortened(" ".join(text for _, text in said)),
    )


@functools.cache
def toy_transformer() -> Any:
    """A transformer like CogVideoX-2B's, with 3 layers, hidden size 128 and random weights, in fp16."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        time_embed_dim=32,
        text_embed_dim=32,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=False,
    )
    return transformer.half()


@contextlib.contextmanager
def everything_said() -> Iterator[list[tuple[str, str]]]:
    """Collect (library, text) of what the libraries warn of, at the log level that they have by default.

    diffusers' loggers bypass ``warnings``, and its level can be set by the environment.
    """
    said: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.name.split(".")[0], record.getMessage()))

    listener = Listener(logging.WARNING)
    levels = {logger: logger.level for logger in map(logging.getLogger, LIBRARIES)}
    for logger in levels:
        logger.addHandler(listener)
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
        said += [(library_of(warning.filename), str(warning.message)) for warning in warned]
    finally:
        for logger, level in levels.items():
            logger.removeHandler(listener)
            logger.setLevel(level)


def library_of(filename: str) -> str:
    """Name the library that a source file belongs to."""
    return next((name for name in LIBRARIES if name in Path(filename).parts), filename)


def filled(adapter: Any, tensors: dict[str, torch.Tensor], name: str) -> bool:
    """Tell whether an adapter holds the file's A and B, and no part of it is still on the meta device."""
    (adapter_name,) = adapter.scaling
    if any(parameter.is_meta for parameter in adapter.parameters()):
        return False
    held = {part: getattr(adapter, f"lora_{part}")[adapter_name].weight for part in "AB"}
    given = {part: tensors.get(f"{name}.lora_{part}.weight") for part in "AB"}
    return all(holds(held[part], given[part]) for part in "AB")


def holds(held: torch.Tensor, given: torch.Tensor | None) -> bool:
    """Tell whether two tensors have the same values; PEFT casts an adapter to the base weights' dtype."""
    return given is not None and torch.allclose(held, given.to(held.dtype), rtol=0, atol=0, equal_nan=True)


def shortened(text: str) -> str:
    """Give the first 120 characters in one line."""
    return " ".join(text.split())[:120]
