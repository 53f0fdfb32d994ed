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
from cogtools.checkpoint.formats import safetensors
from cogtools.conversion.lora import find_lora, find_scale, find_transformer, read_config
from cogtools.conversion.options import BY_HAND, BY_SCALING, CASTS
from cogtools.conversion.refusals import no_lora, refuse_unexportable, tensor_parallel
from cogtools.conversion.scale import (
    ALPHA_SOURCES,
    BY_DEFAULT,
    BY_NOTHING,
    BY_TENSORS,
    Carried,
    Statement,
    carry,
)
from cogtools.conversion.trained import trained_beside, trained_notices
from cogtools.errors import SHOWN_PROBLEMS, ExportError, OptionError, Problem, command
from cogtools.formatting import counted, fold_numbers, number, shown
from cogtools.layouts import sat
from cogtools.layouts.family import LoraKey, Module, Transformer, rank_of
from cogtools.layouts.folded import fold_modules, fold_names
from cogtools.layouts.lora import other_adapter
from cogtools.layouts.programs import LOSERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

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


class Update(NamedTuple):
    """What a LoRA adds to the weight of a module: scaling * b @ a.

    Attributes:
        a: lora_A: (rank, in), or with the kernel of a convolution behind it.
        b: lora_B: (out, rank), or with a kernel of 1 x 1 behind it.
        scaling: the factor.
    """

    a: TensorEntry
    b: TensorEntry
    scaling: float

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.a.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """The rows and columns of the weight that it is added to; a convolution's kernel counts as columns."""
        return self.b.shape[0], prod(self.a.shape[1:])

    def of_rows(self, first: int, last: int) -> Update:
        """What it adds to the rows from `first` up to `last`, which is not one of them."""
        return self._replace(b=self.b.rows(first, last))


class Fold(NamedTuple):
    """Arithmetic on a tensor of a module: lora_B @ lora_A comes out as the sum of updates, at a scaling of 1.

    Those of several are stacked: lora_A row under row, lora_B column beside column. A bias of lora_B is multiplied as
    the product is.

    Attributes:
        module: the module.
        part: which tensor of the module this is.
        updates: what is folded into it.
        rank: the rank that it is cut down to, to the best approximation of that rank; None keeps all.
    """

    module: Module
    part: str
    updates: tuple[Update, ...]
    rank: int | None = None


class Cast(NamedTuple):
    """Arithmetic on one tensor: its numbers in another dtype."""


class Added(NamedTuple):
    """What is added to a run of rows of a base weight.

    Attributes:
        module: the module whose rows they are.
        updates: what is added, each with as many rows; none where nothing is.
    """

    module: Module
    updates: tuple[Update, ...] = ()


class Merge(NamedTuple):
    """Arithmetic on a base weight: updates are added to its rows.

    Attributes:
        added: for each piece of the planned tensor, what is added to it.
    """

    added: tuple[Added, ...]


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
    compute: Fold | Cast | Merge | None = None
    source: str = ""

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes."""
        return self.dtype.size_bytes(prod(self.shape))

    @property
    def storages(self) -> list[Storage]:
        """The storages that it is made of."""
        entries = [piece for piece in self.pieces if not isinstance(piece, bytes)]
        if isinstance(self.compute, Merge):
            entries += [entry for added in self.compute.added for update in added.updates for entry in update[:2]]
        return [entry.storage for entry in entries]


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
        return one_rank(self.ranks)

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

    def update(self, module: Module, scaling: float | None = None) -> Update:
        """What the LoRA adds to a module's weight, at its own scaling or another one."""
        a, b = (self.entry(LoraKey(*module, part)) for part in "AB")
        return Update(a, b, self.scalings[module] if scaling is None else scaling)


def one_rank(ranks: Mapping[Module, int]) -> int | None:
    """The rank that all modules have; None if they differ."""
    found = set(ranks.values())
    return found.pop() if len(found) == 1 else None


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
    if lora is None or not (lora.tensors or lora.unreadable or any(map(sat.is_lora_key, lora.unplaced))):
        raise no_lora(checkpoint)
    common = _common(lora)
    if common is None:
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
            *_alpha_notice(lora, scale),
            *_left_out_notice(lora),
            *trained_notices(lora),
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
    alphas = carried(plan, options).alphas
    planned = [planned_alpha(plan.layout, module, alpha) for module, alpha in alphas.items()]
    folded = plan.folded if options.way == "fold" else {}
    for name in plan.names:
        key, entry, source = plan.key(name), plan.entry(name), plan.lora.tensors[name].key
        if options.rank is not None:
            planned.append(planned_factor(key, name, (plan.update(name.module),), dtype, options.rank, source))
            continue
        compute: Fold | Cast | None = None
        if folded.get(name.module, 1.0) != 1.0 and name.part in ("A", "B", "bias"):
            compute = Fold(name.module, name.part, (plan.update(name.module, folded[name.module]),))
        elif dtype != entry.dtype:
            compute = Cast()
        planned.append(Planned(key, dtype, entry.shape, (entry,), compute, source))
    return sorted(planned, key=lambda tensor: tensor.key)


