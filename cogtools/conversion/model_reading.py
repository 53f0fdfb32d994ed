"""Reading the parts of a model: what each tensor becomes in diffusers, what the configuration is, and what is wrong.

Its sizes tell which of the published models a transformer is, else its positional keys, else what lies beside it: SAT's
training_config.yaml or diffusers' config.json. Where nothing does, the user has to; nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from cogtools.conversion.model_training import ModelTraining, read_model_training
from cogtools.conversion.part_config import MAX_CONFIG_BYTES, parse_config
from cogtools.conversion.plan import FLOATS
from cogtools.errors import ExportError, OptionError, Problem, command
from cogtools.formatting import counted
from cogtools.layouts import sat, text_encoder, transformer, vae
from cogtools.layouts.family import BY_SLUG, LATENT_CHANNELS, MODELS, SLUGS, Model
from cogtools.layouts.key_map import Mapped, Run
from cogtools.layouts.pipeline import CONFIG, PARTS, TRANSFORMER, part_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cogtools.conversion.model import ModelPart


@dataclass(frozen=True, slots=True)
class Reading:
    """A part of a model, and what it is in diffusers.

    Attributes:
        part: the part.
        mapped: what its keys become in diffusers; where they are diffusers' already, themselves.
        shapes: every key that it has in diffusers, and its shape there, in the order of diffusers' class.
        config: its config.json.
        model: the published model whose structure it has; None for a text encoder, which all have alike.
        known_by: what tells the model.
        training: the training configuration beside it.
        notices: what the user should know.
    """

    part: ModelPart
    mapped: Mapped
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, object]
    model: Model | None = None
    known_by: str | None = None
    training: ModelTraining | None = None
    notices: tuple[str, ...] = ()

    @property
    def has_lora(self) -> bool:
        """Whether the checkpoint holds a LoRA beside it."""
        return bool(self.part.lora_keys)


def model_of_slug(slug: str | None) -> Model | None:
    """The model that --model names; None where it is not given.

    Raises:
        OptionError: if there is no such model.
    """
    if slug is not None and slug not in BY_SLUG:
        raise OptionError("there is no such model", found=slug, expected=", ".join(SLUGS))
    return None if slug is None else BY_SLUG[slug]


# The transformer


def read_transformer(part: ModelPart, asked: Model | None = None) -> Reading:
    """Read a transformer, in SAT's or diffusers' layout.

    Args:
        part: the transformer.
        asked: the model that the user says it is.

    Raises:
        ExportError: if it is not whole, or it cannot be told which model it is.
        CheckpointError: if the configuration beside it cannot be read.
    """
    if part.layout == "sat":
        mapped, training, stated = transformer.to_diffusers(part.tensors), read_model_training(part.checkpoint), None
    else:
        unknown = dict.fromkeys(transformer.to_sat(part.tensors).unknown)
        targets: dict[str, tuple[Run, ...]] = {key: (Run(key),) for key in part.tensors if key not in unknown}
        mapped, training, stated = Mapped(targets, {}, tuple(unknown)), None, _read_config(part)
    if not mapped.targets:
        raise _not_whole(part, [], f"{counted(len(part.tensors), 'tensor')}, none of them a base weight")
    sizes = _sizes(part, mapped)
    model, known_by = _identify(part, mapped, sizes, asked, training, stated)
    if not model.learned_positions:
        mapped = mapped.without(transformer.POSITIONS, transformer.POSITIONS_DROPPED)
    config = _transformer_config(model, sizes, training) if stated is None else dict(stated)
    positions, notices = _positions(part, mapped, model, config)
    patch = (sizes.in_channels, 2, 2) if model.patch_size_t is None else (sizes.in_channels * 4 * model.patch_size_t,)
    shapes = transformer.shapes(sizes.table(positions), patch)
    _refuse_wrong(part, mapped, shapes)
    if stated is not None:
        _refuse_other_config(part, _transformer_config(model, sizes, None), stated)
    is_flat = len(_shape_in(part, mapped, _PATCH)) == 2 and model.patch_size_t is None
    flat = ["The patch embedding is stored as a Linear, as CogVideo's main has it: it becomes the convolution that "
            "diffusers has, of the same bytes."]  # fmt: skip
    return Reading(part, mapped, shapes, config, model, known_by, training, (*notices, *(flat if is_flat else [])))


_PATCH = "patch_embed.proj.weight"


class _Sizes(NamedTuple):
    """The sizes of a transformer, as its tensors say.

    Attributes:
        layers: how many it has.
        hidden: the hidden size.
        head: the width of an attention head.
        time: the width of the embedded time.
        text: the width of the text encoder's hidden states.
        ofs: the width of the embedded offset of the frame rate; 0 if it has none.
        patch_out: rows of the last Linear.
        in_channels: channels of the input.
    """

    layers: int
    hidden: int
    head: int
    time: int
    text: int
    ofs: int
    patch_out: int
    in_channels: int

    @property
    def patch_size_t(self) -> int | None:
        """Frames per patch; None where there are no patches in time."""
        frames = self.patch_out // (LATENT_CHANNELS * 4)
        return None if frames == 1 else frames

    def table(self, positions: int) -> dict[str, int]:
        """The sizes that the key map speaks of."""
        names = ("layers", "h", "head", "time", "text", "ofs", "patch_out")
        return {**dict(zip(names, self, strict=False)), "positions": positions}


_TELLING = (
    _PATCH,
    "transformer_blocks.0.attn1.norm_q.weight",
    "patch_embed.text_proj.weight",
    "time_embedding.linear_1.weight",
    "proj_out.weight",
)
"""What the sizes are read off."""


def _sizes(part: ModelPart, mapped: Mapped) -> _Sizes:
    layers = 1 + max((layer for key in mapped.targets if (layer := transformer.layer_of(key)) is not None), default=-1)
    has_ofs = "ofs_embedding.linear_1.weight" in mapped.targets
    names = transformer.keys(part.layout, max(layers, 1), ofs=has_ofs)
    present = {_bare(part, key) for key in part.tensors}
    missing = [name for name in names if name not in present]
    if missing or not layers:
        raise _not_whole(part, [Problem("missing", _as_there(part, name)) for name in missing])
    patch, head, text, time, out = (_shape_in(part, mapped, key) for key in _TELLING)
    wrong = [
        key for key, shape in zip(_TELLING, (patch, head, text, time, out), strict=True) if 0 in shape or not shape
    ]
    if wrong or len(patch) not in (2, 4) or len(text) != 2 or len(time) != 2 or out[0] not in _PATCHES_OUT:
        found = ", ".join(f"{key} {shape}" for key, shape in zip(_TELLING, (patch, head, text, time, out), strict=True))
        raise _not_whole(part, [], found, "sizes of a CogVideoX transformer")
    channels = patch[1] if len(patch) == 4 else patch[1] // (out[0] // LATENT_CHANNELS)
    ofs = _shape_in(part, mapped, "ofs_embedding.linear_1.weight")[1:] if has_ofs else (0,)
    return _Sizes(layers, patch[0], head[0], time[0], text[1], ofs[0] if ofs else 0, out[0], channels)


_PATCHES_OUT = tuple(sorted({model.sizes["patch_out"] for model in MODELS}))
"""Rows that the last Linear can have: 16 channels of a patch of 2 x 2, of one frame or of two."""


def _identify(
    part: ModelPart,
    mapped: Mapped,
    sizes: _Sizes,
    asked: Model | None,
    training: ModelTraining | None,
    stated: Mapping[str, object] | None,
) -> tuple[Model, str]:
    """Which model it is, and what tells it."""
    fitting = [m for m in MODELS if m.patch_size_t == sizes.patch_size_t and m.in_channels == sizes.in_channels]
    if not fitting:
        found = f"{sizes.in_channels} channels, {sizes.patch_out} rows in the last Linear"
        raise _not_whole(part, [], found, "those of a CogVideoX model")
    evidence = {"its sizes": fitting}
    published = [model for model in fitting if (model.layers, model.hidden) == (sizes.layers, sizes.hidden)]
    if published:
        evidence["its layers and hidden size"] = published
    by_keys = _rotary_by_keys(mapped) if len(fitting) > 1 else None
    if by_keys is not None:
        evidence["its positional keys"] = [model for model in fitting if model.rotary == by_keys]
    if asked is not None:
        evidence["--model"] = [asked]
    for name, rotary in (
        ("training_config.yaml", None if training is None else training.rotary),
        (CONFIG, None if stated is None else stated.get("use_rotary_positional_embeddings")),
    ):
        if isinstance(rotary, bool) and asked is None:
            evidence[name] = [model for model in fitting if model.rotary == rotary]
    left = [model for model in fitting if all(model in models for models in evidence.values())]
    if not left:
        raise ExportError(
            "what tells the model of this transformer disagrees",
            file=part.checkpoint.path,
            found=_said(evidence),
            expected="one model",
            hint="give the files of one training, and --model only where nothing else tells",
        )
    if len({(m.rotary, m.learned_positions, m.ofs_embed) for m in left}) > 1:
        raise ExportError(
            "it cannot be told which model this is",
            file=part.checkpoint.path,
            found=f"{sizes.layers} layers, hidden size {sizes.hidden}; {_said(evidence)}",
            expected=" or ".join(model.slug for model in left),
            hint="state it with --model",
        )
    # Of models that differ in their sizes only, the first stands for those of other sizes.
    return left[0], next(name for name, models in evidence.items() if set(models) <= {*left})


def _said(evidence: Mapping[str, list[Model]]) -> str:
    """Which models each thing that tells of them allows."""
    return "; ".join(
        f"{name}: {' or '.join(model.slug for model in models)}" for name, models in evidence.items() if models
    )


def _rotary_by_keys(mapped: Mapped) -> bool | None:
    """Whether positions are rotary, as the keys say that the trainer saves; None if they are not there."""
    if any(reason != transformer.LORA_DROPPED for reason in mapped.dropped.values()):
        return True  # frequencies, or the table that only the other kind of positions deletes
    return False if transformer.POSITIONS in mapped.targets else None


def _transformer_config(model: Model, sizes: _Sizes, training: ModelTraining | None) -> dict[str, object]:
    """The fields of config.json: those of the published model, with these sizes.

    What videos and texts had for sizes in the training is known better by its configuration, but for the 1.5 models:
    they were released for other sizes than those that their training's configuration states.
    """
    fields = model.config | {
        "attention_head_dim": sizes.head,
        "in_channels": sizes.in_channels,
        "num_attention_heads": sizes.hidden // sizes.head,
        "num_layers": sizes.layers,
        "text_embed_dim": sizes.text,
        "time_embed_dim": sizes.time,
    }
    if model.ofs_embed:
        fields["ofs_embed_dim"] = sizes.ofs
    if training is not None and model.patch_size_t is None:
        fields |= {**training.sample, **training.interpolation}
    return part_config(TRANSFORMER, model, dict(sorted(fields.items())))


def _positions(part: ModelPart, mapped: Mapped, model: Model, config: Mapping[str, object]) -> tuple[int, list[str]]:
    """How many positions are stored, 0 if none are, and what to say where the configuration has another number."""
    expected = transformer.positions_of_config(config)
    if model.learned_positions:
        found = _shape_in(part, mapped, transformer.POSITIONS)
        if found[1:2] != (expected,):
            raise ExportError(
                "the table of positions does not fit the sizes of video and text",
                file=part.checkpoint.path,
                found=f"{transformer.SAT_POSITIONS} for {found[1] if len(found) > 1 else 0:,} positions",
                expected=f"{expected}: {_POSITIONS_RULE}" if expected else _POSITIONS_RULE,
                hint="put the training's training_config.yaml beside the checkpoint: it states these sizes",
            )
        return expected or 0, []
    there = next((key for key in part.tensors if _bare(part, key) == transformer.SAT_POSITIONS), None)
    shape = () if there is None else part.tensors[there].shape
    if len(shape) > 1 and expected is not None and shape[1] != expected:
        return 0, [
            f"The checkpoint has {shape[1]:,} positions; the sizes in {TRANSFORMER}/{CONFIG} give {expected:,}: set "
            f"sample_width, sample_height, sample_frames and max_text_seq_length there to what the training had "
            f"({_POSITIONS_RULE}). The weights are right all the same."
        ]
    return 0, []


_POSITIONS_RULE = "text + ((frames - 1) / 4 + 1) * (width / 2) * (height / 2)"


def _refuse_other_config(part: ModelPart, expected: Mapping[str, object], stated: Mapping[str, object]) -> None:
    """Refuse a config.json of other sizes than the tensors have."""
    sizes = (
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "num_layers",
        "text_embed_dim",
        "time_embed_dim",
    )
    wrong = [name for name in sizes if name in stated and stated[name] != expected[name]]
    if wrong:
        raise ExportError(
            f"the tensors have other sizes than {CONFIG} beside them states",
            file=part.checkpoint.path,
            problems=[Problem("value", name, str(expected[name]), str(stated[name])) for name in wrong],
            hint="give the config.json and the weights of one model",
        )


# The other parts


def read_vae(part: ModelPart, model: Model, training: ModelTraining | None = None) -> Reading:
    """Read a VAE in SAT's layout.

    Args:
        part: the VAE.
        model: the model that it is for. Its weights do not tell.
        training: the configuration of that model's training.

    Raises:
        ExportError: if it is not whole.
    """
    structure = vae.structure_in_sat(part.shapes)
    if structure is None:
        raise _not_whole(part, [], counted(len(part.tensors), "tensor"))
    mapped = vae.to_diffusers(part.tensors, structure)
    shapes = {item.diffusers: item.shape for item in vae.tensors(structure)}
    _refuse_wrong(part, mapped, shapes)
    factor = None if training is None else training.scale_factor
    config = part_config(part.name, model, structure.config(model, factor))
    return Reading(part, mapped, shapes, config, model)


def read_text_encoder(part: ModelPart) -> Reading:
    """Read a text encoder, whose tensors are named alike in SAT and transformers.

    Raises:
        ExportError: if it is not whole.
    """
    structure = text_encoder.structure(part.shapes)
    if structure is None:
        raise _not_whole(part, [], counted(len(part.tensors), "tensor"))
    mapped = text_encoder.to_transformers(part.tensors, structure)
    shapes = {item.diffusers: item.shape for item in text_encoder.tensors(structure)}
    _refuse_wrong(part, mapped, shapes)
    dtype = part.tensors[mapped.targets[text_encoder.EMBEDDING][0].key].dtype
    return Reading(part, mapped, shapes, structure.config(dtype.name))


def model_name(reading: Reading) -> str:
    """The name of a part's model, and its sizes where those are not the published ones."""
    model = reading.model
    if model is None:
        return "a text encoder"
    if reading.part.name != TRANSFORMER:
        return model.name
    layers, heads = reading.config.get("num_layers"), reading.config.get("num_attention_heads")
    head = reading.config.get("attention_head_dim")
    if (layers, heads) == (model.layers, model.heads):
        return model.name
    hidden = heads * head if isinstance(heads, int) and isinstance(head, int) else "?"
    return f"{model.name}, of other sizes: {layers} layers, hidden size {hidden}"


