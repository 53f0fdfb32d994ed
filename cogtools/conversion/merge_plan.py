"""The plan of a merge: which updates of which LoRAs are added up, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from cogtools.conversion.plan import (
    Added,
    Cast,
    Merge,
    carry_one,
    kept_rank,
    planned_alpha,
    planned_factor,
    refuse_more_than_factors,
)
from cogtools.conversion.scale import BY_DEFAULT, BY_NOTHING
from cogtools.errors import ExportError, Problem
from cogtools.layouts import transformer
from cogtools.layouts.family import LoraKey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.model import ModelLayout
    from cogtools.conversion.model_plan import PartPlan
    from cogtools.conversion.plan import LoraPlan, Planned, Update
    from cogtools.conversion.scale import Carried
    from cogtools.layouts.family import Module, Transformer
    from cogtools.layouts.lora import LoraLayout
    from cogtools.layouts.transformer import ModuleRows


@dataclass(frozen=True, slots=True)
class Weighted:
    """A LoRA that is merged, and how strongly.

    Attributes:
        plan: what it is.
        weight: what its updates are multiplied by, beside their own scaling.
    """

    plan: LoraPlan
    weight: float = 1.0

    @property
    def updates(self) -> dict[Module, Update]:
        """What it adds to each module's weight.

        Raises:
            ExportError: if a module's scaling is not known.
        """
        unknown = [module for module in self.plan.modules if module not in self.plan.scalings]
        if unknown:
            raise ExportError(
                "the scaling of a part of this LoRA is not known",
                file=self.plan.lora.checkpoint.path,
                problems=[Problem("scale", str(module), expected="a number") for module in unknown],
                hint="state it with --alpha",
            )
        updates = {module: self.plan.update(module) for module in self.plan.modules}
        return {module: update._replace(scaling=update.scaling * self.weight) for module, update in updates.items()}


def sum_of(loras: Sequence[Weighted]) -> dict[Module, tuple[Update, ...]]:
    """What several LoRAs add to each module's weight, in their order.

    Raises:
        ExportError: if one has more than two factors, if nothing states its scale though others are merged with it, or
            if they are of different models.
    """
    for lora in loras:
        refuse_more_than_factors(lora.plan, "merged")
        if len(loras) > 1:
            _refuse_without_scale(lora.plan)
    found: dict[Module, list[Update]] = {}
    for lora in loras:
        for module, update in lora.updates.items():
            found.setdefault(module, []).append(update)
    _refuse_other_sizes(loras, found)
    return {module: tuple(found[module]) for module in sorted(found, key=lambda module: module.order)}


def common_transformer(loras: Sequence[Weighted]) -> Transformer:
    """The transformer that all of the LoRAs belong to.

    Raises:
        ExportError: if there is none.
    """
    first = loras[0].plan
    found = first.transformer
    for lora in loras[1:]:
        other = lora.plan.transformer
        models = tuple(model for model in found.models if model in other.models)
        known = bool(found.models or other.models)
        if found.hidden != other.hidden or (known and not models):
            raise ExportError(
                "these LoRAs are of different models",
                file=lora.plan.lora.checkpoint.path,
                found=other.name,
                expected=f"{found.name}, as {first.lora.checkpoint.path} has it",
                hint="merge LoRAs of one model only",
            )
        found = found._replace(models=models, layers=max(found.layers, other.layers))
    return found


def _refuse_without_scale(plan: LoraPlan) -> None:
    source = plan.scale.source
    if source == BY_NOTHING or (source == BY_DEFAULT and plan.config is None):
        raise ExportError(
            "nothing states the scale of this LoRA, and each of several has to state its own",
            file=plan.lora.checkpoint.path,
            expected="alpha in the file, or in the configuration beside it",
            hint="export it with --alpha first, and merge what that gives",
        )


def _refuse_other_sizes(loras: Sequence[Weighted], updates: Mapping[Module, Sequence[Update]]) -> None:
    """Refuse updates of one module that have different sizes, where nothing tells the model's."""
    for module, found in updates.items():
        sizes = {update.size for update in found}
        if len(sizes) > 1:
            shapes = ", ".join(map(_shown, sorted(sizes)))
            raise ExportError(
                "these LoRAs do not fit each other",
                file=loras[-1].plan.lora.checkpoint.path,
                problems=[Problem("shape", str(module), shapes, "updates of one size")],
                hint="merge LoRAs of one model only",
            )


# Into base weights


