"""How strongly a LoRA changes each module: the update scaling * lora_B @ lora_A, without ever forming it.

The update is hidden x hidden; its norm and its singular values are all in the two rank x rank Gram matrices
G_A = lora_A lora_A^T and G_B = lora_B^T lora_B:

    ||B A||^2 = sum(G_A * G_B)        singular values of B A = square roots of the eigenvalues of R^T G_A R, R R^T = G_B
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cogtools.checkpoint.decoding import Array, can_decode, decode, raw_code
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.inspection.report import UpdateReport
from cogtools.layouts.cogvideox import PROJECTIONS, LoraKey

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cogtools.checkpoint.storage import TensorEntry

MAX_RANK = 4096
"""Of a larger one the Gram matrices would be large themselves."""

MAX_FACTOR_BYTES = 1 << 28
"""The longest factor that is read into memory. At rank 256 and hidden size 3072 one has 1.6 MB."""


def lora_updates(
    tensors: Mapping[LoraKey, TensorEntry],
    scaling: float,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[UpdateReport, ...]:
    """The strength of every update of which both factors are there, and fit together.

    Args:
        tensors: the factors: lora_A (rank, in), lora_B (out, rank).
        scaling: alpha / rank.
        progress: called with the bytes read so far and the bytes in all.

    Raises:
        CheckpointError: if the file ends before a tensor does, or cannot be read.
    """
    updates = []
    done, in_all = 0, sum(entry.size_bytes for entry in tensors.values())
    for layer in sorted({name.layer for name in tensors}):
        for projection in PROJECTIONS:
            a, b = (tensors.get(LoraKey(layer, projection, factor)) for factor in "AB")
            if a is None or b is None or not _fit(a, b):
                continue
            norm, effective_rank = update_strength(_load(a), _load(b))
            if math.isfinite(norm):
                updates.append(UpdateReport(layer, projection, scaling * norm, effective_rank))
            done += a.size_bytes + b.size_bytes
            if progress is not None:
                progress(done, in_all)
    return tuple(updates)


def update_strength(a: Array, b: Array) -> tuple[float, float]:
    """The Frobenius norm of b @ a, and its effective rank (Roy and Vetterli, 2007).

    Args:
        a: lora_A, (rank, in), float64.
        b: lora_B, (out, rank), float64.

    Returns:
        NaN for both if one of the numbers is not finite.
    """
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan, math.nan
    gram_a, gram_b = a @ a.T, b.T @ b
    norm = math.sqrt(max(float(np.sum(gram_a * gram_b)), 0.0))
    root = _root(gram_b)
    squares = np.linalg.eigvalsh(root.T @ gram_a @ root)
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


def _fit(a: TensorEntry, b: TensorEntry) -> bool:
    return (
        all(
            len(entry.shape) == 2 and entry.numel and can_decode(entry.dtype) and entry.size_bytes <= MAX_FACTOR_BYTES
            for entry in (a, b)
        )
        and a.shape[0] == b.shape[1] <= MAX_RANK
    )


def _load(entry: TensorEntry) -> Array:
    """The whole tensor in double precision."""
    raw = np.frombuffer(b"".join(tensor_chunks(entry)), raw_code(entry.dtype, big_endian=False))
    return decode(raw, entry.dtype).astype(np.float64).reshape(entry.shape)