# What is wrong


def _bare(part: ModelPart, key: str) -> str:
    """A key by the name that the key map has for it."""
    return sat.table_key(key) if part.layout == "sat" else key


def _as_there(part: ModelPart, name: str) -> str:
    """A name of the key map as the part's other keys are written."""
    for key in part.tensors:
        bare = sat.bare_key(key)
        if key.endswith(bare):
            return key.removesuffix(bare) + name
    return name


def _shape_in(part: ModelPart, mapped: Mapped, target: str) -> tuple[int, ...]:
    """The shape that a target has, made of the part's rows; () if it is not there."""
    runs = mapped.targets.get(target, ())
    first = part.tensors[runs[0].key].shape if runs else ()
    if not first:
        return ()
    return (sum(part.tensors[run.key].shape[0] // run.of for run in runs), *first[1:])


def _refuse_wrong(part: ModelPart, mapped: Mapped, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a part whose tensors are not all that it has in diffusers, at their shapes."""
    problems = [Problem("unexpected", key) for key in mapped.unknown]
    problems += [Problem("collision", key, expected="one key for a tensor") for key in mapped.twice]
    problems += [Problem("unexpected", runs[0].key) for key, runs in mapped.targets.items() if key not in expected]
    problems += [Problem("missing", key) for key in expected if key not in mapped.targets]
    for key, shape in expected.items():
        if key in mapped.targets:
            problems += _problems_with(part, mapped.targets[key], shape, _shape_in(part, mapped, key))
    if problems:
        raise _not_whole(part, problems)


def _problems_with(
    part: ModelPart, runs: Iterable[Run], expected: tuple[int, ...], found: tuple[int, ...]
) -> list[Problem]:
    problems = []
    for key in dict.fromkeys(run.key for run in runs):
        entry = part.tensors[key]
        if entry.dtype.name not in FLOATS:
            problems.append(Problem("dtype", key, entry.dtype.name, ", ".join(FLOATS)))
    flat = (expected[0], prod(expected[1:])) if len(expected) == 4 else expected  # a convolution stored as a Linear
    run = next(iter(runs))
    rows = part.tensors[run.key].shape[:1]
    if found not in (expected, flat) or (rows and rows[0] % run.of):
        problems.append(Problem("shape", run.key, str(part.tensors[run.key].shape), f"{expected} in diffusers"))
    return problems


def _not_whole(
    part: ModelPart, problems: list[Problem], found: str | None = None, expected: str | None = None
) -> ExportError:
    names = {TRANSFORMER: "CogVideoX transformer", "vae": "CogVideoX VAE", "text_encoder": "T5 text encoder"}
    return ExportError(
        f"this is not a whole {names[part.name]}",
        file=part.checkpoint.path,
        found=found,
        expected=expected,
        problems=problems,
        hint=command("inspect", part.checkpoint.path),
    )


def _read_config(part: ModelPart) -> dict[str, object] | None:
    """The config.json beside a part in diffusers' layout; None if there is none.

    Raises:
        CheckpointError: if it cannot be read.
        ExportError: if diffusers would read other weights than these.
    """
    shards = PARTS[part.name].shard_index
    if part.checkpoint.path.name == PARTS[part.name].weights_name and part.checkpoint.has_beside(shards):
        raise ExportError(
            "there are two sets of weights in this folder: diffusers loads the shards that the index names",
            file=part.checkpoint.path,
            found=f"{part.checkpoint.path.name} and {shards}",
            hint="move away the one that is not meant",
        )
    file = part.checkpoint.read_beside(CONFIG, MAX_CONFIG_BYTES)
    if file is None:
        return None
    return parse_config(file.path, file.content)
