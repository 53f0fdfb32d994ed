"""A model that LoRAs were merged into, held against its base and these: within one unit in the last place.

The sums are computed with NumPy in double precision; what wrote the file has done so with torch in single precision.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from cogtools.checkpoint.decoding import Array, tensor_doubles
from cogtools.checkpoint.dtypes import DTYPES, FLOAT_FORMATS
from cogtools.conversion.merge_plan import merged_into, sum_of
from cogtools.conversion.plan import Added, Merge
from cogtools.errors import Problem, command
from cogtools.formatting import counted
from cogtools.layouts import sat
from cogtools.layouts.transformer import modules_of
from cogtools.verification.model_values import difference
from cogtools.verification.report import Check, judged
from cogtools.verification.sums import as_recorded, refuse_other_number
from cogtools.verification.values import place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.model import ModelPart
    from cogtools.conversion.model_plan import PartPlan
    from cogtools.conversion.model_record import ModelRecord
    from cogtools.conversion.plan import Planned

_BLOCK_ELEMENTS = 1 << 19
"""How many elements of a weight are computed at once."""

_SINGLE = 2.0**-24
"""Half a unit in the last place of single precision: what each of the products of a sum is rounded by."""


def merged_checks(
    name: str,
    written: ModelPart,
    plan: PartPlan,
    loras: Sequence[Checkpoint],
    record: ModelRecord,
    advance: Callable[[int], None],
) -> list[Check]:
    """Compare the tensors of a merged transformer with what its base and the LoRAs make of them.

    Without the LoRAs, those tensors are compared that no LoRA changes, and it is said which are not.

    Args:
        name: of the check.
        written: the transformer.
        plan: what the base alone becomes.
        loras: the LoRAs that are given.
        record: how the model was made.
        advance: called with the bytes that were compared, as they are.

    Raises:
        CogtoolsError: if the LoRAs are not as many as were merged, or one cannot be read or merged.
    """
    merged, base = record.merged or (), plan.reading.part.checkpoint
    is_own = len(merged) == 1 and merged[0].source == record.source and plan.reading.has_lora
    loras = [base] if is_own and not loras else loras
    if not loras:
        return _without_loras(name, written, plan, record, advance)
    refuse_other_number([checkpoint.path for checkpoint in loras], merged)
    dtype = None if record.dtype is None else DTYPES[record.dtype]
    tensors = merged_into(plan, written.layout, sum_of(as_recorded(loras, merged)), dtype)
    problems = [
        problem
        for planned, key, entry in paired(written, tensors)
        if (problem := Problem("missing", key) if entry is None else _difference(key, entry, planned, advance))
    ]
    count = sum(isinstance(planned.compute, Merge) for planned in tensors)
    good = (
        f"{counted(len(tensors), 'tensor')} are the base's, {count} of them with {counted(len(merged), 'LoRA')} added, "
        "within one unit in the last place"
    )
    return [judged(name, problems, good, f"{len(problems)} of {counted(len(tensors), 'tensor')} are not the sum")]


def _without_loras(
    name: str,
    written: ModelPart,
    plan: PartPlan,
    record: ModelRecord,
    advance: Callable[[int], None],
) -> list[Check]:
    """The tensors that no LoRA changes, and which were not compared."""
    unchanged = [planned for planned in plan.tensors if not modules_of(planned.key, written.layout)]
    problems = [
        problem
        for planned, key, entry in paired(written, unchanged)
        if (problem := Problem("missing", key) if entry is None else _unchanged(key, entry, planned, record, advance))
    ]
    good = f"{counted(len(unchanged), 'tensor')} that no LoRA changes equal the checkpoint's"
    bad = f"{len(problems)} of {counted(len(unchanged), 'tensor')} that no LoRA changes are not the checkpoint's"
    merged = record.merged or ()
    names = ", ".join(lora.source or "a file without a name" for lora in merged)
    rest = counted(len(plan.tensors) - len(unchanged), "weight")
    base = plan.reading.part.checkpoint.path
    hint = command("verify", written.checkpoint.path.parent, "--against", base, *["LORA"] * len(merged))
    return [
        judged(name, problems, good, bad),
        Check(f"{name} loras", "warn", f"{rest} not compared: any may have {names} merged into it", hint=hint),
    ]


def _unchanged(
    key: str, entry: TensorEntry, planned: Planned, record: ModelRecord, advance: Callable[[int], None]
) -> Problem | None:
    if record.dtype in (None, planned.dtype.name):
        return difference(key, entry, planned, advance)
    return _sum_difference(key, entry, planned, advance)


def paired(written: ModelPart | None, tensors: Iterable[Planned]) -> Iterator[tuple[Planned, str, TensorEntry | None]]:
    """Each planned tensor, and the key and the tensor that a part has for it: None if it has none."""
    found = {sat.table_key(key): (key, entry) for key, entry in (written.tensors.items() if written else ())}
    for planned in tensors:
        yield planned, *found.get(sat.table_key(planned.key), (planned.key, None))


def _difference(key: str, entry: TensorEntry, planned: Planned, advance: Callable[[int], None]) -> Problem | None:
    if planned.compute is None:
        return difference(key, entry, planned, advance)
    return _sum_difference(key, entry, planned, advance)


def _sum_difference(key: str, entry: TensorEntry, planned: Planned, advance: Callable[[int], None]) -> Problem | None:
    """How a tensor differs from what is computed for it, by more than one unit in the last place; None if it does not.

    To that comes what single precision may be off by in the products of the factors, where they are added to a value
    that is nearly their opposite.
    """
    if entry.shape != planned.shape or entry.dtype.name not in FLOAT_FORMATS:
        return Problem("shape", key, f"{entry.dtype.name} {entry.shape}", f"{planned.dtype.name} {planned.shape}")
    form = FLOAT_FORMATS[entry.dtype.name]
    columns = prod(entry.shape[1:])
    flat, first = entry.rows(0, entry.shape[0]), 0
    added = planned.compute.added if isinstance(planned.compute, Merge) else (None,) * len(planned.pieces)
    for piece, update in zip(planned.pieces, added, strict=True):
        if isinstance(piece, bytes):
            raise TypeError("nothing is computed from constants")
        for rows, exact, slack in _sums(piece, update, columns):
            found = tensor_doubles(flat.rows(first, first + rows)).reshape(rows, columns)
            first += rows
            _, exponent = np.frexp(exact)
            unit = np.ldexp(1.0, np.maximum(exponent - 1, form.least) - form.precision)
            with np.errstate(invalid="ignore"):
                wrong = ~(np.abs(found - exact) <= unit + slack)  # not "> …": a NaN is wrong too
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                index = (first - rows + int(row)) * columns + int(column)
                return Problem(
                    "value",
                    key,
                    f"{found[row, column]:.9g} at {place(index, entry.shape)}",
                    f"{exact[row, column]:.9g}",
                )
            advance(rows * columns * entry.dtype.itemsize)
    return None


def _sums(base: TensorEntry, added: Added | None, columns: int) -> Iterator[tuple[int, Array, Array | float]]:
    """Blocks of rows of a base weight with updates added in double precision.

    Yields:
        How many rows, the sums, and how far the products may be off in single precision.
    """
    updates = () if added is None else added.updates
    factors = [(_matrix(update.a), _matrix(update.b), update.scaling) for update in updates]
    step = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, base.shape[0], step):
        last = min(first + step, base.shape[0])
        exact = tensor_doubles(base.rows(first, last)).reshape(last - first, columns)
        slack: Array | float = 0.0
        for a, b, scaling in factors:
            exact = exact + scaling * (b[first:last] @ a)
            sizes = np.linalg.norm(b[first:last], axis=1)[:, None] * np.linalg.norm(a, axis=0)
            slack = slack + abs(scaling) * len(a) * _SINGLE * sizes
        yield last - first, exact, slack


def _matrix(entry: TensorEntry) -> Array:
    """A factor in double precision; the kernel of a convolution counts as columns."""
    matrix: Array = tensor_doubles(entry).reshape(entry.shape[0], -1)
    return matrix
