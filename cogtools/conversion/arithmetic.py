"""The two things that need arithmetic, and therefore torch: multiplying a LoRA's scale in, and casting."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from cogtools.checkpoint.gather import tensor_chunks
from cogtools.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.checkpoint.dtypes import DType
    from cogtools.conversion.plan import LoraPlan, PlannedTensor


def scaled_and_cast(plan: LoraPlan, scaling: float, dtype: DType, errors: list[float]) -> Iterator[bytes]:
    """The bytes of every tensor of a plan, so that lora_B @ lora_A comes out multiplied by `scaling`.

    A power of two is exact as long as the results stay in the dtype's normal range. float16 has a narrow one: there
    the power of two is divided between lora_A and lora_B so that both keep the same distance from its lower end.

    Args:
        plan: the tensors.
        scaling: the factor.
        dtype: what the results are cast to.
        errors: takes the relative error of every tensor: the norm of the error over the norm of the tensor.

    Raises:
        ExportError: if a value does not fit into the dtype.
    """
    for lora_a, lora_b in plan.pairs:
        a, b = _load(lora_a), _load(lora_b)
        for_a, for_b = _divide(scaling, a, b) if dtype.name == "float16" else (1.0, scaling)
        yield _finish(lora_a, a * for_a, dtype, errors)
        yield _finish(lora_b, b * for_b, dtype, errors)


def _load(tensor: PlannedTensor) -> torch.Tensor:
    """The tensor in double precision, in which every product here is exact."""
    entry = tensor.source.entry
    data = bytearray().join(tensor_chunks(entry))
    return torch.frombuffer(data, dtype=getattr(torch, entry.dtype.name)).reshape(entry.shape).double()


def _divide(scaling: float, a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Two factors whose product is `scaling`: the first a power of two, chosen to bring both tensors to one size."""
    _, exponent = math.frexp(scaling)
    whole = exponent - 1
    size_a, size_b = a.square().mean().sqrt().item(), b.square().mean().sqrt().item() * scaling
    if not (0 < size_a < math.inf and 0 < size_b < math.inf):
        return 1.0, scaling
    wanted = round(math.log2(size_b / size_a) / 2)
    for_a = 2.0 ** min(max(wanted, min(whole, 0)), max(whole, 0))
    return for_a, scaling / for_a


def _finish(tensor: PlannedTensor, exact: torch.Tensor, dtype: DType, errors: list[float]) -> bytes:
    result = exact.to(getattr(torch, dtype.name))
    is_finite = exact.isfinite()
    if not torch.equal(result.isfinite(), is_finite):
        raise ExportError(
            f"{tensor.source.key} does not fit into {dtype.name}",
            file=tensor.source.entry.storage.range().file.path,
            found=f"values up to {exact[is_finite].abs().max().item():.3g}",
            expected=f"at most {torch.finfo(result.dtype).max:.3g}",
            hint="export with --dtype fp32" + (" or bf16" if dtype.name == "float16" else ""),
        )
    finite = exact[is_finite]
    norm = finite.norm().item()
    errors.append((result.double()[is_finite] - finite).norm().item() / norm if norm else 0.0)
    return result.contiguous().view(torch.uint8).numpy().tobytes()
