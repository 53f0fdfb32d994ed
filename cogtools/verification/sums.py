"""A LoRA that was made of others, or cut to a lower rank, held against what these add to the weights.

Its factors need not be theirs: other factors give the same update, and the singular vectors of a cut are turned on
another machine. So the updates are compared. None is formed: with B = Q_B R_B and A^T = Q_A R_A, B A is
Q_B (R_B R_A^T) Q_A^T, and has the norm and the singular values of the small matrix in the middle. Stacked, that is the
difference of two updates, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogtools.checkpoint.decoding import Array, tensor_doubles
from cogtools.checkpoint.dtypes import FLOAT_FORMATS, FloatFormat
from cogtools.conversion.merge_plan import Weighted, sum_of
from cogtools.conversion.options import BY_HAND
from cogtools.conversion.plan import plan_lora
from cogtools.errors import OptionError, Problem
from cogtools.formatting import counted, percent
from cogtools.layouts import diffusers
from cogtools.layouts.family import LoraKey
from cogtools.layouts.folded import fold_modules
from cogtools.verification.report import Check

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.lora import Lora
    from cogtools.conversion.plan import Update
    from cogtools.conversion.record import MergedRecord
    from cogtools.layouts.family import Module


def refuse_other_number(paths: Sequence[AnyPath], merged: Sequence[MergedRecord] | None) -> None:
    """Raise an `OptionError` if there are not as many files as something was made of.

    Args:
        paths: the files that are given.
        merged: the LoRAs that it was made of, as its record says; None if it was made of one checkpoint.
    """
    wanted = 1 if merged is None else len(merged)
    if len(paths) == wanted:
        return
    names = "one checkpoint" if merged is None else f"{counted(wanted, 'LoRA')}: {_names(merged)}"
    raise OptionError(
        f"it was made of {names}, as its record says",
        found=f"{len(paths)} to hold it against: {', '.join(map(str, paths))}",
        hint="give all that it was made of, in that order, and nothing else",
    )


def _names(merged: Sequence[MergedRecord]) -> str:
    return ", ".join(record.source or "a file without a name" for record in merged)


def as_recorded(checkpoints: Sequence[Checkpoint], merged: Sequence[MergedRecord]) -> list[Weighted]:
    """The LoRAs of a merge, each with the weight that was recorded for it, and the alpha where that was given by hand.

    Args:
        checkpoints: the LoRAs: in the recorded order, or with the recorded names.
        merged: the record.

    Raises:
        CogtoolsError: if one of them cannot be read, or merged.
    """
    by_name = {checkpoint.path.name: checkpoint for checkpoint in checkpoints}
    if len(by_name) == len(checkpoints) and set(by_name) == {record.source for record in merged}:
        checkpoints = [by_name[record.source or ""] for record in merged]
    found = []
    for checkpoint, record in zip(checkpoints, merged, strict=True):
        alpha = record.alpha if record.alpha_source == BY_HAND else None
        plan = plan_lora(checkpoint, diffusers.LAYOUT, alpha=alpha, allow_partial=True)
        found.append(Weighted(plan, 1.0 if record.weight is None else record.weight))
    return found


def check_sum(
    lora: Lora, loras: Sequence[Weighted], scalings: Mapping[Module, float], advance: Callable[[int], None]
) -> Check:
    """Whether a file adds to every weight what LoRAs add together, or comes as near as its rank allows.

    Args:
        lora: the file.
        loras: what it was made of.
        scalings: the scaling of every module of the file, as its reader reads it.
        advance: called with the bytes of the file that were compared, as they are.

    Raises:
        CogtoolsError: if one of them cannot be read, or they cannot be added up.
    """
    expected = sum_of(loras)
    found = set(lora.modules)
    problems = [Problem("missing", text) for text in _folded(set(expected) - found)]
    problems += [Problem("unexpected", text) for text in _folded(found - set(expected))]
    nearness, lost = [0.0], [0.0]
    for module, updates in expected.items():
        if module not in found:
            continue
        result = _compare(lora, module, updates, scalings.get(module, 1.0))
        advance(sum(tensor.entry.size_bytes for name, tensor in lora.tensors.items() if name.module == module))
        if isinstance(result, Problem):
            problems.append(result)
        else:
            nearness.append(result.error)
            lost.append(result.least)
    of = "the checkpoint's LoRA adds" if len(loras) == 1 else f"{counted(len(loras), 'LoRA')} add together"
    if problems:
        seen = f"{counted(len(problems), 'module')} of {len(expected)} do not add what {of}"
        return Check("against", "fail", seen, tuple(problems))
    seen = f"{counted(len(expected), 'module')} add what {of}"
    if lora.record.cut_to is not None:
        seen += f", as near as rank {lora.record.cut_to} can come: up to {percent(max(lost))} of a module is lost"
    else:
        seen += f", within the dtype's rounding: the largest relative error of an update is {max(nearness):.2g}"
    return Check("against", "pass", seen)


def _folded(modules: set[Module]) -> list[str]:
    return fold_modules(modules).split("; ") if modules else []


class _Compared(NamedTuple):
    """How an update compares with what it should be, relative to its norm.

    Attributes:
        error: how far it is from the best update of its rank.
        least: how far that one is.
    """

    error: float
    least: float


def _compare(lora: Lora, module: Module, updates: Sequence[Update], scaling: float) -> _Compared | Problem:
    tensors = [lora.tensors.get(LoraKey(*module, part)) for part in "AB"]
    a, b = (None if tensor is None else tensor.entry for tensor in tensors)
    if a is None or b is None:
        return Problem("unpaired", str(module))
    size = (b.shape[0], math.prod(a.shape[1:]))
    if size != updates[0].size or a.shape[0] != math.prod(b.shape[1:]):
        return Problem("shape", str(module), f"{size[0]} x {size[1]}", " x ".join(map(str, updates[0].size)))
    stored, size = _factors(a, b, 1.0), updates[0].size
    exact = [_factors(update.a, update.b, update.scaling) for update in updates]
    if not all(np.isfinite(values).all() for factors in (stored, *exact) for values in factors):
        return Problem("not_finite", str(module), "NaN or infinity")
    best = _best(exact, a.shape[0])
    difference = _norm(_core([(stored[0], -scaling * stored[1]), best.factors]))
    most = scaling * _rounding(stored, FLOAT_FORMATS[a.dtype.name]) + _DOUBLE * best.norm
    if not best.is_certain:  # another one of its rank may be as near
        difference = max(0.0, _norm(_core([(stored[0], -scaling * stored[1]), *exact])) - best.error)
    if difference > most:
        away = f"{percent(difference / best.norm)} of it away" if best.norm else "not 0"
        what = "the sum of them" if best.error <= _DOUBLE * best.norm else f"the best update of rank {a.shape[0]}"
        return Problem("value", str(module), f"an update that is {away}", what)
    return _Compared(difference / best.norm, best.error / best.norm) if best.norm else _Compared(0.0, 0.0)


class _Best(NamedTuple):
    """The best approximation of a sum of updates by an update of some rank.

    Attributes:
        factors: lora_A and lora_B of it.
        norm: the norm of the sum.
        error: the norm of what is lost.
        is_certain: whether it is clearly better than all others of its rank.
    """

    factors: tuple[Array, Array]
    norm: float
    error: float
    is_certain: bool


def _best(terms: Sequence[tuple[Array, Array]], rank: int) -> _Best:
    basis_a, root_a = np.linalg.qr(np.vstack([a for a, _ in terms]).T)
    basis_b, root_b = np.linalg.qr(np.hstack([b for _, b in terms]))
    left, singular, right = np.linalg.svd(root_b @ root_a.T, full_matrices=False)
    kept, lost = singular[:rank], singular[rank:]
    gap = kept[-1] - lost[0] if len(lost) else singular[0]
    factors = right[:rank] @ basis_a.T, basis_b @ (left[:, :rank] * kept)
    return _Best(factors, _norm(singular), _norm(lost), bool(gap > _CLEAR * singular[0]))


_CLEAR = 1e-6
"""How far two singular values have to be apart, relative to the largest, to be told apart on any machine."""

_DOUBLE = 1e-12
"""What double precision may be off by, in all of this."""


def _factors(a: TensorEntry, b: TensorEntry, scaling: float) -> tuple[Array, Array]:
    """Both factors as matrices, the scaling multiplied into lora_B."""
    matrix_a, matrix_b = (tensor_doubles(entry).reshape(entry.shape[0], -1) for entry in (a, b))
    return matrix_a, matrix_b * scaling


def _core(terms: Sequence[tuple[Array, Array]]) -> Array:
    """A small matrix with the norm and the singular values of the sum of b @ a."""
    root_a, root_b = (
        np.asarray(np.linalg.qr(matrix, mode="r"))
        for matrix in (np.vstack([a for a, _ in terms]).T, np.hstack([b for _, b in terms]))
    )
    core: Array = root_b @ root_a.T
    return core


def _rounding(factors: tuple[Array, Array], form: FloatFormat) -> float:
    """How far the product of two factors can be off where each of their values is rounded to a format."""
    errors = []
    for values in factors:
        relative = 2.0 ** -(form.precision + 1) * _norm(values)
        smallest = 2.0 ** (form.least - form.precision - 1) * math.sqrt(values.size)
        errors.append(relative + smallest)
    (a, b), (error_a, error_b) = factors, errors
    return _norm(a) * error_b + _norm(b) * error_a + error_a * error_b


def _norm(values: Array) -> float:
    return math.sqrt(float(np.square(values).sum()))
