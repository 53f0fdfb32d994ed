"""A LoRA file held against the checkpoint that it was made of: the plan of its export, and every value.

Tensors are to be the same bit for bit. Where the file's own record says that the scale was folded in or the dtype
changed, they are to be within the rounding of their dtype: half a unit in the last place of the exact result, which
double precision holds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import Problem
from cogtools.planning import Alpha, plan_lora_export
from cogtools.verification.checks import scalings
from cogtools.verification.result import Check
from cogtools.verification.values import FLOAT_FORMATS, decode, place
from cogtools.words import ALPHA_SOURCES, counted, fold_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from cogtools.layouts.cogvideox import LoraKey
    from cogtools.planning import LoraPlan, PlannedTensor
    from cogtools.verification.written import WrittenLora, WrittenTensor

_SLACK = 1 + 2**-12
"""torch casts double precision to 16 bits by way of float32, which rounds twice: by so much more at most in float16,
the wider of the two. In float64 the product that is compared with is itself rounded, by less."""


def against_checks(
    lora: WrittenLora,
    checkpoint: Path,
    advance: Callable[[int], None],
    *,
    iteration: int | None = None,
    ema: bool = False,
) -> tuple[Path, list[Check]]:
    """Hold a file against a checkpoint; also the path of the checkpoint's file.

    Args:
        lora: the file.
        checkpoint: the checkpoint.
        advance: told the bytes of the file that were compared, as they are.
        iteration: as `open_checkpoint` has it.
        ema: the same.

    Raises:
        CogtoolsError: if the checkpoint cannot be read, or has no LoRA that could have been exported.
    """
    with open_checkpoint(checkpoint, iteration=iteration, ema=ema) as opened:
        # What the checkpoint has is what the file should have, be it the LoRA of all layers or of some.
        plan = plan_lora_export(opened, allow_partial=True)
        return opened.path, [
            _check_tensors(lora, _as_exported(lora, plan), advance),
            _check_scale(lora, plan),
        ]


def _is_folded(lora: WrittenLora) -> bool:
    return lora.record.scale == "fold"


def _as_exported(lora: WrittenLora, plan: LoraPlan) -> LoraPlan:
    """The plan with the alpha that was given to the exporter by hand, if the file's record says so."""
    alpha = _given_alpha(lora)
    return plan if alpha is None else replace(plan, alpha=alpha)


def _given_alpha(lora: WrittenLora) -> Alpha | None:
    record = lora.record
    return Alpha(record.alpha, "--alpha") if record.alpha is not None and record.alpha_source == "--alpha" else None


def _check_tensors(lora: WrittenLora, plan: LoraPlan, advance: Callable[[int], None]) -> Check:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    shared = [name for name in planned if name in lora.tensors]
    problems = [
        Problem("missing", text, expected="the checkpoint has it") for text in fold_names(planned.keys() - lora.tensors)
    ]
    problems += [
        Problem("unexpected", text, found="the checkpoint lacks it")
        for text in fold_names(lora.tensors.keys() - planned)
    ]
    comparison = _Comparison(lora, plan, advance)
    problems += [problem for name in shared if (problem := comparison.compare(name, planned[name])) is not None]
    if problems:
        different = sum(problem.kind not in ("missing", "unexpected") for problem in problems)
        seen = f"{different} of {counted(len(shared), 'tensor')} differ from the checkpoint's"
        return Check("against", "fail", seen, tuple(problems))
    return Check("against", "pass", f"{counted(len(shared), 'tensor')} equal the checkpoint's{comparison.how()}")


