"""The base transformer's key map: what diffusers and SAT call its tensors, and which rows of SAT's each one is.

Nothing is computed on the way from one to the other: every tensor of diffusers is one or two runs of rows of one of
SAT's, and both directions are read off the same rows. SAT fuses q, k and v, and has the twelve shifts, scales and
gates of a layer in one Linear, where diffusers has a Linear for each norm:

    query_key_value       (3h, h)        q | k | v
    adaLN_modulations.N.1 (12h, time)    norm1 | norm2 | norm1 | norm2: of the video, then of the text

Sources: CogVideo, sat/dit_video_concat.py, at its tag v1.0 and at main; diffusers' CogVideoXTransformer3DModel. The map
was held against forward passes of both.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from cogtools.layouts import diffusers, sat
from cogtools.layouts.family import BY_SLUG, LAYER_NUMBER, MAX_LAYERS
from cogtools.layouts.key_map import Mapped, Run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cogtools.layouts.family import Module


class Row(NamedTuple):
    """A module, or a single tensor.

    Attributes:
        diffusers: its name in diffusers, with {} for the layer's number.
        sat: the name of what it is a part of in SAT, with {} for the layer's number.
        outputs: how many rows it has in diffusers: a size of `sizes`, perhaps with a factor before it.
        inputs: how many columns its weight has; None for a norm, whose weight has one dimension.
        runs: which of the runs of rows of SAT's tensor it consists of, in this order.
        of: how many runs of the same length SAT's tensor has.
        parameters: what it consists of: a weight and a bias, or in itself ("") a tensor.
    """

    diffusers: str
    sat: str
    outputs: str
    inputs: str | None = None
    runs: tuple[int, ...] = (0,)
    of: int = 1
    parameters: tuple[str, ...] = ("weight", "bias")


POSITIONS = "patch_embed.pos_embedding"
"""The table of positions, which is trained in 5B-I2V only. diffusers computes that of 2B."""

_IN_BLOCK = "transformer_blocks.{}."
_IN_LAYER = "transformer.layers.{}."
_QKV = _IN_LAYER + "attention.query_key_value"
_ADALN = "mixins.adaln_layer.adaLN_modulations.{}.1"

ROWS = (
    # before the layers
    Row(POSITIONS, "mixins.pos_embed.pos_embedding", "positions", parameters=("",)),
    Row("patch_embed.proj", "mixins.patch_embed.proj", "h", "patch_in"),
    Row("patch_embed.text_proj", "mixins.patch_embed.text_proj", "h", "text"),
    Row("time_embedding.linear_1", "time_embed.0", "time", "h"),
    Row("time_embedding.linear_2", "time_embed.2", "time", "time"),
    Row("ofs_embedding.linear_1", "ofs_embed.0", "ofs", "ofs"),
    Row("ofs_embedding.linear_2", "ofs_embed.2", "ofs", "ofs"),
    # in every layer
    Row(_IN_BLOCK + "norm1.linear", _ADALN, "6h", "time", runs=(0, 2), of=4),
    Row(_IN_BLOCK + "norm1.norm", _IN_LAYER + "input_layernorm", "h"),
    Row(_IN_BLOCK + "attn1.norm_q", "mixins.adaln_layer.query_layernorm_list.{}", "head"),
    Row(_IN_BLOCK + "attn1.norm_k", "mixins.adaln_layer.key_layernorm_list.{}", "head"),
    Row(_IN_BLOCK + "attn1.to_q", _QKV, "h", "h", runs=(0,), of=3),
    Row(_IN_BLOCK + "attn1.to_k", _QKV, "h", "h", runs=(1,), of=3),
    Row(_IN_BLOCK + "attn1.to_v", _QKV, "h", "h", runs=(2,), of=3),
    Row(_IN_BLOCK + "attn1.to_out.0", _IN_LAYER + "attention.dense", "h", "h"),
    Row(_IN_BLOCK + "norm2.linear", _ADALN, "6h", "time", runs=(1, 3), of=4),
    Row(_IN_BLOCK + "norm2.norm", _IN_LAYER + "post_attention_layernorm", "h"),
    Row(_IN_BLOCK + "ff.net.0.proj", _IN_LAYER + "mlp.dense_h_to_4h", "4h", "h"),
    Row(_IN_BLOCK + "ff.net.2", _IN_LAYER + "mlp.dense_4h_to_h", "h", "4h"),
    # after the layers
    Row("norm_final", "transformer.final_layernorm", "h"),
    Row("norm_out.linear", "mixins.final_layer.adaLN_modulation.1", "2h", "time"),
    Row("norm_out.norm", "mixins.final_layer.norm_final", "h"),
    Row("proj_out", "mixins.final_layer.linear", "patch_out", "h"),
)
"""The map, in the order in which diffusers' class has its tensors: shards are cut in this order."""