def merged_into(
    plan: PartPlan, layout: ModelLayout, updates: Mapping[Module, tuple[Update, ...]], dtype: DType | None
) -> tuple[Planned, ...]:
    """The tensors of a transformer with updates added to its weights.

    Args:
        plan: what becomes of the transformer without them.
        layout: the layout that it is planned in.
        updates: what is added to each module's weight.
        dtype: what all tensors are cast to; None keeps that of each.

    Raises:
        ExportError: if there is an update of a module that the transformer does not have, or has in another size.
    """
    runs = {tensor.key: transformer.modules_of(tensor.key, layout) for tensor in plan.tensors}
    sizes = {run.module: _size_of(tensor, runs[tensor.key], run) for tensor in plan.tensors for run in runs[tensor.key]}
    problems = []
    for module, found in updates.items():
        size = found[0].size
        if module not in sizes:
            problems.append(Problem("unexpected", str(module), _shown(size), "a module of the base"))
        elif size != sizes[module]:
            problems.append(Problem("shape", str(module), _shown(size), f"{_shown(sizes[module])}, as the base has it"))
    if problems:
        raise ExportError(
            "the LoRA does not fit the base weights",
            file=plan.reading.part.checkpoint.path,
            problems=problems,
            hint="give the base weights of the model that the LoRA was trained on",
        )
    return tuple(_with_updates(tensor, runs[tensor.key], updates, dtype) for tensor in plan.tensors)


def _size_of(tensor: Planned, runs: Sequence[ModuleRows], run: ModuleRows) -> tuple[int, int]:
    """The rows and columns of a module's weight, parts of which are in a tensor."""
    return tensor.shape[0] // len(runs) * run.of, prod(tensor.shape[1:])


def _with_updates(
    tensor: Planned, runs: Sequence[ModuleRows], updates: Mapping[Module, tuple[Update, ...]], dtype: DType | None
) -> Planned:
    """A planned tensor with what is added to its rows."""
    if all(run.module not in updates for run in runs):
        is_cast = dtype is not None and dtype != tensor.dtype
        return replace(tensor, dtype=dtype, compute=Cast()) if is_cast and dtype is not None else tensor
    pieces, added = [], []
    for piece, run, first in _cut(tensor, runs):
        rows = slice(first, first + piece.shape[0])
        pieces.append(piece)
        added.append(
            Added(run.module, tuple(update.of_rows(rows.start, rows.stop) for update in updates.get(run.module, ())))
        )
    return replace(tensor, dtype=dtype or tensor.dtype, pieces=tuple(pieces), compute=Merge(tuple(added)))


def _cut(tensor: Planned, runs: Sequence[ModuleRows]) -> Iterator[tuple[TensorEntry, ModuleRows, int]]:
    """The pieces of a tensor, cut where another run of a module's rows begins.

    Yields:
        A piece, the run that it belongs to, and the row of the module's weight with which the piece begins.
    """
    length = tensor.shape[0] // len(runs)
    position = 0
    for piece in tensor.pieces:
        if isinstance(piece, bytes):
            raise TypeError("nothing is added to constants")
        first, rows = 0, piece.shape[0]
        while first < rows:
            run = runs[position // length]
            count = min(rows - first, length - position % length)
            yield piece.rows(first, first + count), run, run.number * length + position % length
            first, position = first + count, position + count


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


# Into one LoRA


@dataclass(frozen=True, slots=True)
class Stack:
    """One LoRA that does what several do together.

    Their factors are stacked: its rank is the sum of theirs, or what it is cut down to. All scalings and weights are
    multiplied in, so that its own scaling is 1.

    Attributes:
        updates: what is added up, by module.
        layout: the layout that it is written in.
        dtype: the dtype that it is written in.
        file: of one of the LoRAs, for messages.
        rank: the rank that modules of a higher one are cut down to; None keeps all.
        layers: the layers that it adapts, where that is not all; () if it is.
    """

    updates: Mapping[Module, tuple[Update, ...]]
    layout: LoraLayout
    dtype: DType
    file: AnyPath
    rank: int | None = None
    layers: tuple[int, ...] = ()

    @property
    def ranks(self) -> dict[Module, int]:
        """The rank of every module."""
        return {module: kept_rank(updates, self.rank) for module, updates in self.updates.items()}

    def carried(self, record: str | None = None) -> Carried:
        """How the output states that its scaling is 1.

        Args:
            record: how it is made, for a layout whose file has no header.

        Raises:
            ExportError: if the layout's modules have one rank, and these have different ones.
        """
        return carry_one(self.layout, self.ranks, file=self.file, layers=self.layers, record=record)

    @property
    def tensors(self) -> tuple[Planned, ...]:
        """The tensors of the output, in the order of their keys.

        Raises:
            ExportError: as `carried` does.
        """
        alphas = self.carried().alphas
        planned = [planned_alpha(self.layout, module, alpha) for module, alpha in alphas.items()]
        for module, updates in self.updates.items():
            for part in "AB":
                name = LoraKey(*module, part)
                key = self.layout.key(name) or ""
                planned.append(planned_factor(key, name, updates, self.dtype, self.rank, str(name)))
        return tuple(sorted(planned, key=lambda tensor: tensor.key))