class _Comparison:
    """Compares tensors of a file with those of the checkpoint, bit for bit or as computed from them."""

    def __init__(self, lora: WrittenLora, plan: LoraPlan, advance: Callable[[int], None]) -> None:
        self._lora = lora
        self._plan = plan
        self._advance = advance
        self._folded = _is_folded(lora)
        self._split: dict[tuple[int, str], float] = {}
        self._computed: list[float] = []

    def how(self) -> str:
        """How the tensors were found to be equal."""
        if not self._computed:
            return " bit for bit"
        record = self._lora.record
        done = [f"the scaling {self._plan.scaling:.10g} folded in"] if self._folded else []
        if record.dtype != record.source_dtype:
            done.append(f"{record.source_dtype} cast to {record.dtype}")
        error = f"the largest relative error of a tensor is {max(self._computed):.2g}"
        return f" within the dtype's rounding ({', '.join(done)}, as its record states): {error}"

    def compare(self, name: LoraKey, planned: PlannedTensor) -> Problem | None:
        """What is wrong with a tensor of the file; None if it is as planned."""
        tensor, source = self._lora.tensors[name], planned.source.entry
        if tensor.entry.shape != source.shape:
            return Problem("shape", tensor.key, str(tensor.entry.shape), str(source.shape))
        if tensor.entry.dtype != source.dtype and not self._is_stated_cast(tensor, planned):
            return Problem("dtype", tensor.key, tensor.entry.dtype.name, f"{source.dtype.name}, as no cast is stated")
        if tensor.entry.dtype == source.dtype and not self._folded:
            return self._compare_bits(tensor, planned)
        return self._compare_rounded(name, tensor, planned)

    def _is_stated_cast(self, tensor: WrittenTensor, planned: PlannedTensor) -> bool:
        stated = (self._lora.record.source_dtype, self._lora.record.dtype)
        return stated == (planned.source.entry.dtype.name, tensor.entry.dtype.name) and set(stated) <= set(
            FLOAT_FORMATS
        )

    def _compare_bits(self, tensor: WrittenTensor, planned: PlannedTensor) -> Problem | None:
        dtype = planned.source.entry.dtype
        written = tensor.entry.storage.range()
        position, different, index, values = 0, 0, 0, (0.0, 0.0)
        for expected in tensor_chunks(planned.source.entry):
            found = written.file.read(written.offset_bytes + position, len(expected))
            if found != expected:
                bits = FLOAT_FORMATS[dtype.name].bits
                places = np.flatnonzero(np.frombuffer(found, bits) != np.frombuffer(expected, bits))
                if not different:
                    index = position // dtype.itemsize + int(places[0])
                    values = decode(found, dtype.name)[places[0]], decode(expected, dtype.name)[places[0]]
                different += len(places)
            position += len(expected)
            self._advance(len(expected))
        return _differs(tensor, index, *values, different) if different else None

    def _compare_rounded(self, name: LoraKey, tensor: WrittenTensor, planned: PlannedTensor) -> Problem | None:
        found, exact = (
            _values(tensor),
            decode(b"".join(tensor_chunks(planned.source.entry)), planned.source.entry.dtype.name),
        )
        self._advance(tensor.entry.size_bytes)
        exact = exact * self._factor(name, found, exact)
        form = FLOAT_FORMATS[tensor.entry.dtype.name]
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.abs(found - exact)
            inexact = np.flatnonzero(error != 0)  # a NaN is among them
            there, due = found[inexact], exact[inexact]
            _, exponent = np.frexp(due)
            unit = np.ldexp(1.0, np.maximum(exponent - 1, form.least) - form.precision)
            # Not "error > …": a NaN is different too, where the checkpoint has none.
            wrong = ~(error[inexact] <= unit / 2 * _SLACK) & ~(np.isnan(there) & np.isnan(due)) & (there != due)
        if wrong.any():
            places = inexact[wrong]
            index = int(places[0])
            return _differs(tensor, index, found[index], exact[index], len(places))
        norm = _norm(exact)
        self._computed.append(_norm(error) / norm if norm else 0.0)
        return None

    def _factor(self, name: LoraKey, found: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
        """What the exporter multiplied a tensor by: in float16 it divides a power of two between lora_A and lora_B.

        The division is read off lora_A's largest value; the product of the two factors is always the scaling.
        """
        if not self._folded:
            return 1.0
        module = name.layer, name.projection
        if name.factor == "A":
            largest = int(np.argmax(np.abs(exact)))
            ratio = found[largest] / exact[largest] if exact[largest] else 1.0
            usable = math.isfinite(ratio) and ratio > 0
            self._split[module] = 2.0 ** round(math.log2(ratio)) if usable else 1.0
            return self._split[module]
        return self._plan.scaling / self._split.get(module, 1.0)


def _norm(values: NDArray[np.float64]) -> float:
    """The Euclidean norm. Not NumPy's: its threads take longer to start than such a tensor to add up."""
    return math.sqrt(np.square(values).sum())


def _values(tensor: WrittenTensor) -> NDArray[np.float64]:
    return decode(b"".join(tensor_chunks(tensor.entry)), tensor.entry.dtype.name)


def _differs(tensor: WrittenTensor, index: int, found: float, expected: float, different: int) -> Problem:
    where = place(index, tensor.entry.shape)
    count = f"{different:,} of {tensor.entry.numel:,} values differ"
    return Problem("value", tensor.key, f"{found:.9g} at {where} ({count})", f"{expected:.9g}")


def _check_scale(lora: WrittenLora, plan: LoraPlan) -> Check:
    """The file's scaling is the training's: alpha / rank, or 1 where that was folded in."""
    name = "against-scale"
    given = _given_alpha(lora)
    exported = _as_exported(lora, plan)
    wanted = 1.0 if _is_folded(lora) else exported.scaling
    alpha = exported.alpha
    source = ALPHA_SOURCES[alpha.source] + (", as the file's record says" if given is not None else "")
    why = f"alpha {alpha.value:.10g} ({source}) / rank {plan.rank}"
    why += ", folded in" if _is_folded(lora) else ""
    found = scalings(lora)
    wrong = {module: scaling for module, scaling in found.items() if not math.isclose(scaling, wanted, rel_tol=1e-9)}
    if not found:
        return Check(name, "fail", f"no scaling can be told; the training's is {wanted:.10g}: {why}")
    if wrong and lora.stated.is_nothing and lora.record.scale == "none":
        return Check(name, "warn", f"left out, as the file's record says: load it at weight {wanted:.10g}")
    if wrong:
        seen = f"{_several(set(wrong.values()))}, where the training's is {wanted:.10g}: {why}"
        count = len(wrong)
        return Check(name, "fail", seen if count == len(found) else f"{counted(count, 'module')} at {seen}")
    if given is not None and plan.alpha.source != "default" and plan.alpha.value != given.value:
        doubt = f"{plan.alpha.source} says alpha {plan.alpha.value:.10g}"
        return Check(name, "warn", f"scaling {wanted:.10g}: {why}; but {doubt}")
    return Check(name, "pass", f"scaling {wanted:.10g}: {why}")


def _several(values: set[float]) -> str:
    return "scaling " + ", ".join(f"{value:.10g}" for value in sorted(values)[:5])
