"""A LoRA file held against the checkpoint that it was made of: the plan of its export, and every value.

Tensors are to be the same bit for bit. Where the file's own record says that the scale was folded in or the dtype
changed, they are to be within the rounding of their dtype: half a unit in the last place of the exact result, which
double precision holds.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogtools.checkpoint.decoding import doubles
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.plan import plan_lora_export
from cogtools.conversion.scale import ALPHA_SOURCES, BY_DEFAULT, BY_HAND
from cogtools.conversion.training_config import FILE_NAME as CONFIG_FILE_NAME
from cogtools.errors import CheckpointError, Hint, Problem, command
from cogtools.formatting import counted, number
from cogtools.verification.checks import figures
from cogtools.verification.hints import only_load_tells
from cogtools.verification.report import Check, folded
from cogtools.verification.values import FLOAT_FORMATS, place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.conversion.plan import LoraPlan, PlannedTensor
    from cogtools.conversion.record import ExportRecord
    from cogtools.layouts.family import LoraKey
    from cogtools.verification.written import WrittenLora, WrittenTensor

_SLACK = 1 + 2**-12
"""torch casts double precision to 16 bits by way of float32, which rounds twice: by so much more at most in float16,
the wider of the two. In float64 the product that is compared with is itself rounded, by less."""


class Source(NamedTuple):
    """The checkpoint that a file is held against, open, and what its LoRA should have become."""

    checkpoint: Checkpoint
    plan: LoraPlan


@contextmanager
def open_source(
    path: Path, record: ExportRecord, *, iteration: int | None = None, ema: bool = False
) -> Iterator[Source]:
    """Open the checkpoint that a file is to be held against.

    Args:
        path: the checkpoint.
        record: how the file was made.
        iteration: as `open_checkpoint` has it.
        ema: the same.

    Raises:
        CogtoolsError: if the checkpoint cannot be read, or has no LoRA that could have been exported.
    """
    with open_checkpoint(path, iteration=iteration, ema=ema) as opened:
        # What the checkpoint has is what the file should have, be it the LoRA of all layers or of some.
        yield Source(opened, _plan(opened, record))


def _plan(checkpoint: Checkpoint, record: ExportRecord) -> LoraPlan:
    try:
        return plan_lora_export(checkpoint, allow_partial=True)
    except CheckpointError:
        # An alpha given by hand does without a training configuration, also one that cannot be read.
        if record.alpha_by_hand is None:
            raise
        return plan_lora_export(checkpoint, alpha=record.alpha_by_hand, allow_partial=True)


def against_checks(
    lora: WrittenLora, source: Source, found: Mapping[str, float], advance: Callable[[int], None]
) -> list[Check]:
    """Hold a file against a checkpoint.

    Args:
        lora: the file.
        source: the checkpoint.
        found: the scaling of every module of the file, as far as it is known.
        advance: told the bytes of the file that were compared, as they are.
    """
    return [_check_tensors(lora, source, advance), _check_scale(lora, source.plan, found)]


def _folded_in(lora: WrittenLora, plan: LoraPlan) -> float:
    """What the weights of the file were multiplied by, as its record says: 1 where nothing was folded in."""
    if lora.record.scale != "fold":
        return 1.0
    return plan.scaling if lora.record.alpha is None else lora.record.alpha / plan.rank


def _check_tensors(lora: WrittenLora, source: Source, advance: Callable[[int], None]) -> Check:
    planned = {tensor.name: tensor for tensor in source.plan.tensors}
    shared = [name for name in planned if name in lora.tensors]
    missing, unexpected = planned.keys() - lora.tensors.keys(), lora.tensors.keys() - planned.keys()
    comparison = _Comparison(lora, _folded_in(lora, source.plan), advance)
    different = [(name, problem) for name in shared if (problem := comparison.compare(name, planned[name]))]
    problems = [*lora.problems("missing", missing), *lora.problems("unexpected", unexpected), *folded(different)]
    if not problems:
        return Check("against", "pass", f"{counted(len(shared), 'tensor')} equal the checkpoint's{comparison.how()}")
    seen = [
        *([f"{len(different)} of {counted(len(shared), 'tensor')} differ from the checkpoint's"] if different else []),
        *([f"{len(missing)} of the checkpoint's {counted(len(planned), 'tensor')} missing"] if missing else []),
        *([f"{counted(len(unexpected), 'tensor')} that the checkpoint does not have"] if unexpected else []),
    ]
    other_values = sum(problem.kind == "value" for _, problem in different)
    hint = _other_weights(lora, source) if 2 * other_values > len(shared) else None
    return Check("against", "fail", ", ".join(seen), tuple(problems), hint)


def _other_weights(lora: WrittenLora, source: Source) -> Hint | None:
    """Where most tensors differ, the weights of the training that the file may have been made of; None if unknown."""
    run, made_of = source.checkpoint.run, lora.record.iteration
    iteration = source.checkpoint.values.get("iteration")
    if made_of is not None and isinstance(iteration, int) and made_of != iteration:
        said = f"the file's record says iteration {made_of}, and this is iteration {iteration}"
        if run is None or all(item.number != made_of for item in run.iterations):
            return Hint(said)
        return command("verify", lora.path, "--against", run.folder, "--iteration", made_of, advice=said)
    if run is None or run.twin is None:
        return None
    kind, option = ("plain", []) if run.chosen.ema else ("EMA", ["--ema"])
    words = ["--against", run.folder, "--iteration", run.chosen.number, *option]
    return command("verify", lora.path, *words, advice=f"the training has {kind} weights too")


class _Comparison:
    """Compares tensors of a file with those of the checkpoint, bit for bit or as computed from them."""

    def __init__(self, lora: WrittenLora, folded_in: float, advance: Callable[[int], None]) -> None:
        self._lora = lora
        self._folded_in = folded_in
        self._advance = advance
        self._folded = lora.record.scale == "fold"
        self._split: dict[tuple[int, str], float] = {}
        self._computed: list[float] = []

    def how(self) -> str:
        """How the tensors were found to be equal."""
        if not self._computed:
            return " bit for bit"
        record = self._lora.record
        done = [f"the scaling {number(self._folded_in)} folded in"] if self._folded else []
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
            return Problem(
                "dtype", tensor.key, tensor.entry.dtype.name, f"{source.dtype.name}, since the file states no cast"
            )
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
                    values = doubles(found, dtype)[places[0]], doubles(expected, dtype)[places[0]]
                different += len(places)
            position += len(expected)
            self._advance(len(expected))
        return _differs(tensor, index, *values, different) if different else None

    def _compare_rounded(self, name: LoraKey, tensor: WrittenTensor, planned: PlannedTensor) -> Problem | None:
        found, exact = (
            _values(tensor),
            doubles(b"".join(tensor_chunks(planned.source.entry)), planned.source.entry.dtype),
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
        return self._folded_in / self._split.get(module, 1.0)


def _norm(values: NDArray[np.float64]) -> float:
    """The Euclidean norm. Not NumPy's: its threads take longer to start than such a tensor to add up."""
    return math.sqrt(np.square(values).sum())