DROPPED = {
    "mixins.pos_embed.freqs_sin": "rotary positions: computed, not trained",
    "mixins.pos_embed.freqs_cos": "rotary positions: computed, not trained",
    "transformer.position_embeddings.weight": "SAT has it and never uses it",
}
"""What SAT's checkpoints hold beside that, and why it is left out."""

LORA_DROPPED = "a LoRA: merge adds it to the weights, export-lora exports it"
POSITIONS_DROPPED = "positions that were not trained: diffusers computes them"

SAT_POSITIONS = "mixins.pos_embed.pos_embedding"
UNUSED_POSITIONS = "transformer.position_embeddings.weight"
"""A table that SAT's transformers with rotary positions have and never use: to load it, SAT wants it nevertheless."""

UNUSED_POSITIONS_ROWS = 64
"""Its rows: `max_sequence_length` in the `transformer_args` of all of CogVideo's configurations."""


def to_diffusers(keys: Iterable[str]) -> Mapped:
    """What the keys of SAT's transformer become in diffusers.

    A LoRA's keys are dropped, and its `.original.` names are those of the base weights. The table of positions is
    mapped, too; drop it (`Mapped.without`) where diffusers computes it.

    Args:
        keys: those of the transformer, with or without what the trainer and wrappers put before them.
    """
    dropped: dict[str, str] = {}
    rest: dict[str, str] = {}
    for key in keys:
        bare = sat.bare_key(key)
        if bare in DROPPED:
            dropped[key] = DROPPED[bare]
        elif sat.is_lora_key(bare):
            dropped[key] = LORA_DROPPED
        else:
            rest[key] = sat.without_original(bare)
    return _mapped(rest, "diffusers", dropped)


def to_sat(keys: Iterable[str]) -> Mapped:
    """What the keys of diffusers' transformer become in SAT, without the trainer's prefix."""
    return _mapped({key: key for key in keys}, "sat", {})


def runs_of(target: str, layout: str) -> tuple[Run, ...] | None:
    """What makes up a key of one layout ("diffusers" or "sat"), by the other's names; None if the map lacks it."""
    found = _find(target, layout)
    return None if found is None else _RUNS[layout](*found)


class ModuleRows(NamedTuple):
    """Rows of a module's weight: run `number`, from 0 on, of `of` runs of the same length."""

    module: Module
    number: int = 0
    of: int = 1


def modules_of(key: str, layout: str) -> tuple[ModuleRows, ...]:
    """The rows of modules' weights that a tensor consists of, in its order: runs of the same length.

    () for a tensor that is not a weight of modules that LoRAs adapt: a bias, a norm, positions.

    Args:
        key: its key, in SAT's layout with or without what the trainer puts before it.
        layout: "diffusers" or "sat".
    """
    if not key.endswith(".weight"):
        return ()
    runs = (Run(key),) if layout == "diffusers" else runs_of(sat.table_key(key), layout) or ()
    found = [(diffusers.parse_module(run.key.removesuffix(".weight")), run) for run in runs]
    return tuple(ModuleRows(module, run.number, run.of) for module, run in found if module is not None)


def keys(layout: str, layers: int, *, ofs: bool = False, positions: bool = False) -> list[str]:
    """Every key that a transformer has in one layout, in diffusers' order.

    Args:
        layout: "diffusers" or "sat".
        layers: how many it has.
        ofs: whether it has an embedding of the frame rate's offset.
        positions: whether it has a table of positions.
    """
    found: dict[str, None] = {}
    for group in _groups():
        for layer in range(layers) if "{}" in group[0].diffusers else (0,):
            for row in group:
                if _is_there(row, ofs=ofs, positions=positions):
                    for parameter in row.parameters:
                        found[_join(getattr(row, layout).format(layer), parameter)] = None
    return list(found)


