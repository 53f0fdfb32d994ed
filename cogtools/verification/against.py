"""A LoRA file held against the checkpoint that it was made of: the plan of its export, and every value.

Tensors are to be the same bit for bit. Where the file's own record says that the scale was folded in or the dtype
changed, they are to be within the rounding of their dtype: half a unit in the last place of the exact result, which
double precision holds.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogtools.checkpoint.decoding import doubles, tensor_doubles
from cogtools.checkpoint.dtypes import FLOAT_FORMATS
from cogtools.checkpoint.folder import recorded_iteration
from cogtools.checkpoint.gather import tensor_chunks
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.merge_plan import Weighted
from cogtools.conversion.notices import choice_notices, recorded_notice
from cogtools.conversion.options import BY_HAND
from cogtools.conversion.plan import plan_lora
from cogtools.conversion.scale import ALPHA_SOURCES, BY_CONFIG, BY_DEFAULT, BY_NOTHING
from cogtools.conversion.training_config import FILE_NAME as CONFIG_FILE_NAME
from cogtools.errors import CheckpointError, Hint, Problem, command
from cogtools.formatting import counted, number
from cogtools.layouts import diffusers
from cogtools.verification.checks import figures
from cogtools.verification.expected import stated_of
from cogtools.verification.hints import only_load_tells
from cogtools.verification.report import Check, folded
from cogtools.verification.sums import as_recorded, check_sum, refuse_other_number
from cogtools.verification.values import place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.run import Iteration
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.lora import Lora, LoraTensor
    from cogtools.conversion.plan import LoraPlan
    from cogtools.conversion.record import ExportRecord
    from cogtools.conversion.scale import Scale
    from cogtools.layouts.family import LoraKey, Module

_SLACK = 1 + 2**-12
"""torch casts double precision to 16 bits by way of float32, which rounds twice: by so much more at most in float16,
the wider of the two. In float64 the product that is compared with is itself rounded, by less."""


class Source(NamedTuple):
    """What a file is held against, open.

    Attributes:
        checkpoint: the checkpoint; of several, the first.
        plan: what its LoRA should have become.
        summed: the LoRAs whose sum the file should add, where its record says that it was made of several or cut to a
            lower rank; () where its tensors should be those of the plan.
        recorded: which iteration of a save folder the file's record names, where that was taken; else None.
    """

    checkpoint: Checkpoint
    plan: LoraPlan
    summed: tuple[Weighted, ...] = ()
    recorded: Iteration | None = None


@contextmanager
def open_source(
    paths: Sequence[AnyPath], record: ExportRecord, *, iteration: int | None = None, ema: bool = False
) -> Iterator[Source]:
    """Open the checkpoint that a file is to be held against, or the LoRAs that it was made of.

    Args:
        paths: the checkpoint, or all of these LoRAs.
        record: how the file was made: of one save folder, the weights that it names are taken.
        iteration: as `open_checkpoint` has it; then the record does not matter.
        ema: the same.

    Raises:
        OptionError: if they are not as many as the file was made of.
        CogtoolsError: if one cannot be read, or has no LoRA that could have been exported.
    """
    refuse_other_number(paths, record.merged)
    recorded = None
    if iteration is None and not ema and record.merged is None:
        recorded = recorded_iteration(paths[0], record.iteration, ema=bool(record.ema))
    if recorded is not None:
        iteration, ema = recorded.number, recorded.ema
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path, iteration=iteration, ema=ema)) for path in paths]
        if record.merged is not None:
            loras = as_recorded(opened, record.merged)
            yield Source(loras[0].plan.lora.checkpoint, loras[0].plan, tuple(loras))
            return
        # What the checkpoint has is what the file should have, be it the LoRA of all layers or of some.
        plan = _plan(opened[0], record)
        yield Source(opened[0], plan, () if record.cut_to is None else (Weighted(plan),), recorded)


def source_notices(source: Source) -> list[str]:
    """What to say of the weights that a file is held against."""
    return choice_notices(source.checkpoint) if source.recorded is None else [recorded_notice(source.recorded)]


def _plan(checkpoint: Checkpoint, record: ExportRecord) -> LoraPlan:
    """What the checkpoint's LoRA is: diffusers' layout has a place for all that a LoRA can have."""
    alpha, scaling = record.alpha_by_hand, record.scaling_by_hand
    if record.cut_to is not None:  # the scale is in the values, which are compared at the one that was taken
        return plan_lora(checkpoint, diffusers.LAYOUT, alpha=alpha, scaling=scaling, allow_partial=True)
    try:
        return plan_lora(checkpoint, diffusers.LAYOUT, allow_partial=True)
    except CheckpointError:
        # A scale given by hand does without a training configuration, also one that cannot be read.
        if alpha is None and scaling is None:
            raise
        return plan_lora(checkpoint, diffusers.LAYOUT, alpha=alpha, scaling=scaling, allow_partial=True)


def against_checks(
    lora: Lora, source: Source, found: Mapping[Module, float], advance: Callable[[int], None]
) -> list[Check]:
    """Hold a file against a checkpoint.

    Args:
        lora: the file.
        source: the checkpoint.
        found: the scaling of every module of the file, as far as it is known.
        advance: told the bytes of the file that were compared, as they are.
    """
    if source.summed:
        return [check_sum(lora, source.summed, found, advance)]
    return [_check_tensors(lora, source, advance), _check_scale(lora, source.plan, found)]


def _folded_in(lora: Lora, plan: LoraPlan, module: Module) -> float:
    """What a module's update in the file was multiplied by, as its record says: 1 where nothing was folded in."""
    if lora.record.scale != "fold":
        return 1.0
    rank = plan.lora.ranks[module]
    recorded = lora.record.scaling_of(rank)
    scaling = plan.scalings.get(module, 1.0) if recorded is None else recorded
    return scaling / (lora.intended.scaling_unstated(rank) or 1.0)