def planned_factor(
    key: str, name: LoraKey, updates: tuple[Update, ...], dtype: DType, rank: int | None, source: str
) -> Planned:
    """A factor of the sum of a module's updates.

    Args:
        key: its key in the output.
        name: which factor of which module it is.
        updates: what is added up.
        dtype: its dtype in the output.
        rank: the largest rank that it may have; None keeps that of all updates together.
        source: the key of what it is made of, for messages.
    """
    stacked, kept = sum(update.rank for update in updates), kept_rank(updates, rank)
    first = updates[0]
    shape = (kept, *first.a.shape[1:]) if name.part == "A" else (first.b.shape[0], kept, *first.b.shape[2:])
    pieces = tuple(update.a if name.part == "A" else update.b for update in updates)
    compute = Fold(name.module, name.part, updates, kept if kept < stacked else None)
    return Planned(key, dtype, shape, pieces, compute, source)


def kept_rank(updates: Sequence[Update], rank: int | None) -> int:
    """The rank of a sum of updates that are stacked, or cut down to `rank` where that is less."""
    stacked = sum(update.rank for update in updates)
    return stacked if rank is None else min(stacked, rank, *updates[0].size)


def planned_alpha(layout: LoraLayout, module: Module, alpha: float) -> Planned:
    """The tensor that states the alpha of a module, in float32: what is accepted as a scale is far from its ends."""
    key = layout.key(LoraKey(*module, "alpha")) or ""
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
    layout, ranks, file = plan.layout, plan.ranks, plan.lora.checkpoint.path
    layers = plan.layers if len(plan.layers) < plan.transformer.layers else ()
    if options.rank is not None:
        return carry_one(layout, target_ranks(plan, options), file=file, layers=layers, record=record)
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
            file=file,
            found=", ".join(map(number, sorted(set(alphas.values())))),
            hint="export with --scale fold",
        )
    return carry(layout, ranks, alphas, parts=plan.parts, layers=layers, record=record)


def carry_one(
    layout: LoraLayout, ranks: Mapping[Module, int], *, file: AnyPath, layers: Sequence[int], record: str | None
) -> Carried:
    """State that the scaling of all modules is 1: their alphas are their ranks.

    Args:
        layout: the layout of the output.
        ranks: of every module.
        file: what it is made of, for messages.
        layers: those that it adapts, where that is not all; () if it is.
        record: how it is made, for a layout whose file has no header.

    Raises:
        ExportError: if the layout's modules have one rank, and these have different ones.
    """
    found = sorted(set(ranks.values()))
    if layout.one_rank and len(found) > 1:
        raise ExportError(
            f"{layout.reader} has one rank for all modules, and this LoRA would have different ones",
            file=file,
            found=", ".join(map(str, found)),
            hint=f"cut all to one with --rank {found[0]}, or choose another --format",
        )
    return carry(layout, ranks, ranks, layers=layers, record=record)


def target_ranks(plan: LoraPlan, options: ExportOptions) -> dict[Module, int]:
    """The rank of every module of the output.

    Raises:
        OptionError: if the rank that is asked for is not below that of any module.
    """
    if options.rank is None:
        return plan.ranks
    refuse_more_than_factors(plan, "cut to a lower rank")
    refuse_rank(options.rank, plan.ranks.values())
    return {module: kept_rank([plan.update(module)], options.rank) for module in plan.modules}


def refuse_more_than_factors(plan: LoraPlan, done: str) -> None:
    """Raise an `ExportError` for biases and magnitude vectors: what they add is not a product of two factors.

    Args:
        plan: the LoRA.
        done: what cannot be done with them: "merged".
    """
    more = [name for name in plan.names if name.part not in ("A", "B")]
    if more:
        raise ExportError(
            f"a LoRA with biases, or with magnitude vectors (DoRA), cannot be {done}",
            file=plan.lora.checkpoint.path,
            problems=plan.lora.problems("unexpected", more, expected="lora_A and lora_B only"),
            hint="load it as it is, with the program that it is for",
        )


def refuse_rank(rank: int, ranks: Iterable[int]) -> None:
    """Raise an `OptionError` if cutting modules of these ranks down to `rank` is impossible, or changes none."""
    largest = max(ranks)
    if not 0 < rank < largest:
        expected = f"a rank from 1 to {largest - 1}: the LoRA has rank {largest}"
        raise OptionError(f"the LoRA cannot be cut down to rank {rank}", expected=expected, hint="leave --rank out")


def target_dtype(plan: LoraPlan, options: ExportOptions) -> DType:
    """The dtype of the output's tensors.

    Raises:
        OptionError: if there is no such dtype.
    """
    if options.dtype == "keep":
        return plan.dtype
    return named_dtype(options.dtype, "keep")


