"""How strongly a LoRA changes each module: the update scaling * lora_B @ lora_A, without ever forming it.

The update is out x in; its norm and its singular values are all in the two rank x rank Gram matrices
G_A = lora_A lora_A^T and G_B = lora_B^T lora_B:

    ||B A||^2 = sum(G_A * G_B)        singular values of B A = square roots of the eigenvalues of R^T G_A R, R R^T = G_B
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cogtools.checkpoint.decoding import Array, can_decode, tensor_doubles
from cogtools.inspection.report import UpdateReport
from cogtools.layouts.family import LoraKey

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import Module

MAX_RANK = 4096
"""Of a larger one the Gram matrices would be large themselves."""

MAX_FACTOR_BYTES = 1 << 28
"""The longest factor that is read into memory. At rank 256 and hidden size 3072 one has 1.6 MB."""

NOT_FINITE = "NaN or infinity"
TOO_LARGE = "an update too large for double precision"


class NotComputedError(Exception):
    """The strength of an update cannot be computed; the message says what the module has that is in the way."""


def lora_updates(
    lora: Lora, scalings: Mapping[Module, float | None], progress: Callable[[int, int], None] | None = None
) -> tuple[UpdateReport, ...]:
    """The strength of the update of every module, or why it is not computed.

    Args:
        lora: its factors: lora_A (rank, in), lora_B (out, rank).
        scalings: what each module's lora_B @ lora_A is multiplied by.
        progress: called with the bytes read so far and the bytes in all.

    Raises:
        CheckpointError: if the file ends before a tensor does, or cannot be read.
    """
    updates = []
    done, in_all = 0, sum(tensor.entry.size_bytes for tensor in lora.tensors.values())
    for module in lora.modules:
        found = (lora.tensors.get(LoraKey(*module, factor)) for factor in "AB")
        a, b = (None if tensor is None else tensor.entry for tensor in found)
        updates.append(_update(module, a, b, scalings.get(module)))
        done += sum(entry.size_bytes for entry in (a, b) if entry is not None)
        if progress is not None:
            progress(done, in_all)
    return tuple(updates)


def _update(module: Module, a: TensorEntry | None, b: TensorEntry | None, scaling: float | None) -> UpdateReport:
    try:
        a, b = checked_factors(a, b)
        norm, effective_rank = update_strength(
            tensor_doubles(a), tensor_doubles(b), 1.0 if scaling is None else scaling
        )
    except NotComputedError as error:
        return UpdateReport(*module, scaling, not_computed=str(error))
    return UpdateReport(*module, scaling, norm, effective_rank)


def update_strength(a: Array, b: Array, scaling: float = 1.0) -> tuple[float, float]:
    """The Frobenius norm of scaling * b @ a, and its effective rank (Roy and Vetterli, 2007).

    The factors are divided by their largest values first: squares of very large or small ones leave the range of
    double precision.

    Args:
        a: lora_A, (rank, in), float64.
        b: lora_B, (out, rank), float64.
        scaling: what the product is multiplied by.

    Raises:
        NotComputedError: if a number is not finite, or the computation fails.
    """
    largest_a, largest_b = float(np.abs(a).max()), float(np.abs(b).max())
    if not (math.isfinite(largest_a) and math.isfinite(largest_b)):
        raise NotComputedError(NOT_FINITE)
    if largest_a == 0 or largest_b == 0:
        return 0.0, 0.0
    a, b = a / largest_a, b / largest_b
    gram_a, gram_b = a @ a.T, b.T @ b
    norm = math.sqrt(max(float(np.sum(gram_a * gram_b)), 0.0)) * scaling * largest_a * largest_b
    if not math.isfinite(norm):
        raise NotComputedError(TOO_LARGE)
    try:
        root = _root(gram_b)
        squares = np.linalg.eigvalsh(root.T @ gram_a @ root)
    except np.linalg.LinAlgError as error:
        raise NotComputedError("singular values that do not converge") from error
    singular = np.sqrt(np.maximum(squares, 0.0))
    total = float(singular.sum())
    if total == 0:
        return norm, 0.0
    shares = singular[singular > 0] / total
    return norm, math.exp(-float(np.sum(shares * np.log(shares))))


def _root(gram: Array) -> Array:
    """A matrix R with R R^T = gram. Cholesky's is several times quicker, and exists unless the gram is singular."""
    try:
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
        return root


def checked_factors(a: TensorEntry | None, b: TensorEntry | None) -> tuple[TensorEntry, TensorEntry]:
    """The two factors, if they are those of one update that can be computed."""
    if a is None or b is None:
        raise NotComputedError("one factor only")
    for entry in (a, b):
        if len(entry.shape) != 2 or not entry.numel:
            raise NotComputedError("factors without two dimensions")
        if not can_decode(entry.dtype):
            raise NotComputedError(f"factors of dtype {entry.dtype.name}")
    if a.shape[0] != b.shape[1]:
        raise NotComputedError("factors of different ranks")
    if a.shape[0] > MAX_RANK or max(a.size_bytes, b.size_bytes) > MAX_FACTOR_BYTES:
        raise NotComputedError("factors too large to compute with")
    return a, b
