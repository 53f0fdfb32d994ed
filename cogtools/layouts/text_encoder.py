"""The text encoder, a T5 v1.1: what transformers and SAT call its tensors, and its configuration in transformers.

The names are the same. SAT has the embedding under two names, of one storage; transformers writes one of them.

Sources: transformers' T5EncoderModel; the config.json of google/t5-v1_1-xxl and of the released CogVideoX models.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cogtools.layouts import sat
from cogtools.layouts.key_map import Mapped, NamedTensor, renamed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CLASS_NAME = "T5EncoderModel"
PREFIX = "conditioner.embedders.0.transformer."
"""What SAT's trainer puts before the keys."""

EMBEDDING = "shared.weight"
TIED_EMBEDDING = "encoder.embed_tokens.weight"
TIED_DROPPED = f"{EMBEDDING} is the same"

MAX_BLOCKS = 1000
_COMMON_CONFIG: dict[str, object] = {
    "architectures": [CLASS_NAME],
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
    "use_cache": True,
}


class Structure(NamedTuple):
    """The sizes of a T5 encoder.

    Attributes:
        blocks: how many it has.
        width: of the hidden states.
        inner: heads x the width of one.
        heads: attention heads.
        feed_forward: the width inside.
        vocabulary: tokens.
        buckets: of relative positions.
    """

    blocks: int
    width: int
    inner: int
    heads: int
    feed_forward: int
    vocabulary: int
    buckets: int

    def config(self, dtype: str) -> dict[str, object]:
        """The fields of transformers' config.json. The dtype, by PyTorch's name, is what it loads the weights in."""
        config = {
            **_COMMON_CONFIG,
            "d_ff": self.feed_forward,
            "d_kv": self.inner // self.heads,
            "d_model": self.width,
            "num_decoder_layers": self.blocks,
            "num_heads": self.heads,
            "num_layers": self.blocks,
            "relative_attention_num_buckets": self.buckets,
            "torch_dtype": dtype,  # releases from 4.56 on write "dtype"; all read this
            "vocab_size": self.vocabulary,
        }
        return dict(sorted(config.items()))


def bare_key(key: str) -> str:
    """A key without what the trainer and wrappers put before it."""
    return sat.unwrapped_key(key).removeprefix(PREFIX)


def to_transformers(keys: Iterable[str], structure: Structure) -> Mapped:
    """What the keys of SAT's text encoder become in transformers."""
    bare = {key: bare_key(key) for key in keys}
    both = EMBEDDING in bare.values()
    dropped = {key: TIED_DROPPED for key, name in bare.items() if name == TIED_EMBEDDING and both}
    found = {key: EMBEDDING if name == TIED_EMBEDDING and not both else name for key, name in bare.items()}
    return renamed(found, tensors(structure), dropped)


_BLOCK = re.compile(r"encoder\.block\.(\d{1,3})\.layer\.0\.SelfAttention\.q\.weight", re.ASCII)
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_INSIDE = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"


def structure(shapes: Mapping[str, tuple[int, ...]]) -> Structure | None:
    """The sizes of the T5 encoder whose tensors are among these; None if there is none, or not all tells."""
    bare = {bare_key(key): shape for key, shape in shapes.items()}
    blocks = {int(match[1]): bare[key] for key in bare if (match := _BLOCK.fullmatch(key))}
    telling = (
        bare.get(EMBEDDING, bare.get(TIED_EMBEDDING, ())),
        blocks.get(0, ()),
        bare.get(_BIAS, ()),
        bare.get(_INSIDE, ()),
    )
    if not all(len(shape) == 2 and 0 not in shape for shape in telling):
        return None
    (vocabulary, width), (inner, _), (buckets, heads), (inside, _) = telling
    return Structure(max(blocks) + 1, width, inner, heads, inside, vocabulary, buckets)


def structure_of_config(config: Mapping[str, object]) -> Structure | None:
    """The sizes that a config.json of transformers states; None if it does not state them."""
    names = ("num_layers", "d_model", "d_kv", "num_heads", "d_ff", "vocab_size", "relative_attention_num_buckets")
    sizes = [size for name in names if type(size := config.get(name)) is int and size > 0]
    if len(sizes) < len(names) or sizes[0] > MAX_BLOCKS:
        return None
    blocks, width, head, heads, inside, vocabulary, buckets = sizes
    return Structure(blocks, width, head * heads, heads, inside, vocabulary, buckets)


def tensors(structure: Structure) -> list[NamedTensor]:
    """Every tensor of a T5 encoder, in the order in which transformers' class has them."""
    width, inner, inside = structure.width, structure.inner, structure.feed_forward
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (structure.vocabulary, width)}
    for block in range(structure.blocks):
        attention, feed_forward = (f"encoder.block.{block}.layer.{layer}" for layer in (0, 1))
        for part in "qkv":
            found[f"{attention}.SelfAttention.{part}.weight"] = (inner, width)
        found[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        if block == 0:
            found[_BIAS] = (structure.buckets, structure.heads)
        found[f"{attention}.layer_norm.weight"] = (width,)
        for part in ("wi_0", "wi_1"):
            found[f"{feed_forward}.DenseReluDense.{part}.weight"] = (inside, width)
        found[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, inside)
        found[f"{feed_forward}.layer_norm.weight"] = (width,)
    found["encoder.final_layer_norm.weight"] = (width,)
    return [NamedTensor(key, key, shape) for key, shape in found.items()]
