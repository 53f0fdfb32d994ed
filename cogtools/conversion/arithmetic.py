"""What needs arithmetic, and therefore torch: multiplying a LoRA's scale in, and casting. One tensor at a time."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from cogtools.checkpoint.gather import tensor_chunks
from cogtools.conversion.plan import Fold
from cogtools.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.plan import Planned


class Computed:
    """Computes planned tensors, and keeps account of how far rounding changes them.

    Attributes:
        errors: the relative error of every tensor: the norm of the error over the norm of the tensor.
    """

    def __init__(self) -> None:
        self.errors: list[float] = []

    def content(self, tensor: Planned) -> bytes:
        """The bytes of a planned tensor.

        Raises:
            ExportError: if a value does not fit into its dtype.
        """
        exact = load(tensor.pieces, tensor.shape)
        if isinstance(tensor.compute, Fold):
            exact = exact * _factor(tensor.compute, tensor.dtype)
        return self._finish(tensor, exact)

    def _finish(self, tensor: Planned, exact: torch.Tensor) -> bytes:
        result = exact.to(getattr(torch, tensor.dtype.name))
        is_finite = exact.isfinite()
        if not torch.equal(result.isfinite(), is_finite):
            raise ExportError(
                f"{tensor.source} does not fit into {tensor.dtype.name}",
                file=tensor.storages[0].range().file.path,
                found=f"values up to {exact[is_finite].abs().max().item():.3g}",
                expected=f"at most {torch.finfo(result.dtype).max:.3g}",
                hint="export with --dtype fp32" + (" or bf16" if tensor.dtype.name == "float16" else ""),
            )
        finite = exact[is_finite]
        norm = finite.norm().item()
        self.errors.append((result.double()[is_finite] - finite).norm().item() / norm if norm else 0.0)
        return result.contiguous().view(torch.uint8).numpy().tobytes()


def load(pieces: Iterable[TensorEntry | bytes], shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that pieces make up, in double precision, in which every product here is exact."""
    parts = []
    for piece in pieces:
        if isinstance(piece, bytes):
            raise TypeError("nothing is computed from constants")
        data = bytearray().join(tensor_chunks(piece))
        parts.append(torch.frombuffer(data, dtype=getattr(torch, piece.dtype.name)).double())
    return torch.cat(parts).reshape(shape) if len(parts) > 1 else parts[0].reshape(shape)


def _factor(fold: Fold, dtype: DType) -> float:
    """What a factor is multiplied by, so that lora_B @ lora_A comes out multiplied by the scaling.

    A power of two is exact as long as the results stay in the dtype's normal range. float16 has a narrow one: there
    the power of two is divided between lora_A and lora_B so that both keep the same distance from its lower end.
    """
    if fold.part == "bias":  # PEFT's `lora_bias`: the product's scaling multiplies it too
        return fold.scaling
    for_a, for_b = _divide(fold.scaling, fold.a, fold.b) if dtype.name == "float16" else (1.0, fold.scaling)
    return for_a if fold.part == "A" else for_b


@lru_cache(maxsize=2)  # both factors of a module ask, one after the other
def _divide(scaling: float, a: TensorEntry, b: TensorEntry) -> tuple[float, float]:
    """Two factors whose product is `scaling`: the first a power of two, chosen to bring both tensors to one size."""
    _, exponent = math.frexp(scaling)
    whole = exponent - 1
    size_a, size_b = (load([entry], entry.shape).square().mean().sqrt().item() for entry in (a, b))
    size_b *= scaling
    if not (0 < size_a < math.inf and 0 < size_b < math.inf):
        return 1.0, scaling
    wanted = round(math.log2(size_b / size_a) / 2)
    for_a = 2.0 ** min(max(wanted, min(whole, 0)), max(whole, 0))
    return for_a, scaling / for_a