def _check_tensors(lora: Lora, source: Source, advance: Callable[[int], None]) -> Check:
    planned = source.plan.names
    shared = [name for name in planned if name in lora.tensors]
    missing = [name for name in planned if name not in lora.tensors]
    unexpected = [name for name in lora.tensors if name not in set(planned)]
    comparison = _Comparison(lora, source.plan, advance)
    different = [(name, problem) for name in shared if (problem := comparison.compare(name))]
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


def _other_weights(lora: Lora, source: Source) -> Hint | None:
    """Where most tensors differ, the weights of the training that the file may have been made of; None if unknown."""
    run, made_of = source.checkpoint.run, lora.record.iteration
    iteration = source.checkpoint.iteration
    if made_of is not None and iteration is not None and made_of != iteration:
        said = f"the file's record says iteration {made_of}, and this is iteration {iteration}"
        if run is None or all(item.number != made_of for item in run.iterations):
            return Hint(said)
        return command("verify", lora.checkpoint.path, "--against", run.folder, "--iteration", made_of, advice=said)
    if run is None or run.twin is None:
        return None
    kind, option = ("plain", []) if run.chosen.ema else ("EMA", ["--ema"])
    words = ["--against", run.folder, "--iteration", run.chosen.number, *option]
    return command("verify", lora.checkpoint.path, *words, advice=f"the training has {kind} weights too")


