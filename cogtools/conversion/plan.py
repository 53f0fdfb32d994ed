"""The plan: what a LoRA becomes in another layout, tensor by tensor.

A plan needs names and shapes only. It says for every tensor of the output what its key, dtype and shape are, and the
pieces that make it up; so it serves `inspect` (what would this become?), `export-lora` (write it) and `verify` (is
this what it should be?) alike.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.dtypes import DTYPES
from cogtools.conversion.lora import find_lora, find_scale, find_transformer, read_config
from cogtools.conversion.options import CASTS
from cogtools.conversion.refusals import no_lora, refuse_unexportable, tensor_parallel
from cogtools.conversion.scale import (
    ALPHA_SOURCES,
    BY_DEFAULT,
    BY_HAND,
    BY_NOTHING,
    BY_SCALING,
    Carried,
    Statement,
    carry,
)
from cogtools.errors import ExportError, OptionError, Problem, command
from cogtools.formatting import counted, fold_numbers, number
from cogtools.layouts import sat
from cogtools.layouts.family import LoraKey, Module, Transformer, rank_of
from cogtools.layouts.folded import fold_modules, fold_names
from cogtools.layouts.lora import other_adapter
from cogtools.layouts.programs import LOSERS

if TYPE_CHECKING:
    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.tensors import Storage, TensorEntry
    from cogtools.conversion.lora import Lora
    from cogtools.conversion.options import ExportOptions
    from cogtools.conversion.scale import Scale
    from cogtools.conversion.training_config import TrainingConfig
    from cogtools.layouts.lora import LoraLayout

FLOATS = ("float32", "float16", "bfloat16", "float64")
"""The dtypes that a LoRA can have."""


class Fold(NamedTuple):
    """Arithmetic on one tensor of a module: lora_B @ lora_A comes out multiplied by `scaling`, and a bias too.

    Attributes:
        scaling: the factor.
        part: which tensor of the module this is.
        a: lora_A.
        b: lora_B.
    """

    scaling: float
    part: str
    a: TensorEntry
    b: TensorEntry


class Cast(NamedTuple):
    """Arithmetic on one tensor: its numbers in another dtype."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One tensor of an output.

    Attributes:
        key: its key there.
        dtype: its dtype there.
        shape: its shape there.
        pieces: views of the checkpoint, or constant bytes; laid end to end they are its content.
        compute: what is done to them; None if they are copied as they are.
        source: the key of what it is made of, for messages.
    """

    key: str
    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[TensorEntry | bytes, ...]
    compute: Fold | Cast | None = None
    source: str = ""

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes."""
        return self.dtype.size_bytes(prod(self.shape))

    @property
    def storages(self) -> list[Storage]:
        """The storages that its pieces view."""
        return [piece.storage for piece in self.pieces if not isinstance(piece, bytes)]


