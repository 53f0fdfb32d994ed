"""The plan: what a SAT checkpoint's LoRA becomes in diffusers' layout.

A plan needs names and shapes only. It says for every tensor of the output what its key and shape are and which
tensor of the checkpoint it is; so it serves `inspect` (what would this become?), `export-lora` (write it) and
`verify` (is this what it should be?) alike.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.plausible import is_positive
from cogtools.checkpoint.tensors import whole_tensor
from cogtools.conversion.refusals import no_lora, refuse_unexportable, tensor_parallel
from cogtools.conversion.scale import BY_CONFIG, BY_DEFAULT, BY_HAND
from cogtools.conversion.training_config import TrainingConfig, find_training_config, read_training_config
from cogtools.errors import CheckpointError, ExportError, OptionError, Problem, command
from cogtools.formatting import fold_numbers
from cogtools.layouts import diffusers, sat
from cogtools.layouts import family as cogvideox
from cogtools.layouts.family import LoraKey, Transformer
from cogtools.layouts.folded import fold_names

if TYPE_CHECKING:
    from pathlib import Path

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import Storage, TensorEntry

DEFAULT_ALPHA = 1
"""SAT's alpha where the user set none (sat/model/finetune/lora2.py, `LoraMixin.__init__`)."""


FLOATS = ("float32", "float16", "bfloat16", "float64")
"""The dtypes that a LoRA can have."""


class Alpha(NamedTuple):
    """A LoRA's alpha and where it comes from: "--alpha", "training_config.yaml" or "default"."""

    value: float
    source: str


class Source(NamedTuple):
    """A tensor of the checkpoint: its key there, and what is known of it."""

    key: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output.

    Attributes:
        name: which tensor of the LoRA it is.
        key: its key in the output.
        source: the tensor of the checkpoint that it is.
    """

    name: LoraKey
    key: str
    source: Source


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """What a checkpoint's LoRA becomes.

    Attributes:
        transformer: the transformer that it belongs to.
        layers: the layers that it adapts.
        rank: the rank of every module.
        alpha: the training's alpha.
        dtype: the dtype of every tensor in the checkpoint.
        tensors: the tensors of the output, in the order of their keys.
        notices: what the user should know.
        config: the training configuration that was read; None if there is none.
    """

    transformer: Transformer
    layers: tuple[int, ...]
    rank: int
    alpha: Alpha
    dtype: DType
    tensors: tuple[PlannedTensor, ...]
    notices: tuple[str, ...] = ()
    config: Path | None = None

    @property
    def scaling(self) -> float:
        """What the training multiplied lora_B @ lora_A by."""
        return self.alpha.value / self.rank

    @property
    def storages(self) -> list[Storage]:
        """The storages that the tensors view, each once."""
        return list({id(tensor.source.entry.storage): tensor.source.entry.storage for tensor in self.tensors}.values())

    @property
    def has_crc32(self) -> bool:
        """Whether the checkpoint records CRC-32s by which damage to these storages can be told."""
        return any(storage.crc32 is not None for storage in self.storages)

    @property
    def pairs(self) -> list[tuple[PlannedTensor, PlannedTensor]]:
        """Every lora_A with its lora_B, in the order of the output, in which they stand next to each other."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        return [(by_name[name], by_name[name._replace(factor="B")]) for name in by_name if name.factor == "A"]

    @property
    def modules(self) -> list[str]:
        """The paths of the adapted modules inside the transformer."""
        return sorted({diffusers.module_path(tensor.name) for tensor in self.tensors})