def named_dtype(name: str, *others: str) -> DType:
    """The dtype of a name in `CASTS`.

    Args:
        name: the name.
        others: what else could have been asked for, for the message.

    Raises:
        OptionError: if there is no such dtype.
    """
    if name not in CASTS:
        raise OptionError("there is no such dtype", found=name, expected=", ".join([*others, *CASTS]))
    return DTYPES[CASTS[name]]


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
    odd = _odd_prefixes(lora)
    elsewhere = {key for keys in odd.values() for key in keys}
    problems = [_unplaced(lora, key) for key in lora.unplaced]
    problems += [
        Problem("unreadable", key, found="something else than a plain tensor") for key in lora.unreadable.values()
    ]
    problems += [
        Problem("collision", key, found=f"the same tensor as {lora.key(name)}")
        for key, name in lora.collisions.items()
        if key not in elsewhere
    ]
    problems += [_odd_prefix(lora, prefix, keys) for prefix, keys in odd.items()]
    order = {key: place for place, key in enumerate([*lora.entries, *lora.checkpoint.not_tensors])}
    return sorted(problems, key=lambda problem: order.get(problem.subject, 0))


def _unplaced(lora: Lora, key: str) -> Problem:
    if lora.layout is sat.LAYOUT or sat.is_lora_key(key):
        expected = "q, k, v or dense of an attention layer: SAT's LoRA adapts these, and only these are exported"
        return Problem("unexpected", key, expected=expected)
    return Problem("unexpected", key, expected="a module of CogVideoX and a part of its adapter")


def _odd_prefixes(lora: Lora) -> dict[str, list[str]]:
    """The keys after each unknown prefix that not all of them share: one that all share is accepted."""
    if lora.names is None or lora.layout is None:
        return {}
    own, known = lora.layout.written, {lora.names.spelling.prefix}
    if lora.unknown_prefix is None:
        known |= {own.prefix} | {spelled.prefix for spelled in lora.layout.also_read if spelled.names is own.names}
    odd: dict[str, list[str]] = {}
    for key, reading in lora.names.readings.items():
        if reading.spelling.prefix not in known:
            odd.setdefault(reading.spelling.prefix, []).append(key)
    return odd


def _odd_prefix(lora: Lora, prefix: str, keys: list[str]) -> Problem:
    main = "" if lora.names is None else lora.names.spelling.prefix
    expected = f"{shown(main)}, as before the others" if main else "none, as the others have none"
    return Problem(
        "unexpected", keys[0], f"the prefix {shown(prefix)}, {counted(len(keys), 'key')}", expected, tuple(keys)
    )


def _prefix_notice(lora: Lora) -> list[str]:
    prefix = lora.unknown_prefix
    if prefix is None:
        return []
    before = f"the prefix {shown(prefix)}" if prefix else "no prefix"
    return [f"All keys of the LoRA have {before}, as no program is known to read them."]


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


def can_hold(layout: LoraLayout, lora: Lora) -> bool:
    """Whether a layout has a place for all that a LoRA has."""
    return not _without_place(lora, layout)


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
            f"defaults: {losers}. State it with --alpha, or in export-lora with --scaling."
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


def _alpha_notice(lora: Lora, scale: Scale) -> list[str]:
    """What to note where some modules only have a tensor for their alpha."""
    without = [module for module in lora.ranks if module not in lora.alphas]
    if scale.source != BY_TENSORS or not without:
        return []
    return [f"{len(without)} of {len(lora.ranks)} modules have no alpha tensor: their scaling is taken as 1."]


def _left_out_notice(lora: Lora) -> list[str]:
    """What to note of the tensors beside the LoRA: those that change weights too, as ComfyUI's trainer writes them.

    Others are noted in a file for LoRAs; a training's checkpoint has the model beside.
    """
    trained = set(trained_beside(lora))
    kinds = {key: other_adapter(key) for key in lora.foreign}
    found = Counter(kind for kind in kinds.values() if kind is not None)
    notices = [
        f"Not exported: {counted(count, 'tensor')} of {kind.name}, which only {kind.readers} applies."
        for kind, count in found.items()
    ]
    alone = [tensor.key for module, tensor in lora.alphas.items() if module not in lora.ranks]
    rest = [key for key, kind in kinds.items() if kind is None and key not in trained]
    if lora.checkpoint.format.startswith(safetensors.FORMAT) and (rest or alone):
        left_out = [*rest, *alone]
        more = f" and {len(left_out) - SHOWN_PROBLEMS:,} more" if len(left_out) > SHOWN_PROBLEMS else ""
        names = ", ".join(map(shown, left_out[:SHOWN_PROBLEMS])) + more
        notices.append(f"Not exported, since no LoRA has it: {names}.")
    return notices


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