@dataclass(frozen=True)
class LoraPlan:
    """What a checkpoint's LoRA becomes.

    Attributes:
        lora: what was read.
        layout: what it becomes.
        transformer: the transformer that it belongs to.
        layers: the layers that it adapts.
        scale: what its updates are multiplied by, and who states it.
        dtype: the dtype of its tensors in the checkpoint.
        names: the tensors, by the order of the output: sorted by key.
        notices: what the user should know.
        config: the training configuration that was read; None if there is none.
    """

    lora: Lora
    layout: LoraLayout
    transformer: Transformer
    layers: tuple[int, ...]
    scale: Scale
    dtype: DType
    names: tuple[LoraKey, ...]
    notices: tuple[str, ...] = ()
    config: AnyPath | None = None

    @cached_property
    def modules(self) -> list[Module]:
        """The adapted modules that are exported, by layer."""
        return sorted({name.module for name in self.names}, key=lambda module: module.order)

    @cached_property
    def ranks(self) -> dict[Module, int]:
        """The rank of each of these."""
        ranks = self.lora.ranks
        return {module: ranks[module] for module in self.modules}

    @property
    def rank(self) -> int | None:
        """The rank of every module; None if they differ."""
        found = set(self.ranks.values())
        return found.pop() if len(found) == 1 else None

    @cached_property
    def scalings(self) -> dict[Module, float]:
        """What each module's update is multiplied by."""
        found = self.scale.scalings
        return {module: scaling for module in self.modules if (scaling := found.get(module)) is not None}

    @property
    def scaling(self) -> float | None:
        """What every module's update is multiplied by; None if they differ."""
        found = set(self.scalings.values())
        return found.pop() if len(found) == 1 else None

    @property
    def storages(self) -> list[Storage]:
        """The storages that its tensors view, each once."""
        found = (self.lora.tensors[name].entry.storage for name in self.names)
        return list({id(storage): storage for storage in found}.values())

    @property
    def has_crc32(self) -> bool:
        """Whether the checkpoint records CRC-32s by which damage to these storages can be told."""
        return any(storage.crc32 is not None for storage in self.storages)

    def entry(self, name: LoraKey) -> TensorEntry:
        """A tensor of the checkpoint."""
        return self.lora.tensors[name].entry

    def key(self, name: LoraKey) -> str:
        """The key of a tensor in the output."""
        key = self.layout.key(name)
        if key is None:
            raise ValueError(f"planned without a key: {name}")
        return key

    @property
    def parts(self) -> frozenset[str]:
        """The parts that adapters have beside their factors."""
        return frozenset(name.part for name in self.names) - {"A", "B"}

    @property
    def alphas(self) -> dict[Module, float]:
        """The alpha to state for each module, so that alpha / rank is its scaling; whole numbers as such."""
        scalings, stated = self.scalings, self.scale.statement.alphas
        return {module: _alpha(rank, scalings[module], stated.get(module)) for module, rank in self.ranks.items()}

    @property
    def folded(self) -> dict[Module, float]:
        """What to multiply each update by, so that the layout's reader has it right where nothing is stated."""
        as_read = {module: self.layout.scaling_unstated(rank) or 1.0 for module, rank in self.ranks.items()}
        return {module: scaling / as_read[module] for module, scaling in self.scalings.items()}