def _values(tensor: WrittenTensor) -> NDArray[np.float64]:
    return doubles(b"".join(tensor_chunks(tensor.entry)), tensor.entry.dtype)


def _differs(tensor: WrittenTensor, index: int, found: float, expected: float, different: int) -> Problem:
    where = place(index, tensor.entry.shape)
    count = f"{different:,} of {tensor.entry.numel:,} values differ"
    return Problem("value", tensor.key, f"{found:.9g} at {where} ({count})", f"{expected:.9g}")


def _check_scale(lora: WrittenLora, plan: LoraPlan, found: Mapping[str, float]) -> Check:
    """The file's scaling is the training's: alpha / rank, stated or folded in."""
    name, record = "against-scale", lora.record
    in_weights = _folded_in(lora, plan)
    effective = {module: scaling * in_weights for module, scaling in found.items()}
    where = f" / rank {plan.rank}" + (", folded in" if record.scale == "fold" else "")
    why = f"alpha {number(plan.alpha.value)} ({ALPHA_SOURCES[plan.alpha.source]}){where}"
    if not effective and lora.stated.unevaluated:
        seen = f"not known without --load; the training's is {number(plan.scaling)}: {why}"
        return Check(name, "warn", seen, hint=only_load_tells(lora))
    if not effective:
        return Check(name, "fail", f"no scaling is stated; the training's is {number(plan.scaling)}: {why}")
    wrong = [scaling for scaling in effective.values() if not math.isclose(scaling, plan.scaling, rel_tol=1e-9)]
    if not wrong:
        return Check(name, "pass", f"scaling {number(plan.scaling)}: {why}")
    seen = f"scaling {figures(wrong)}" + ("" if len(wrong) == len(found) else f" in {counted(len(wrong), 'module')}")
    by_hand = _by_hand(record, plan.rank, wrong)
    if lora.stated.is_nothing and record.scale == "none":
        alpha = plan.alpha.value if plan.config is not None or record.alpha is None else record.alpha
        weight = number(alpha / plan.rank)
        return Check(name, "warn", f"left out, as the file's record says: load it at weight {weight}")
    if plan.config is None and by_hand:
        return Check(name, "pass", f"{seen}: {by_hand}{where}")
    if plan.config is None and not lora.stated.is_nothing:
        return Check(name, "warn", f"{seen}; {_not_known(record)}", hint=_KEEP_THE_CONFIG)
    if by_hand:
        return Check(name, "warn", f"{seen}: {by_hand}{where}; but {_contradiction(plan)}", hint=_WITHOUT_ALPHA)
    return Check(name, "fail", f"{seen}, where the training's is {number(plan.scaling)}: {why}")


def _by_hand(record: ExportRecord, rank: int, scalings: list[float]) -> str | None:
    """The alpha that was given to the exporter by hand, if the file's record says so and these scalings are its."""
    if record.alpha_by_hand is None:
        return None
    wanted = record.alpha_by_hand / rank
    is_it = all(math.isclose(scaling, wanted, rel_tol=1e-9) for scaling in scalings)
    source = f"{ALPHA_SOURCES[BY_HAND]}, as the file's record says"
    return f"alpha {number(record.alpha_by_hand)} ({source})" if is_it else None


_WITHOUT_ALPHA = Hint(f"if {CONFIG_FILE_NAME} is right, export again without --alpha")
_KEEP_THE_CONFIG = Hint(f"put {CONFIG_FILE_NAME} back where the trainer wrote it: into the save folder")


def _not_known(record: ExportRecord) -> str:
    unknown = f"the training's alpha is not known without a {CONFIG_FILE_NAME} beside the checkpoint"
    if record.alpha is None:
        return unknown
    source = ALPHA_SOURCES.get(record.alpha_source or "", "source not stated")
    return f"{unknown}, the file's record says {number(record.alpha)} ({source})"


def _contradiction(plan: LoraPlan) -> str:
    if plan.alpha.source == BY_DEFAULT:
        return f"{CONFIG_FILE_NAME} sets no lora_alpha, so the training used {number(plan.alpha.value)}, SAT's default"
    return f"{CONFIG_FILE_NAME} says alpha {number(plan.alpha.value)}"
