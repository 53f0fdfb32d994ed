"""SAT's layout: the keys that CogVideo's trainer writes.

The fused query_key_value projection has its rows in the order q, k, v, and its LoRA in three parts in that order:

    transformer.layers.N.attention.query_key_value.matrix_A.{0,1,2}    (rank, hidden)
    transformer.layers.N.attention.query_key_value.matrix_B.{0,1,2}    (hidden, rank)
    transformer.layers.N.attention.dense.matrix_A.0                    (rank, hidden)
    transformer.layers.N.attention.dense.matrix_B.0                    (hidden, rank)

The file states neither rank nor alpha: the rank is in the shapes, alpha in training_config.yaml.

Source: SwissArmyTransformer, sat/model/finetune/lora2.py (`LoraMixin`, `HackParameterList`), and checkpoints of the
trainer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cogtools.layouts.family import ATTENTION, LAYER_NUMBER, LoraKey, Transformer, hidden_of, recognise
from cogtools.layouts.lora import SAT_STYLE, LoraLayout, Names, Spelling, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "model.diffusion_model."
"""What the trainer puts before every key of the transformer. In files that people save again, a part of it or all may
be missing."""

NAMES = Names(
    "SAT's names",
    "transformer.layers.{}.",
    {
        "q": "attention.query_key_value.0",
        "k": "attention.query_key_value.1",
        "v": "attention.query_key_value.2",
        "out": "attention.dense.0",
    },
)

DEFAULT_ALPHA = 1
"""SAT's alpha where the user set none (sat/model/finetune/lora2.py, `LoraMixin.__init__`)."""

LATEST_NAME, ITERATION = "latest", "1"
"""A folder that SAT loads has a file `latest`, which names the folder of an iteration: a number above 0. EMA weights
have to be in such a folder too (sat/training/model_io.py, `get_checkpoint_iteration`)."""

FILE_NAME = "mp_rank_00_model_states.pt"

LAYOUT = LoraLayout(
    name="sat",
    reader="SAT",
    written=Spelling(NAMES, SAT_STYLE, PREFIX),
    scale="training_config",
    usage=Usage(
        "Load it into SAT after the base weights, with r: {rank} and lora_alpha: {alpha} in lora_config of the yaml:",
        ('load_checkpoint(model, args, "BASE_FOLDER")', "load_checkpoint(model, args, {folder})"),
        whole=(
            "Load it into SAT with r: {rank} and lora_alpha: {alpha} in lora_config of the yaml:",
            ("load_checkpoint(model, args, {folder})",),
        ),
    ),
    unstated_alpha=DEFAULT_ALPHA,
    path=f"{ITERATION}/{FILE_NAME}",
    is_folder=True,
    beside={LATEST_NAME: ITERATION.encode(), "training_config.yaml": None},
    container="torch",
    also_read=tuple(Spelling(NAMES, SAT_STYLE, prefix) for prefix in ("diffusion_model.", "model.", "")),
    always=ATTENTION,
    one_rank=True,
    lora_only_note="This folder holds the LoRA only. SAT loads it without a word and leaves the base weights random: "
    "the videos are noise. Load the base weights before it, by a load_checkpoint of their own, or export with --base.",
)
"""Its reader ignores keys that are missing and does not look for others."""

WRAPPERS = frozenset({"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module"})
"""Segments that wrappers of modules put into keys, at the front or further in: DistributedDataParallel and DeepSpeed,
torch.compile, Lightning's Fabric, FullyShardedDataParallel."""

_IN_LAYER = re.compile(rf"transformer\.layers\.{LAYER_NUMBER}\.", re.ASCII)

_BASE_LAYER_SUFFIX = "mlp.dense_h_to_4h.weight"
"""Every layer has it, with or without a LoRA. Whoever strips a checkpoint of its base weights strips this one: it is
the largest."""

_PATCH_EMBED = "mixins.patch_embed.proj.weight"
"""Tells the models apart: its shape is in the table of models."""

_OFS_EMBED = "ofs_embed.0.weight"
"""Tells the one model that has it."""


def unwrapped_key(key: str) -> str:
    """A key without the segments that wrappers of modules put into it."""
    if "module" not in key and "_orig_mod" not in key:  # as good as always: this runs for every key
        return key
    return ".".join(segment for segment in key.split(".") if segment not in WRAPPERS)


def bare_key(key: str) -> str:
    """A key of the transformer without what the trainer and wrappers put before it."""
    return unwrapped_key(key).removeprefix("model.").removeprefix("diffusion_model.")


def without_original(key: str) -> str:
    """A key of a base weight without the segment that SAT's LoRA puts into the names of those it adapts."""
    return key.replace(".original.", ".") if ".original." in key else key


def table_key(key: str) -> str:
    """A key of a base weight as the key map has it: without what stands before it, and without that segment."""
    return without_original(bare_key(key))


def is_lora_key(key: str) -> bool:
    """Whether a key belongs to a LoRA as SAT makes them, of whatever module."""
    return not {"matrix_A", "matrix_B"}.isdisjoint(key.split("."))


def recognise_transformer(shapes: Mapping[str, tuple[int, ...]], hidden: int) -> Transformer | None:
    """The transformer whose base weights are among these shapes, or which has this hidden size."""
    bare = {bare_key(key): shape for key, shape in shapes.items()}
    layers = {layer for layer, suffix in map(_split_layer, bare) if suffix == _BASE_LAYER_SUFFIX and layer is not None}
    return recognise(hidden, len(layers) or None, bare.get(_PATCH_EMBED), ofs_embed=_OFS_EMBED in bare)


def hidden_size(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The hidden size that the base weights among these shapes have; None if there are none."""
    for key, shape in shapes.items():
        if len(shape) == 2 and "dense_h_to_4h" in key and _split_layer(bare_key(key))[1] == _BASE_LAYER_SUFFIX:
            return shape[1]
    return None


def tensor_parallel_ranks(shapes: Mapping[LoraKey, tuple[int, ...]]) -> int:
    """Over how many tensor-parallel ranks a LoRA is divided, as its shapes say; 1 if it is whole.

    Each of n ranks has the rows of its heads, so that query_key_value's B is (h/n, r) and dense's A is (r, h/n); the
    other factors are whole.
    """
    sides = {name: hidden_of(name, shape) for name, shape in shapes.items()}
    divided = {side for name, side in sides.items() if (name.name == "out") == (name.part == "A")}
    whole = {side for name, side in sides.items() if (name.name == "out") != (name.part == "A")}
    if len(divided) != 1 or len(whole) != 1:
        return 1
    hidden, share = whole.pop(), divided.pop()
    return hidden // share if hidden and share and hidden % share == 0 else 1


def _split_layer(bare: str) -> tuple[int | None, str]:
    """The layer that a key belongs to, and the rest of the key: (None, "") if it belongs to none."""
    match = _IN_LAYER.match(bare)
    return (int(match[1]), bare[match.end() :]) if match else (None, "")