def plan_lora_export(checkpoint: Checkpoint, *, alpha: float | None = None, allow_partial: bool = False) -> LoraPlan:
    """Plan what the LoRA in a SAT checkpoint becomes. None of its weights are read.

    Args:
        checkpoint: the checkpoint, open.
        alpha: the training's alpha; None takes it from the training configuration beside the checkpoint, and 1,
            SAT's default, where that does not say.
        allow_partial: accept a LoRA that adapts some of the layers only.

    Raises:
        ExportError: if there is no LoRA, or not a right one: all that is wrong is listed.
        CheckpointError: if the training configuration cannot be read. With `alpha` given, a notice says so instead.
        OptionError: if alpha is no number above 0.
    """
    refuse_unexportable(checkpoint)
    lora = _find_lora(checkpoint)
    facts = _common_facts(lora.sources)
    problems = [*lora.problems, *_differing(lora.sources, facts)]
    config, config_notices = _read_config(checkpoint, alpha)
    if config is not None and config.rank not in (None, facts.rank):
        problems.append(Problem("rank", str(config.path), f"r: {config.rank}", f"r: {facts.rank}, as the shapes say"))
    transformer, notices = _transformer(checkpoint, lora.sources, facts)
    layers, layer_problems, layer_notices = _layers(lora, transformer, config, allow_partial=allow_partial)
    if problems or layer_problems:
        helps = not (problems or allow_partial) and not _layers(lora, transformer, config, allow_partial=True)[1]
        raise _wrong(checkpoint, [*problems, *layer_problems], _partial(config) if helps else None)
    tensors = [
        PlannedTensor(name, diffusers.diffusers_key(name), lora.sources[name]) for name in cogvideox.lora_keys(layers)
    ]
    chosen_alpha, alpha_notices = _alpha(alpha, config)
    return LoraPlan(
        transformer=transformer,
        layers=layers,
        rank=facts.rank,
        alpha=chosen_alpha,
        dtype=facts.dtype,
        tensors=tuple(sorted(tensors, key=lambda tensor: tensor.key)),
        notices=(*notices, *layer_notices, *config_notices, *alpha_notices),
        config=None if config is None else config.path,
    )


class _Facts(NamedTuple):
    """What most tensors of a LoRA agree on."""

    rank: int
    hidden: int
    dtype: DType


class _Lora(NamedTuple):
    """What a checkpoint has of a LoRA.

    Attributes:
        sources: its tensors.
        unreadable: those that are there, but are no plain tensors.
        problems: the keys that are unreadable or have no place.
    """

    sources: dict[LoraKey, Source]
    unreadable: set[LoraKey]
    problems: list[Problem]


def _find_lora(checkpoint: Checkpoint) -> _Lora:
    """The LoRA's tensors, at least one of which has the two dimensions that all should have."""
    lora = _Lora({}, set(), [])
    sources, unreadable, problems = lora
    for key in [*checkpoint.tensors, *checkpoint.not_tensors]:
        if not sat.is_lora_key(key):
            continue
        name = sat.parse_lora_key(key)
        entry = checkpoint.tensors.get(key)
        if name is None:
            problems.append(_unplaced(key))
        elif entry is None:
            unreadable.add(name)
            problems.append(Problem("unreadable", key, found="something else than a plain tensor"))
        elif name in sources:
            problems.append(Problem("collision", key, found=f"the same tensor as {sources[name].key}"))
        else:
            sources[name] = Source(key, whole_tensor(entry))
    if not any(len(source.entry.shape) == 2 for source in sources.values()):
        if sources or any(sat.is_sat_lora_key(problem.subject) for problem in problems):
            raise _wrong(checkpoint, [*problems, *_differing(sources, None)])
        raise no_lora(checkpoint)
    ranks = sat.tensor_parallel_ranks({name: source.entry.shape for name, source in sources.items()})
    if ranks > 1:
        raise tensor_parallel(checkpoint, f"shapes of one of {ranks} ranks, which divide the hidden size among them")
    return lora


def _unplaced(key: str) -> Problem:
    """A LoRA's key that is none of those that are exported."""
    prefix = sat.unknown_prefix(key)
    if prefix is not None:
        expected = f"{sat.PREFIX}, a part of it, or nothing before it"
        return Problem("unexpected", key, f"SAT's key after an unknown prefix {prefix!r}", expected)
    expected = "q, k, v or dense of an attention layer: SAT's LoRA adapts these, and only these are exported"
    return Problem("unexpected", key, expected=expected)


