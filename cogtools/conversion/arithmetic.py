"""What needs arithmetic, and therefore torch: folding a LoRA's scale in, stacking, cutting, casting, merging.

One planned tensor at a time, and of a large one as many rows as a buffer holds.
"""

from __future__ import annotations

import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch

from cogtools.checkpoint.gather import tensor_chunks
from cogtools.conversion.loss import Loss
from cogtools.conversion.plan import Fold, Merge
from cogtools.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.plan import Added, Planned, Update
    from cogtools.layouts.family import Module

BLOCK_ROWS, BLOCK_ELEMENTS = 512, 1 << 19
"""How many rows and elements of a weight are merged at once at most. Memory for larger ones is given back to the system
each time, which takes longer than to compute with them."""

MOST_THREADS = 4
"""How many blocks are merged side by side at most: beyond that, reading and writing are what takes the time."""

CHUNK_BYTES = 1 << 20
"""How much of a tensor is cast at once."""


class Computed:
    """Computes planned tensors, and keeps account of how far that changes them.

    Attributes:
        errors: the relative error of every tensor that was cast or folded: the norm of the error over the norm of the
            tensor.
        losses: how much of each module's update was lost where it was cut to a lower rank, or merged.
    """

    def __init__(self) -> None:
        self.errors: list[float] = []
        self.losses: dict[Module, Loss] = {}
        self._free: list[_Block] = []
        self._other_factors: dict[tuple[Update, ...], torch.Tensor] = {}

    def content(self, tensor: Planned) -> Iterator[bytes | memoryview]:
        """The bytes of a planned tensor, piece by piece. What is yielded is used before the next piece is asked for.

        Raises:
            ExportError: if a value does not fit into its dtype, or is not finite where it has to be.
        """
        match tensor.compute:
            case Merge() as merge:
                for piece, added in zip(tensor.pieces, merge.added, strict=True):
                    entry = _entry(piece)
                    yield from self._merged(tensor, entry, added) if added.updates else self._cast(tensor, entry)
            case Fold() as fold:
                loss = Loss()
                yield self._rounded(tensor, self._folded(fold, tensor), loss)
                self.errors.append(loss.ratio)
            case _:
                for piece in tensor.pieces:
                    yield from self._cast(tensor, _entry(piece))

    # Casting

    def _cast(self, tensor: Planned, entry: TensorEntry) -> Iterator[bytes | memoryview]:
        loss = Loss()
        for chunk in tensor_chunks(entry, CHUNK_BYTES):
            values = torch.frombuffer(bytearray(chunk), dtype=torch_dtype(entry.dtype))
            yield self._rounded(tensor, values.to(_wide(values.dtype)), loss)
        self.errors.append(loss.ratio)

    def _rounded(self, tensor: Planned, exact: torch.Tensor, loss: Loss) -> memoryview:
        """Values in the dtype of a planned tensor; their rounding is added to `loss`."""
        result = exact.to(torch_dtype(tensor.dtype))
        if result.dtype != exact.dtype:
            is_finite = result.isfinite()
            if not is_finite.all():
                if not torch.equal(is_finite, exact.isfinite()):
                    raise _too_large(tensor, exact[exact.isfinite()])
                loss.add(_square(result[is_finite].to(exact.dtype) - exact[is_finite]), _square(exact[is_finite]))
            else:
                loss.add(_square(result.to(exact.dtype) - exact), _square(exact))
        return _bytes(result)

    # Folding, stacking and cutting

    def _folded(self, fold: Fold, tensor: Planned) -> torch.Tensor:
        if fold.rank is not None:
            return self._cut(fold, tensor).reshape(tensor.shape)
        factors = [
            load(_entry(piece)) * _factor(update, fold.part, tensor.dtype)
            for piece, update in zip(tensor.pieces, fold.updates, strict=True)
        ]
        return factors[0] if len(factors) == 1 else torch.cat(factors, dim=0 if fold.part == "A" else 1)

    def _cut(self, fold: Fold, tensor: Planned) -> torch.Tensor:
        """One of the two factors of the best approximation of lower rank; the other one is kept until it is asked for.

        The update itself is never formed: with B = Q_B R_B and A^T = Q_A R_A it is Q_B (R_B R_A^T) Q_A^T, and the
        singular values of the small matrix in the middle are its own.
        """
        other = self._other_factors.pop(fold.updates, None)
        if other is not None:
            return other
        a = torch.cat([load(update.a).flatten(1) * update.scaling for update in fold.updates])
        b = torch.cat([load(update.b).flatten(1) for update in fold.updates], dim=1)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise _not_finite(tensor, "a LoRA with values that are not finite cannot be cut to a lower rank")
        basis_a, root_a = torch.linalg.qr(a.T)
        basis_b, root_b = torch.linalg.qr(b)
        left, singular, right = torch.linalg.svd(root_b @ root_a.T, full_matrices=False)
        rank, squares = fold.rank, singular.square()
        self._loss_of(fold.module).add(squares[rank:].sum().item(), squares.sum().item())
        root = singular[:rank].sqrt()
        cut_a: torch.Tensor = root[:, None] * right[:rank] @ basis_a.T
        cut_b: torch.Tensor = basis_b @ left[:, :rank] * root
        asked, other = (cut_a, cut_b) if fold.part == "A" else (cut_b, cut_a)
        self._other_factors[fold.updates] = other
        return asked

    def _loss_of(self, module: Module) -> Loss:
        return self.losses.setdefault(module, Loss())

    # Merging

    def _merged(self, tensor: Planned, base: TensorEntry, added: Added) -> Iterator[memoryview]:
        """A run of rows of a base weight with updates added, as `merge_block` adds them.

        Blocks of rows are computed side by side, each by one thread: the threads of one operation wait for each other,
        which takes many times as long where something else runs too.
        """
        dtype = torch_dtype(tensor.dtype)
        wide = _wide(dtype, torch_dtype(base.dtype))
        rows, columns = base.shape[0], prod(base.shape[1:])
        factors = [(load(u.a, wide).flatten(1), load(u.b, wide).flatten(1), u.scaling) for u in added.updates]
        loss = self._loss_of(added.module)

        def compute(first: int, last: int) -> _Block:
            block = self._free.pop() if self._free else _Block()
            block.resize(last - first, columns, wide, dtype)
            block.weight.copy_(load(base.rows(first, last), None).view_as(block.weight))
            block.merge([(a, b[first:last], scaling) for a, b, scaling in factors])
            _refuse_not_finite(tensor, block)
            block.measure()
            return block

        blocks = -(-rows // max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // columns)))
        bounds = [(rows * block // blocks, rows * (block + 1) // blocks) for block in range(blocks)]
        for block in _side_by_side(compute, bounds):
            loss.add(block.error, block.norm)
            yield _bytes(block.result)
            self._free.append(block)


class _Block:
    """The matrices for merging a block of rows, in memory that is kept for the next block."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def resize(self, rows: int, columns: int, wide: torch.dtype, dtype: torch.dtype) -> None:
        """Make room for so many rows and columns, in the dtype of the arithmetic and in that of the result."""
        self.weight, self.delta, self.total = (
            self._matrix(use, wide, rows, columns) for use in ("weight", "delta", "total")
        )
        self.result = self._matrix("result", dtype, rows, columns)

    def _matrix(self, use: str, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        memory = self._memory.get((use, dtype))
        if memory is None or len(memory) < rows * columns:
            memory = self._memory[use, dtype] = torch.empty(rows * columns, dtype=dtype)
        return memory[: rows * columns].view(rows, columns)

    def merge(self, factors: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> None:
        """Add the products b @ a * scaling to the weight: in fp32, rounded once, in SAT's order of operations.

        SAT's own merge is weight + B.float() @ A.float() * scaling, cast once. `addmm` gives other bits: it adds the
        weight before the second half of a large rank.
        """
        for place, (a, b, scaling) in enumerate(factors):
            product = self.total if place else self.delta
            torch.mm(b, a, out=product).mul_(scaling)
            if place:
                self.delta.add_(product)
        torch.add(self.weight, self.delta, out=self.total)
        self.result.copy_(self.total)

    def measure(self) -> None:
        """Find the squared norms of what rounding loses of the update, and of the update."""
        self.error = _square(self.total.copy_(self.result).sub_(self.weight).sub_(self.delta))
        self.norm = _square(self.delta)


def _side_by_side(compute: Callable[[int, int], _Block], bounds: Sequence[tuple[int, int]]) -> Iterator[_Block]:
    """The blocks between these bounds, in their order, computed by several threads ahead of who takes them."""
    before, threads = torch.get_num_threads(), min(MOST_THREADS, os.cpu_count() or 1)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting = deque[Future[_Block]]()
            for first, last in bounds:
                waiting.append(pool.submit(compute, first, last))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(before)


def _refuse_not_finite(tensor: Planned, block: _Block) -> None:
    low, high = torch.aminmax(block.total)
    largest = torch.finfo(block.result.dtype).max
    if (low >= -largest and high <= largest) or block.result.isfinite().all():
        return
    if not block.weight.isfinite().all():
        raise _not_finite(tensor, "the base has values that are not finite: nothing can be added to them")
    if not block.delta.isfinite().all():
        raise _not_finite(tensor, "the LoRA adds values that are not finite")
    raise _too_large(tensor, block.total)


def load(entry: TensorEntry, dtype: torch.dtype | None = torch.float64) -> torch.Tensor:
    """A whole tensor, in its own dtype (None) or another one.

    In double precision, the default, every product of a factor with a scaling is exact.
    """
    data = bytearray().join(tensor_chunks(entry))
    values = torch.frombuffer(data, dtype=torch_dtype(entry.dtype)).reshape(entry.shape)
    return values if dtype is None else values.to(dtype)


def torch_dtype(dtype: DType) -> torch.dtype:
    """PyTorch's dtype of the same name."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


def _entry(piece: TensorEntry | bytes) -> TensorEntry:
    if isinstance(piece, bytes):
        raise TypeError("nothing is computed from constants")
    return piece


def _bytes(values: torch.Tensor) -> memoryview:
    return values.contiguous().view(-1).view(torch.uint8).numpy().data


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds values of these exactly: single precision, or double for what is that already."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _square(values: torch.Tensor) -> float:
    """The square of the Frobenius norm: in the precision of the values, in double where that is too narrow for it."""
    flat = values.reshape(-1)
    found = torch.dot(flat, flat).item()
    if found and math.isfinite(found):
        return found
    norm: float = torch.linalg.vector_norm(flat, dtype=torch.float64).item()
    return norm * norm


def _too_large(tensor: Planned, values: torch.Tensor) -> ExportError:
    return ExportError(
        f"{tensor.source} does not fit into {tensor.dtype.name}",
        file=tensor.storages[0].range().file.path,
        found=f"values up to {values.abs().max().item():.3g}",
        expected=f"at most {torch.finfo(torch_dtype(tensor.dtype)).max:.3g}",
        hint="write it with --dtype fp32" + (" or bf16" if tensor.dtype.name == "float16" else ""),
    )


def _not_finite(tensor: Planned, what: str) -> ExportError:
    return ExportError(
        what,
        file=tensor.storages[0].range().file.path,
        found=f"NaN or infinity in {tensor.source}",
        hint="train or download it again: nothing can be made of such values",
    )


def _factor(update: Update, part: str, dtype: DType) -> float:
    """What a factor is multiplied by, so that lora_B @ lora_A comes out multiplied by the scaling.

    A power of two is exact as long as the results stay in the dtype's normal range. float16 has a narrow one: there
    the power of two is divided between lora_A and lora_B so that both keep the same distance from its lower end.
    """
    if part == "bias":  # PEFT's `lora_bias`: the product's scaling multiplies it too
        return update.scaling
    for_a, for_b = _divide(update) if dtype.name == "float16" else (1.0, update.scaling)
    return for_a if part == "A" else for_b


@lru_cache(maxsize=2)  # both factors of a module ask, one after the other
def _divide(update: Update) -> tuple[float, float]:
    """Two factors whose product is the scaling: the first a power of two, chosen to bring both tensors to one size."""
    scaling = update.scaling
    _, exponent = math.frexp(scaling)
    whole = exponent - 1
    size_a, size_b = (load(entry).square().mean().sqrt().item() for entry in (update.a, update.b))
    size_b *= abs(scaling)
    if not (0 < size_a < math.inf and 0 < size_b < math.inf):
        return 1.0, scaling
    wanted = round(math.log2(size_b / size_a) / 2)
    for_a = 2.0 ** min(max(wanted, min(whole, 0)), max(whole, 0))
    return for_a, scaling / for_a
