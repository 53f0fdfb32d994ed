"""What files are called by those who save checkpoints, and what follows from that.

Sources: SAT's trainer; DeepSpeed, runtime/engine.py (`_get_ckpt_name`, `_get_zero_ckpt_name`), runtime/pipe/module.py
(`ckpt_layer_path`); accelerate, utils/constants.py; Transformers, trainer.py; huggingface_hub, serialization/_base.py;
torch.distributed.checkpoint, filesystem.py.
"""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.paths import AnyPath

LATEST = "latest"
"""DeepSpeed's file that names the folder of the latest checkpoint; SAT's trainer writes it as well."""

EMA_SUFFIX = "-ema"

TRAINER_FILES = ("mp_rank_00_model_states.pt", "z3_rank_00_model_states.pt")
"""The names under which DeepSpeed and SAT's trainer save weights."""

LIBRARY_FILES = (
    "diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
    "pytorch_model.bin",
)
"""The names under which libraries save weights, and look for them."""

WEIGHTS_FILES = (*TRAINER_FILES, *LIBRARY_FILES)
"""The usual names of weights; of several in one folder, the first is meant."""

PIPELINE_INDEX = "model_index.json"

MAIN_PART = "transformer"
"""The folder that stands for the parts of a pipeline where they have no index."""

SHARD_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
INDEX_NAMES = (PIPELINE_INDEX, *SHARD_INDEX_SUFFIXES)

_WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

_COMPANION = re.compile(
    r"(?:optim(?:izer)?|(?:lr_)?scheduler|sampler|(?:grad_)?scaler|training_args|rng_state|random_states|dl_state_dict"
    r"|custom_checkpoint)(?:_states?)?(?:[_-][0-9]+)*\.(?:bin|pt|pth|pkl)"
    r"|.*optim_states\.pt"
)
"""What trainings save beside the weights: optimizers, schedulers, random states, arguments."""

_RANK = re.compile(r"mp_rank_([0-9]+)_model_states\.pt")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<of>[0-9]{5})(?P<suffix>\.safetensors|\.bin)")


def is_weights_name(name: str) -> bool:
    """Whether a file has a name that weights have."""
    return name.endswith((*_WEIGHTS_SUFFIXES, *INDEX_NAMES)) and not is_companion(name)


def is_companion(name: str) -> bool:
    """Whether a file has the name of what a training saves beside the weights, such as its optimizer's state."""
    return _COMPANION.fullmatch(name) is not None


def rank_of(name: str) -> int | None:
    """Which tensor-parallel rank's file this is; None if it is not called like one."""
    match = _RANK.fullmatch(name)
    return int(match[1]) if match else None


class ShardName(NamedTuple):
    """What the name of a shard says: "model-00001-of-00003.safetensors" is number 1 of 3."""

    stem: str
    number: int
    of: int
    suffix: str

    def other(self, number: int) -> str:
        """The name of another shard of the same checkpoint."""
        return f"{self.stem}-{number:05}-of-{self.of:05}{self.suffix}"


def shard_name(name: str) -> ShardName | None:
    """What a file's name says of a shard; None if it is not called like one."""
    match = _SHARD.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["of"]):
        return None
    return ShardName(match["stem"], int(match["number"]), int(match["of"]), match["suffix"])


def part_of(name: str) -> str | None:
    """What a file's name says it is a part of; None if it says nothing of the kind."""
    shard, rank = shard_name(name), rank_of(name)
    if shard is not None and shard.of > 1:
        return f"part {shard.number} of {shard.of}"
    if rank:
        return f"rank {rank} of a tensor-parallel training"
    return "one layer of a training with pipeline parallelism" if _PIPELINE_LAYER.fullmatch(name) else None


# Checkpoints that are spread over files of which none can be used alone

DISTRIBUTED_METADATA = ".metadata"
"""The pickle in which torch.distributed.checkpoint lists the tensors of its `.distcp` files."""

_PIPELINE_LAYER = re.compile(r"layer_[0-9]+-model_[0-9]+-model_states\.pt")


class Spread(NamedTuple):
    """A way to spread one checkpoint over files: their names, what it is called, and how to put it together."""

    names: re.Pattern[str]
    what: str
    hint: str

    def advice(self, folder: AnyPath) -> str:
        """How to put the files of this folder together."""
        return self.hint.format(folder=shlex.quote(str(folder)), above=shlex.quote(str(folder.parent)))


SPREADS = (
    Spread(
        re.compile(r".*\.distcp"),
        "this is a distributed checkpoint (torch.distributed.checkpoint): its tensors are spread over all of its files",
        "put it together first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} whole.pt",
    ),
    Spread(
        re.compile(r"zero_pp_rank_[0-9]+_mp_rank_[0-9]+_model_states\.pt"),
        "this is a ZeRO-3 checkpoint of DeepSpeed: its tensors are spread over the files of all ranks",
        "put it together first, with the script that DeepSpeed saves beside it: python zero_to_fp32.py {above} whole",
    ),
    Spread(
        _PIPELINE_LAYER,
        "this is a checkpoint of DeepSpeed's pipeline parallelism: each layer is in a file of its own",
        "load it with the training's code, and save the model's state_dict() as one file with torch.save",
    ),
)


def spread_over(names: Iterable[str]) -> tuple[Spread, list[str]] | None:
    """The way in which these files are one checkpoint together, and those of them that are; None if they are not."""
    every = list(names)
    for spread in SPREADS:
        found = sorted(name for name in every if spread.names.fullmatch(name))
        if found:
            return spread, found
    return None