class _Comparison:
    """Compares tensors of a file with those of the checkpoint, bit for bit or as computed from them."""

    def __init__(self, lora: Lora, plan: LoraPlan, advance: Callable[[int], None]) -> None:
        self._lora = lora
        self._plan = plan
        self._advance = advance
        self._folded = lora.record.scale == "fold"
        self._split: dict[Module, float] = {}
        self._computed: list[float] = []

    def how(self) -> str:
        """How the tensors were found to be equal."""
        if not self._computed:
            return " bit for bit"
        record = self._lora.record
        scalings = {_folded_in(self._lora, self._plan, module) for module in self._plan.modules}
        done = [f"the scaling {figures(scalings)} folded in"] if self._folded else []
        if record.dtype != record.source_dtype:
            done.append(f"{record.source_dtype} cast to {record.dtype}")
        error = f"the largest relative error of a tensor is {max(self._computed):.2g}"
        return f" within the dtype's rounding ({', '.join(done)}, as its record states): {error}"

    def compare(self, name: LoraKey) -> Problem | None:
        """What is wrong with a tensor of the file; None if it is as planned."""
        tensor, source = self._lora.tensors[name], self._plan.entry(name)
        if tensor.entry.shape != source.shape:
            return Problem("shape", tensor.key, str(tensor.entry.shape), str(source.shape))
        if tensor.entry.dtype != source.dtype and not self._is_stated_cast(tensor, source):
            return Problem(
                "dtype", tensor.key, tensor.entry.dtype.name, f"{source.dtype.name}, since the file states no cast"
            )
        if tensor.entry.dtype == source.dtype and not self._folded:
            return self._compare_bits(tensor, source)
        return self._compare_rounded(name, tensor, source)

    def _is_stated_cast(self, tensor: LoraTensor, source: TensorEntry) -> bool:
        stated = (self._lora.record.source_dtype, self._lora.record.dtype)
        return stated == (source.dtype.name, tensor.entry.dtype.name) and set(stated) <= set(FLOAT_FORMATS)

    def _compare_bits(self, tensor: LoraTensor, source: TensorEntry) -> Problem | None:
        dtype = source.dtype
        read = _reader(tensor.entry)
        position, different, index, values = 0, 0, 0, (0.0, 0.0)
        for expected in tensor_chunks(source):
            found = read(position, len(expected))
            if found != expected:
                bits = f"<u{dtype.itemsize}"
                places = np.flatnonzero(np.frombuffer(found, bits) != np.frombuffer(expected, bits))
                if not different:
                    index = position // dtype.itemsize + int(places[0])
                    values = doubles(found, dtype)[places[0]], doubles(expected, dtype)[places[0]]
                different += len(places)
            position += len(expected)
            self._advance(len(expected))
        return _differs(tensor, index, *values, different) if different else None

    def _compare_rounded(self, name: LoraKey, tensor: LoraTensor, source: TensorEntry) -> Problem | None:
        found, exact = (tensor_doubles(entry).ravel() for entry in (tensor.entry, source))
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
        module = name.module
        if self._folded and name.part == "bias":
            return _folded_in(self._lora, self._plan, module)
        if not self._folded or name.part not in ("A", "B"):
            return 1.0
        if name.part == "A":
            largest = int(np.argmax(np.abs(exact)))
            ratio = found[largest] / exact[largest] if exact[largest] else 1.0
            usable = math.isfinite(ratio) and ratio > 0
            self._split[module] = 2.0 ** round(math.log2(ratio)) if usable else 1.0
            return self._split[module]
        return _folded_in(self._lora, self._plan, module) / self._split.get(module, 1.0)


def _reader(entry: TensorEntry) -> Callable[[int, int], bytes]:
    """Reads the bytes of a tensor: a position, and how many."""
    place = entry.range()
    if place is None:  # they have to be rearranged first
        whole = b"".join(tensor_chunks(entry))
        return lambda position, size_bytes: whole[position : position + size_bytes]
    return lambda position, size_bytes: place.file.read(place.offset_bytes + position, size_bytes)


def _norm(values: NDArray[np.float64]) -> float:
    """The Euclidean norm. Not NumPy's: its threads take longer to start than such a tensor to add up."""
    return math.sqrt(np.square(values).sum())


def _differs(tensor: LoraTensor, index: int, found: float, expected: float, different: int) -> Problem:
    where = place(index, tensor.entry.shape)
    count = f"{different:,} of {tensor.entry.numel:,} values differ"
    return Problem("value", tensor.key, f"{found:.9g} at {where} ({count})", f"{expected:.9g}")