def shapes(sizes: Mapping[str, int], patch: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Every key of diffusers' transformer and its shape.

    Args:
        sizes: h, head, time, text, ofs (0: none), positions (0: none that is stored), patch_out, layers.
        patch: the shape of the patch embedding's weight without its first dimension: (channels, 2, 2) of a
            convolution, or (channels * 2 * 2 * frames,) of a Linear.
    """
    found: dict[str, tuple[int, ...]] = {}
    for key in keys("diffusers", sizes["layers"], ofs=bool(sizes["ofs"]), positions=bool(sizes["positions"])):
        place = _find(key, "diffusers")
        if place is None:
            raise ValueError(f"a key that the map does not have: {key}")
        row, _, parameter = place
        rows = _size(row.outputs, sizes)
        if not parameter:
            found[key] = (1, rows, sizes["h"])
        elif row.inputs is None or parameter == "bias":
            found[key] = (rows,)
        else:
            found[key] = (rows, *(patch if row.inputs == "patch_in" else (_size(row.inputs, sizes),)))
    return found


DEFAULTS = BY_SLUG["2b"].config
"""What diffusers' class takes for fields that a config.json does not have: those of the model that came first."""

SAMPLE_FIELDS = ("max_text_seq_length", "sample_frames", "sample_height", "sample_width")
"""The fields of a config.json that say how large the videos and texts are that the transformer is made for."""

SIZE_FIELDS = (
    *SAMPLE_FIELDS,
    "attention_head_dim",
    "in_channels",
    "num_attention_heads",
    "num_layers",
    "out_channels",
    "patch_size",
    "temporal_compression_ratio",
    "text_embed_dim",
    "time_embed_dim",
)
"""These, and those that say how large the transformer is."""


def shapes_of_config(config: Mapping[str, object]) -> dict[str, tuple[int, ...]] | None:
    """Every key of the transformer that diffusers' class builds of a config.json, and its shape.

    None if the fields that state its sizes are not such numbers.
    """
    fields = {**DEFAULTS, **config}
    numbers = {name: value for name in SIZE_FIELDS if type(value := fields[name]) is int and 0 < value <= MAX_SIZE}
    frames, ofs = fields.get("patch_size_t"), fields.get("ofs_embed_dim")
    if len(numbers) < len(SIZE_FIELDS) or numbers["num_layers"] > MAX_LAYERS:
        return None
    if not all(value is None or (type(value) is int and 0 < value <= MAX_SIZE) for value in (frames, ofs)):
        return None
    width = numbers["patch_size"]
    volume = width * width * (frames if isinstance(frames, int) else 1)
    sizes = {
        "layers": numbers["num_layers"],
        "h": numbers["num_attention_heads"] * numbers["attention_head_dim"],
        "head": numbers["attention_head_dim"],
        "time": numbers["time_embed_dim"],
        "text": numbers["text_embed_dim"],
        "ofs": ofs if isinstance(ofs, int) else 0,
        "patch_out": numbers["out_channels"] * volume,
        "positions": _positions(numbers) if fields.get("use_learned_positional_embeddings") is True else 0,
    }
    channels = numbers["in_channels"]
    return shapes(sizes, (channels, width, width) if frames is None else (channels * volume,))


def positions_of_config(config: Mapping[str, object]) -> int | None:
    """How many positions a transformer of this config.json has; None if its fields are not sizes."""
    fields = {**DEFAULTS, **config}
    numbers = {name: value for name in SIZE_FIELDS if type(value := fields[name]) is int and 0 < value <= MAX_SIZE}
    return _positions(numbers) if len(numbers) == len(SIZE_FIELDS) else None


def _positions(numbers: Mapping[str, int]) -> int:
    frames = (numbers["sample_frames"] - 1) // numbers["temporal_compression_ratio"] + 1
    patches = numbers["sample_height"] // numbers["patch_size"] * (numbers["sample_width"] // numbers["patch_size"])
    return numbers["max_text_seq_length"] + frames * patches


MAX_SIZE = 1 << 20
"""A larger size is not believed."""


def _size(expression: str, sizes: Mapping[str, int]) -> int:
    factor, name = (int(expression[0]), expression[1:]) if expression[0].isdigit() else (1, expression)
    return factor * sizes[name]


def _is_there(row: Row, *, ofs: bool, positions: bool) -> bool:
    return {"ofs": ofs, "positions": positions}.get(row.outputs, True)


def _join(name: str, parameter: str) -> str:
    return f"{name}.{parameter}" if parameter else name


_Place = tuple[Row, "int | None", str]
"""A tensor of the map: its row, its layer, and whether it is the weight or the bias."""

_LAYER = re.compile(rf"(?<=\.){LAYER_NUMBER}(?=\.)", re.ASCII)
"""A layer's number is the first number between dots."""


def _find(key: str, layout: str) -> _Place | None:
    """The tensor that a key names; of several rows of one SAT tensor, the first."""
    exact = _BY_KEY[layout].get(key)
    if exact is not None:
        return None if "{}" in key else (exact[0], None, exact[1])
    match = _LAYER.search(key)
    if match is None:
        return None
    found = _BY_KEY[layout].get(f"{key[: match.start()]}{{}}{key[match.end() :]}")
    return None if found is None else (found[0], int(match[0]), found[1])


def _table(layout: str) -> dict[str, tuple[Row, str]]:
    table: dict[str, tuple[Row, str]] = {}
    for row in ROWS:
        for parameter in row.parameters:
            table.setdefault(_join(getattr(row, layout), parameter), (row, parameter))
    return table


_BY_KEY = {layout: _table(layout) for layout in ("diffusers", "sat")}


def _runs_of_diffusers(row: Row, layer: int | None, parameter: str) -> tuple[Run, ...]:
    source = _join(row.sat.format(layer), parameter)
    return tuple(Run(source, run, row.of) for run in row.runs)


def _runs_of_sat(row: Row, layer: int | None, parameter: str) -> tuple[Run, ...]:
    parts: dict[int, Run] = {}
    for part in _OF_ONE_SOURCE[row.sat]:
        source = _join(part.diffusers.format(layer), parameter)
        parts |= {run: Run(source, number, len(part.runs)) for number, run in enumerate(part.runs)}
    return tuple(parts[run] for run in range(row.of))


_RUNS: dict[str, Callable[[Row, int | None, str], tuple[Run, ...]]] = {
    "diffusers": _runs_of_diffusers,
    "sat": _runs_of_sat,
}


def _mapped(bare: Mapping[str, str], layout: str, dropped: dict[str, str]) -> Mapped:
    """Map keys, given with their names in the other layout, to one layout."""
    other = "sat" if layout == "diffusers" else "diffusers"
    keys_of: dict[str, str] = {}
    places: dict[str, _Place] = {}
    unknown, twice = [], []
    for key, name in bare.items():
        place = _find(name, other)
        if place is None:
            unknown.append(key)
        elif name in keys_of:
            twice.append(key)
        else:
            keys_of[name], places[name] = key, place
    targets: dict[str, tuple[Run, ...]] = {}
    incomplete: dict[str, tuple[str, ...]] = {}
    for target in sorted(_targets(places.values(), layout), key=lambda key: _order(key, layout)):
        runs = runs_of(target, layout) or ()
        missing = tuple(dict.fromkeys(run.key for run in runs if run.key not in keys_of))
        if missing:
            incomplete[target] = missing
        else:
            targets[target] = tuple(run._replace(key=keys_of[run.key]) for run in runs)
    return Mapped(targets, dropped, tuple(unknown), incomplete, tuple(twice))


def _targets(places: Iterable[_Place], layout: str) -> set[str]:
    """The keys of a layout that are made of these tensors or parts of them."""
    return {
        _join(getattr(row, layout).format(layer), parameter)
        for found, layer, parameter in places
        for row in _OF_ONE_SOURCE[found.sat]
    }


_OF_ONE_SOURCE = {row.sat: tuple(other for other in ROWS if other.sat == row.sat) for row in ROWS}
"""The rows that divide a SAT tensor among them."""


def _groups() -> list[list[Row]]:
    """The rows before, in and after the layers."""
    first = next(index for index, row in enumerate(ROWS) if "{}" in row.diffusers)
    last = max(index for index, row in enumerate(ROWS) if "{}" in row.diffusers)
    return [list(ROWS[:first]), list(ROWS[first : last + 1]), list(ROWS[last + 1 :])]


_GROUP = {row.diffusers: group for group, rows in enumerate(_groups()) for row in rows}
_NUMBER = {row.diffusers: number for number, row in enumerate(ROWS)}


def _order(key: str, layout: str) -> tuple[int, int, int, int]:
    place = _find(key, layout)
    if place is None:
        raise ValueError(f"a key that the map does not have: {key}")
    row, layer, parameter = place
    return _GROUP[row.diffusers], layer or 0, _NUMBER[row.diffusers], row.parameters.index(parameter)


def layer_of(key: str) -> int | None:
    """The layer that a key of diffusers belongs to; None if it belongs to none."""
    place = _find(key, "diffusers")
    return None if place is None else place[1]