def _alpha(rank: int, scaling: float, stated: float | None) -> float:
    """An alpha that gives a scaling at a rank: the one that is stated, if it does."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0))
    exact = (value for value in (stated, *near) if value is not None and value / rank == scaling)
    alpha = next(exact, alpha)
    return int(alpha) if alpha == int(alpha) else alpha


def plan_lora(
    checkpoint: Checkpoint,
    layout: LoraLayout,
    *,
    alpha: float | None = None,
    scaling: float | None = None,
    allow_partial: bool = False,
) -> LoraPlan:
    """Plan what the LoRA in a checkpoint becomes in another layout. None of its weights are read.

    Args:
        checkpoint: the checkpoint, open.
        layout: what it is to become.
        alpha: the training's alpha; None takes what is stated in the file or beside it.
        scaling: the same of the scaling itself.
        allow_partial: accept a LoRA that adapts some of the layers only.

    Raises:
        ExportError: if there is no LoRA, or not a right one: all that is wrong is listed.
        CheckpointError: if the training configuration cannot be read. With `alpha` or `scaling` given, a notice says
            so instead.
        OptionError: if both are given, or one that is not a number above 0.
    """
    refuse_unexportable(checkpoint)
    lora = find_lora(checkpoint)
    if lora is None or (not lora.tensors and not lora.unreadable and lora.layout is not sat.LAYOUT):
        raise no_lora(checkpoint)
    common = _common(lora)
    if common is None:
        if not lora.tensors and not any(sat.is_lora_key(key) for key in lora.unplaced):
            raise no_lora(checkpoint)
        raise _wrong(checkpoint, [*_unusable_keys(lora), *_not_two_dimensions(lora)])
    _refuse_tensor_parallel(lora)
    transformer, notices = _transformer(lora, common)
    problems = [*_unusable_keys(lora), *_differing(lora, transformer, common), *_without_place(lora, layout)]
    by_hand = BY_HAND if alpha is not None else BY_SCALING if scaling is not None else None
    config, config_notices = read_config(lora, by_hand=by_hand)
    if config is not None and config.rank not in (None, common.rank):
        problems.append(Problem("rank", str(config.path), f"r: {config.rank}", f"r: {common.rank}, as the shapes say"))
    layers, layer_problems, layer_notices = _layers(lora, transformer, config, allow_partial=allow_partial)
    if problems or layer_problems:
        helps = not (problems or allow_partial) and not _layers(lora, transformer, config, allow_partial=True)[1]
        raise _wrong(checkpoint, [*problems, *layer_problems], _partial(config) if helps else None)
    scale = find_scale(lora, alpha=alpha, scaling=scaling, config=config)
    return LoraPlan(
        lora=lora,
        layout=layout,
        transformer=transformer,
        layers=layers,
        scale=scale,
        dtype=common.dtype,
        names=tuple(sorted(lora.tensors, key=lambda name: layout.key(name) or "")),
        notices=(
            *notices,
            *_prefix_notice(lora),
            *layer_notices,
            *config_notices,
            *_scale_notices(scale, config),
            *_left_out_notice(lora),
            *_size_notice(layout, transformer),
        ),
        config=None if config is None else config.path,
    )


def planned_tensors(plan: LoraPlan, options: ExportOptions) -> list[Planned]:
    """The tensors of the output, in the order of their keys.

    Raises:
        OptionError: if there is no such dtype.
    """
    dtype = target_dtype(plan, options)
    planned = [_planned_alpha(plan, module, alpha) for module, alpha in carried(plan, options).alphas.items()]
    folded = plan.folded if options.way == "fold" else {}
    for name in plan.names:
        entry = plan.entry(name)
        compute: Fold | Cast | None = None
        if folded.get(name.module, 1.0) != 1.0 and name.part in ("A", "B", "bias"):
            a, b = (plan.entry(name._replace(part=part)) for part in "AB")
            compute = Fold(folded[name.module], name.part, a, b)
        elif dtype != entry.dtype:
            compute = Cast()
        source = plan.lora.tensors[name].key
        planned.append(Planned(plan.key(name), dtype, entry.shape, (entry,), compute, source))
    return sorted(planned, key=lambda tensor: tensor.key)


MIN_FLOAT32, MAX_FLOAT32 = 2.0**-126, 3.4e38
"""Between these an alpha keeps its precision as a float32."""


def _planned_alpha(plan: LoraPlan, module: Module, alpha: float) -> Planned:
    key = plan.key(LoraKey(*module, "alpha"))
    if not MIN_FLOAT32 <= alpha <= MAX_FLOAT32:
        raise ExportError(
            "an alpha does not fit into the float32 that states it",
            file=plan.lora.checkpoint.path,
            found=f"{number(alpha)} for {key}",
            expected=f"{MIN_FLOAT32:.3g} to {MAX_FLOAT32:.3g}",
            hint="export with --scale fold",
        )
    return Planned(key, DTYPES["float32"], (), (struct.pack("<f", alpha),))


def carried(plan: LoraPlan, options: ExportOptions, record: str | None = None) -> Carried:
    """How the output carries the scale: stated where its layout states it, as 1 if it is folded in, or not at all.

    Args:
        plan: what is exported.
        options: how.
        record: how it is made, for a layout whose file has no header.

    Raises:
        ExportError: if the layout's place has one alpha for all modules, and they have different ones.
    """
    layout, ranks = plan.layout, plan.ranks
    if options.way == "none":
        return Carried()
    alphas = plan.alphas
    if options.way == "fold":
        if layout.unstated_scaling is not None and layout.scale in ("alpha_tensors", "nowhere"):
            return Carried()
        alphas = {module: rank * (layout.scaling_unstated(rank) or 1.0) for module, rank in ranks.items()}
        alphas = {module: _alpha(1, alpha, None) for module, alpha in alphas.items()}
    if layout.one_rank and len(set(alphas.values())) > 1:
        raise ExportError(
            f"{layout.reader} has one alpha for all modules, and this LoRA has different ones",
            file=plan.lora.checkpoint.path,
            found=", ".join(map(number, sorted(set(alphas.values())))),
            hint="export with --scale fold",
        )
    layers = plan.layers if len(plan.layers) < plan.transformer.layers else ()
    return carry(layout, ranks, alphas, parts=plan.parts, layers=layers, record=record)


def target_dtype(plan: LoraPlan, options: ExportOptions) -> DType:
    """The dtype of the output's tensors.

    Raises:
        OptionError: if there is no such dtype.
    """
    if options.dtype == "keep":
        return plan.dtype
    if options.dtype not in CASTS:
        raise OptionError("there is no such dtype", found=options.dtype, expected="keep, " + ", ".join(CASTS))
    return DTYPES[CASTS[options.dtype]]


class _Common(NamedTuple):
    """What most factors of a LoRA agree on."""

    rank: int
    hidden: int
    dtype: DType


def _common(lora: Lora) -> _Common | None:
    """What most factors agree on; None if none has two dimensions."""
    ranks = Counter(
        rank
        for key, tensor in lora.tensors.items()
        if len(tensor.entry.shape) == 2 and (rank := rank_of(key, tensor.entry.shape)) is not None
    )
    if not ranks:
        return None
    (dtype, _), *_ = Counter(tensor.entry.dtype for tensor in lora.tensors.values()).most_common(1)
    return _Common(ranks.most_common(1)[0][0], lora.most_common_hidden() or 0, dtype)


def _unusable_keys(lora: Lora) -> list[Problem]:
    """Keys of the LoRA that cannot be exported: unknown, not tensors, or a second one for a tensor."""
    problems = [_unplaced(lora, key) for key in lora.unplaced]
    problems += [
        Problem("unreadable", key, found="something else than a plain tensor") for key in lora.unreadable.values()
    ]
    problems += [
        Problem("collision", key, found=f"the same tensor as {lora.key(name)}") for key, name in lora.collisions.items()
    ]
    order = {key: place for place, key in enumerate([*lora.checkpoint.tensors, *lora.checkpoint.not_tensors])}
    problems += _mixed_prefixes(lora)
    return sorted(problems, key=lambda problem: order.get(problem.subject, 0))


def _unplaced(lora: Lora, key: str) -> Problem:
    if lora.layout is sat.LAYOUT or sat.is_lora_key(key):
        expected = "q, k, v or dense of an attention layer: SAT's LoRA adapts these, and only these are exported"
        return Problem("unexpected", key, expected=expected)
    return Problem("unexpected", key, expected="a module of CogVideoX and a part of its adapter")


def _mixed_prefixes(lora: Lora) -> list[Problem]:
    """Keys after another unknown prefix than most: one that all share is accepted."""
    if lora.names is None or lora.layout is None:
        return []
    main = lora.names.spelling.prefix
    own = lora.layout.written
    known = {own.prefix} | {spelled.prefix for spelled in lora.layout.also_read if spelled.names is own.names} | {main}
    problems = []
    for tensor in lora.tensors.values():
        reading = lora.reading(tensor.key)
        prefix = main if reading is None else reading.spelling.prefix
        if prefix not in known:
            expected = f"{own.prefix or 'nothing'} before it, or what stands before the others"
            problems.append(Problem("unexpected", tensor.key, f"an unknown prefix {prefix!r}", expected))
    return problems


def _prefix_notice(lora: Lora) -> list[str]:
    prefix = lora.unknown_prefix
    return (
        [] if not prefix else [f"All keys of the LoRA have the prefix {prefix!r}, which no program is known to write."]
    )


def _not_two_dimensions(lora: Lora) -> list[Problem]:
    return [
        Problem("shape", tensor.key, str(tensor.entry.shape), "two dimensions")
        for key, tensor in lora.tensors.items()
        if key.part in ("A", "B")
    ]


def _differing(lora: Lora, transformer: Transformer, common: _Common) -> list[Problem]:
    """The tensors that do not fit the transformer, are not as the others, or cannot be written."""
    problems = []
    ranks = lora.ranks
    one_rank = lora.layout is not None and lora.layout.one_rank
    for name, (key, entry) in lora.tensors.items():
        rank = common.rank if one_rank else ranks.get(name.module, common.rank)
        expected = transformer.lora_shape(name, rank)
        if expected is not None and not _has_shape(entry.shape, expected):
            problems.append(Problem("shape", key, str(entry.shape), _shape_text(expected)))
        elif entry.dtype != common.dtype:
            problems.append(Problem("dtype", key, entry.dtype.name, common.dtype.name))
        elif entry.dtype.name not in FLOATS:
            problems.append(Problem("dtype", key, entry.dtype.name, "one of " + ", ".join(FLOATS)))
        elif entry.size_bytes > entry.storage.size_bytes or not entry.numel:
            problems.append(Problem("shape", key, f"{entry.shape} in {entry.storage.size_bytes:,} bytes of storage"))
    return problems


def _has_shape(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        wanted is None or size == wanted for size, wanted in zip(shape, expected, strict=True)
    )


def _shape_text(expected: tuple[int | None, ...]) -> str:
    return str(tuple("any" if size is None else size for size in expected)).replace("'", "")


def _without_place(lora: Lora, layout: LoraLayout) -> list[Problem]:
    """The tensors that the target layout has no place for, or cannot be together in it."""
    expected = f"a module and a part that {layout.reader} has, for --format {layout.name}"
    lost = [name for name in lora.tensors if layout.key(name) is None]
    convolutions = [name for name, tensor in lora.tensors.items() if len(tensor.entry.shape) == 4]
    if layout.reads_convolutions:
        convolutions = []
    problems = lora.problems("unexpected", lost, expected=expected)
    problems += lora.problems("unexpected", set(convolutions) - set(lost), "a convolution's LoRA", "that of a Linear")
    by_rank: dict[int, list[Module]] = {}
    for module, rank in lora.ranks.items():
        by_rank.setdefault(rank, []).append(module)
    if layout.one_rank and len(by_rank) > 1 and (lora.layout is None or not lora.layout.one_rank):
        one = f"one rank throughout, as {layout.reader} has it"
        problems += [Problem("rank", fold_modules(found), str(rank), one) for rank, found in sorted(by_rank.items())]
    return problems


def _refuse_tensor_parallel(lora: Lora) -> None:
    if lora.layout is not sat.LAYOUT:
        return
    ranks = sat.tensor_parallel_ranks({name: tensor.entry.shape for name, tensor in lora.tensors.items()})
    if ranks > 1:
        found = f"shapes of one of {ranks} ranks, which divide the hidden size among them"
        raise tensor_parallel(lora.checkpoint, found)


def _transformer(lora: Lora, common: _Common) -> tuple[Transformer, list[str]]:
    known = find_transformer(lora.checkpoint, lora)
    if known is not None:
        return known, []
    layers = max(lora.layers, default=-1) + 1
    return Transformer(layers, common.hidden, ()), [
        f"Nothing tells how many layers the model has (hidden size {common.hidden}, no base weights): "
        f"taken to be {layers}, as the LoRA has."
    ]


def _layers(
    lora: Lora, transformer: Transformer, config: TrainingConfig | None, *, allow_partial: bool
) -> tuple[tuple[int, ...], list[Problem], list[str]]:
    """The layers to export, what is wrong with them, and what to note of them."""
    everything = range(transformer.layers)
    expected, declared_by = tuple(everything), ""
    wanted = None if allow_partial else lora.stated_names(transformer)
    if allow_partial:
        expected, declared_by = lora.layers, " (--allow-partial)"
    elif config is not None and config.layers is not None:
        expected, declared_by = config.layers_of(transformer.layers), " (layer_range in training_config.yaml)"
    elif wanted is not None:
        stated = {name.layer for name in wanted if name.layer is not None}
        expected, declared_by = tuple(sorted(stated)), " (target_modules)"
    declared = "" if allow_partial else declared_by
    wanted = wanted if wanted is not None else lora.expected(expected)
    kinds = {(name.name, name.part) for name in wanted if name.layer is not None}
    missing = sorted(wanted - lora.tensors.keys() - lora.unreadable.keys(), key=lambda name: name.order)
    problems = [
        Problem("missing", text, expected=f"layers {fold_numbers(expected)}{declared}" if declared else None)
        for text in fold_names(missing, kinds)
    ]
    allowed = sorted(set(expected) & set(everything))
    beyond = [name for name in lora.tensors if name.layer is not None and name.layer not in allowed]
    problems += [
        Problem("unexpected", text, expected=f"layers {fold_numbers(allowed)}{declared}")
        for text in fold_names(beyond, kinds)
    ]
    beside = [name for name in lora.tensors if name.layer is None and not transformer.has(name.module)]
    problems += lora.problems("unexpected", beside, expected=f"a module of {transformer.name}")
    notices = []
    if expected and len(expected) < transformer.layers:
        layers = fold_numbers(expected)
        notices.append(f"The LoRA adapts {len(expected)} of {transformer.layers} layers: {layers}{declared_by}.")
    return expected, problems, notices


def _scale_notices(scale: Scale, config: TrainingConfig | None) -> list[str]:
    """What to note if nothing states the scale, or two places do and differ."""
    if scale.source == BY_DEFAULT:
        why = (
            "training_config.yaml sets no lora_alpha"
            if config
            else "There is no training_config.yaml with a lora_alpha"
        )
        doubt = "" if config else " If the training had another one, state it with --alpha."
        return [f"{why}, so alpha is {sat.DEFAULT_ALPHA}, SAT's default.{doubt}"]
    if scale.source == BY_NOTHING:
        losers = ", ".join(f"{name} {scaling}" for name, scaling in LOSERS)
        return [
            "Nothing states the scale: taken as 1, as diffusers does. Trainers that lose it, with the scaling of their "
            f"defaults: {losers}. State it with --scaling, or --alpha."
        ]
    differing = [
        other for other in scale.others if other.source != BY_DEFAULT and not _is_same_scale(scale.statement, other)
    ]
    if scale.source in (BY_HAND, BY_SCALING):
        kind, value = _value(scale.statement)
        return [
            f"{kind} is {value}, as {scale.source} states; {other.source} states {_value_as(kind, other)}."
            for other in differing
        ]
    kind, value = _value(scale.statement)
    return [
        f"{kind} is {value}, {ALPHA_SOURCES[scale.source]}; {ALPHA_SOURCES[other.source]}: {_value_as(kind, other)}."
        for other in differing
    ]


def _is_same_scale(one: Statement, other: Statement) -> bool:
    return all(
        scaling == value or (scaling is not None and value is not None and math.isclose(scaling, value, rel_tol=1e-9))
        for module, scaling in one.scalings.items()
        for value in [other.scalings.get(module)]
    )


def _value(statement: Statement) -> tuple[str, str]:
    """What a place states: an alpha or a scaling, and which."""
    if statement.source == BY_SCALING or not statement.alphas:
        value = statement.scaling
        return "scaling", "different by module" if value is None else number(value)
    return "alpha", "different by module" if statement.alpha is None else number(statement.alpha)


def _value_as(kind: str, statement: Statement) -> str:
    """The same, where a reader has just read of an alpha or of a scaling."""
    own, value = _value(statement)
    return value if own == kind else f"{own} {value}"


def _left_out_notice(lora: Lora) -> list[str]:
    """What to note of tensors beside the LoRA that change weights too, as ComfyUI's trainer writes them."""
    found = Counter(kind for key in lora.foreign if (kind := other_adapter(key)) is not None)
    return [
        f"Not exported: {counted(count, 'tensor')} of {kind.name}, which only {kind.readers} applies."
        for kind, count in found.items()
    ]


def _size_notice(layout: LoraLayout, transformer: Transformer) -> list[str]:
    """What to note of a transformer that is no CogVideoX, or that the layout's reader does not have."""
    if transformer.others is not None:
        return [f"No CogVideoX has hidden size {transformer.hidden}: {transformer.others} have, which SAT trains too."]
    if layout.only_size in (None, (transformer.layers, transformer.hidden)):
        return []
    return [
        f"{layout.reader} has CogVideoX with {layout.only_size[0]} layers of hidden size {layout.only_size[1]} only: "
        f"it cannot load this LoRA, of {transformer.layers} layers of hidden size {transformer.hidden}."
    ]


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