def _check_scale(lora: Lora, plan: LoraPlan, found: Mapping[Module, float]) -> Check:
    """The file's scaling is the training's: alpha / rank, stated or folded in."""
    name, record = "against-scale", lora.record
    stated = stated_of(lora)
    is_nothing = stated is None or stated.is_nothing
    wanted = plan.scalings
    effective = {module: scaling * _folded_in(lora, plan, module) for module, scaling in found.items()}
    why = _why(plan.scale, plan.rank, is_folded=record.scale == "fold")
    if not effective and stated is not None and stated.unevaluated:
        seen = f"not known without --load; the training's is {figures(wanted.values())}: {why}"
        return Check(name, "warn", seen, hint=only_load_tells(lora))
    if not effective:
        return Check(name, "fail", f"no scaling is stated; the training's is {figures(wanted.values())}: {why}")
    wrong = {
        module: scaling
        for module, scaling in effective.items()
        if module in wanted and not math.isclose(scaling, wanted[module], rel_tol=1e-9)
    }
    if not wrong:
        return Check(name, "pass", f"scaling {figures(effective.values())}: {why}")
    seen = f"scaling {figures(wrong.values())}"
    seen += "" if len(wrong) == len(found) else f" in {counted(len(wrong), 'module')}"
    by_hand = _by_hand(record, plan, wrong)
    is_unstated = plan.config is None and plan.scale.source in (BY_DEFAULT, BY_NOTHING)
    if is_nothing and record.scale == "none":
        weight = figures(wanted.values())
        recorded = record.scaling_of(plan.rank) if plan.rank is not None else None
        if is_unstated and recorded is not None:
            weight = number(recorded)
        return Check(name, "warn", f"left out, as the file's record says: load it at weight {weight}")
    if is_unstated and by_hand:
        return Check(name, "pass", f"{seen}: {by_hand}{_over(plan.rank, record)}")
    if is_unstated and not is_nothing and plan.scale.source == BY_DEFAULT:
        return Check(name, "warn", f"{seen}; {_not_known(record)}", hint=_KEEP_THE_CONFIG)
    if by_hand:
        seen = f"{seen}: {by_hand}{_over(plan.rank, record)}; but {_contradiction(plan)}"
        return Check(name, "warn", seen, hint=_WITHOUT_ALPHA if plan.config is not None else None)
    return Check(name, "fail", f"{seen}, where the training's is {figures(wanted.values())}: {why}")


def _why(scale: Scale, rank: int | None, *, is_folded: bool) -> str:
    """Where a scaling comes from: an alpha, who states it, and the rank."""
    folded_in = ", folded in" if is_folded else ""
    if scale.alpha is None or rank is None:
        return ALPHA_SOURCES[scale.source] + folded_in
    return f"alpha {number(scale.alpha)} ({ALPHA_SOURCES[scale.source]}) / rank {rank}{folded_in}"


def _over(rank: int | None, record: ExportRecord) -> str:
    return (f" / rank {rank}" if rank is not None else "") + (", folded in" if record.scale == "fold" else "")


def _by_hand(record: ExportRecord, plan: LoraPlan, scalings: Mapping[Module, float]) -> str | None:
    """The alpha that was given to the exporter by hand, if the file's record says so and these scalings are its."""
    alpha, scaling = record.alpha_by_hand, record.scaling_by_hand
    if alpha is None and scaling is None:
        return None
    ranks = plan.lora.ranks
    is_it = all(
        math.isclose(value, record.scaling_of(ranks[module]) or 0.0, rel_tol=1e-9) for module, value in scalings.items()
    )
    source = f"{ALPHA_SOURCES[record.alpha_source or BY_HAND]}, as the file's record says"
    stated = f"alpha {number(alpha)}" if alpha is not None else f"scaling {number(scaling or 0.0)}"
    return f"{stated} ({source})" if is_it else None


_WITHOUT_ALPHA = Hint(f"if {CONFIG_FILE_NAME} is right, export again without --alpha")
_KEEP_THE_CONFIG = Hint(f"put {CONFIG_FILE_NAME} back where the trainer wrote it: into the save folder")


def _not_known(record: ExportRecord) -> str:
    unknown = f"the training's alpha is not known without a {CONFIG_FILE_NAME} beside the checkpoint"
    if record.alpha is None:
        return unknown
    source = ALPHA_SOURCES.get(record.alpha_source or "", "source not stated")
    return f"{unknown}, the file's record says {number(record.alpha)} ({source})"


def _contradiction(plan: LoraPlan) -> str:
    alpha = plan.scale.alpha
    shown = "different by module" if alpha is None else number(alpha)
    if plan.scale.source == BY_DEFAULT:
        return f"{CONFIG_FILE_NAME} sets no lora_alpha, so the training used {shown}, SAT's default"
    if plan.scale.source == BY_CONFIG:
        return f"{CONFIG_FILE_NAME} says alpha {shown}"
    return f"alpha {shown} is {ALPHA_SOURCES[plan.scale.source]} of what it was made of"