def _common_facts(sources: dict[LoraKey, Source]) -> _Facts:
    """The rank, hidden size and dtype that most tensors have."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for name, source in sources.items():
        if len(source.entry.shape) == 2:
            shapes[source.entry.shape if name.factor == "A" else source.entry.shape[::-1]] += 1
    (rank, hidden), _ = shapes.most_common(1)[0]
    (dtype, _), *_ = Counter(source.entry.dtype for source in sources.values()).most_common(1)
    return _Facts(rank, hidden, dtype)


def _differing(sources: dict[LoraKey, Source], facts: _Facts | None) -> list[Problem]:
    """The tensors that are not as the others, or cannot be written."""
    problems = []
    for name, (key, entry) in sources.items():
        if facts is None or entry.shape != cogvideox.lora_shape(name.factor, facts.rank, facts.hidden):
            expected = cogvideox.lora_shape(name.factor, facts.rank, facts.hidden) if facts else "two dimensions"
            problems.append(Problem("shape", key, str(entry.shape), str(expected)))
        elif entry.dtype != facts.dtype:
            problems.append(Problem("dtype", key, entry.dtype.name, facts.dtype.name))
        elif entry.dtype.name not in FLOATS:
            problems.append(Problem("dtype", key, entry.dtype.name, "one of " + ", ".join(FLOATS)))
        elif entry.size_bytes > entry.storage.size_bytes or not entry.numel:
            problems.append(Problem("shape", key, f"{entry.shape} in {entry.storage.size_bytes:,} bytes of storage"))
    return problems


def _transformer(
    checkpoint: Checkpoint, sources: dict[LoraKey, Source], facts: _Facts
) -> tuple[Transformer, list[str]]:
    shapes = {key: whole_tensor(entry).shape for key, entry in checkpoint.tensors.items()}
    known = sat.recognise_transformer(shapes, facts.hidden)
    if known is not None:
        return known, []
    layers = max(name.layer for name in sources) + 1
    return Transformer(layers, facts.hidden, ()), [
        f"Nothing tells how many layers the model has (hidden size {facts.hidden}, no base weights): "
        f"taken to be {layers}, as the LoRA has."
    ]


def _layers(
    lora: _Lora, transformer: Transformer, config: TrainingConfig | None, *, allow_partial: bool
) -> tuple[tuple[int, ...], list[Problem], list[str]]:
    """The layers to export, what is wrong with them, and what to say of them."""
    everything = range(transformer.layers)
    expected, said_by = tuple(everything), ""
    if allow_partial:
        expected, said_by = tuple(sorted({name.layer for name in lora.sources})), " (--allow-partial)"
    elif config is not None and config.layers is not None:
        expected, said_by = config.layers_of(transformer.layers), " (layer_range in training_config.yaml)"
    declared = "" if allow_partial else said_by
    problems = [
        Problem("missing", text, expected=f"layers {fold_numbers(expected)}{declared}" if declared else None)
        for text in fold_names(
            name for name in cogvideox.lora_keys(expected) if name not in lora.sources and name not in lora.unreadable
        )
    ]
    allowed = sorted(set(expected) & set(everything))
    problems += [
        Problem("unexpected", text, expected=f"layers {fold_numbers(allowed)}{declared}")
        for text in fold_names(name for name in lora.sources if name.layer not in allowed)
    ]
    notices = []
    if len(expected) < transformer.layers:
        notices.append(
            f"The LoRA adapts {len(expected)} of {transformer.layers} layers: {fold_numbers(expected)}{said_by}."
        )
    return expected, problems, notices


def _read_config(checkpoint: Checkpoint, alpha: float | None) -> tuple[TrainingConfig | None, list[str]]:
    """The training configuration as far as it is needed, and what to say of one that is not right."""
    path = find_training_config(checkpoint.path)
    if path is None:
        return None, []
    try:
        return read_training_config(path), []
    except CheckpointError as error:
        if alpha is None:
            raise
        notice = f"{error.what}{f' ({error.found})' if error.found else ''}: not used, as --alpha is given."
    try:
        return read_training_config(path, with_alpha=False), [notice]
    except CheckpointError:
        return None, [notice]


def _alpha(given: float | None, config: TrainingConfig | None) -> tuple[Alpha, list[str]]:
    """The training's alpha, and what to say if nothing states it, or two do and differ."""
    stated = config.alpha if config is not None else None
    if given is not None:
        if not is_positive(given):
            raise OptionError("alpha must be a number above 0", found=str(given), hint="leave --alpha out if unsure")
        alpha = Alpha(int(given) if given == int(given) else given, BY_HAND)
        differs = stated is not None and stated != given
        return alpha, [f"alpha is {alpha.value}, as --alpha says; training_config.yaml says {stated}."] * differs
    if stated is not None:
        return Alpha(stated, BY_CONFIG), []
    why = "training_config.yaml sets no lora_alpha" if config else "There is no training_config.yaml with a lora_alpha"
    doubt = "" if config else " If the training had another one, say so with --alpha."
    return Alpha(DEFAULT_ALPHA, BY_DEFAULT), [f"{why}, so alpha is {DEFAULT_ALPHA}, SAT's default.{doubt}"]


def _partial(config: TrainingConfig | None) -> str:
    """The advice to accept the layers that are there."""
    aside = ", which sets layer_range aside" if config is not None and config.layers is not None else ""
    return f"if only these layers were trained, export with --allow-partial{aside}"


def _wrong(checkpoint: Checkpoint, problems: list[Problem], advice: str | None = None) -> ExportError:
    return ExportError(
        "the LoRA in this checkpoint cannot be exported as it is",
        file=checkpoint.path,
        problems=problems,
        hint=advice or command("inspect", checkpoint.path, "--lora"),
    )
