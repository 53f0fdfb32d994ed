"""The checks that need a file's header only: names, shapes, ranks, dtypes, and what it states of its scale.

Some of what a file states, only PEFT can interpret. The checks of that take the modules that PEFT adapted when it
loaded the file, and their scalings: {} where it was not asked, or did not load the file as the file says.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from cogtools.conversion.plan import FLOATS
from cogtools.errors import Hint, Problem, command
from cogtools.formatting import counted, number
from cogtools.layouts import diffusers
from cogtools.layouts import family as cogvideox
from cogtools.layouts.family import LoraKey
from cogtools.layouts.folded import fold_names
from cogtools.layouts.naming import DIFFUSERS
from cogtools.layouts.peft import path_ends
from cogtools.verification.hints import only_load_tells
from cogtools.verification.report import Check, folded, judged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cogtools.conversion.record import ExportRecord
    from cogtools.verification.expected import Expected
    from cogtools.verification.written import WrittenLora

SHOWN_FIGURES = 10

_NO_TENSORS = "no tensors"


def check_readable(lora: WrittenLora) -> Check:
    """Always passes: a file that could not be opened has no checks."""
    return Check(
        "readable", "pass", f"{counted(len(lora.file.tensors), 'tensor')}, the safetensors library reads it too"
    )


def check_names(lora: WrittenLora, expected: Expected) -> Check:
    """Every key, and the file itself, is called what the program that is to load it calls it."""
    layers = expected.transformer.layers
    beyond = [name for name in lora.tensors if name.layer >= layers]
    problems = [
        *_wrong_file_name(lora),
        *_misnamed(lora),
        *_unknown(lora),
        *lora.problems("unexpected", beyond, expected=f"layers 0-{layers - 1}"),
    ]
    good = f"all are {lora.naming.name}' names" if lora.naming is DIFFUSERS else f"all are {lora.naming.name}'s names"
    return judged("names", problems, good, _bad_names(lora, len(beyond)), hint=_who_reads_them(lora))


def _wrong_file_name(lora: WrittenLora) -> list[Problem]:
    """The file's own name, if PEFT does not find it by that; diffusers takes any."""
    if lora.naming is DIFFUSERS or lora.path.name == lora.naming.file_name:
        return []
    return [Problem("unexpected", lora.path.name, expected=f"{lora.naming.file_name}: PEFT reads no other file")]


def _misnamed(lora: WrittenLora) -> list[Problem]:
    alike: dict[str, list[str]] = {}
    for key, miss in lora.misnamed.items():
        alike.setdefault(miss.what, []).append(key)
    return [
        Problem(
            "unexpected",
            keys[0],
            f"{what}, {counted(len(keys), 'key')}",
            lora.naming.key(lora.misnamed[keys[0]].name),
            tuple(keys),
        )
        for what, keys in alike.items()
    ]


def _unknown(lora: WrittenLora) -> list[Problem]:
    """Keys that mean nothing, those that differ in the layer and the module only in one line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for key in lora.unknown:
        beginning = key[: next((index for index, char in enumerate(key) if char.isdecimal()), len(key))]
        alike.setdefault((beginning, key.rpartition(".")[2]), []).append(key)
    example = f"keys such as {lora.naming.key(LoraKey(0, 'q', 'A'))}"
    problems = []
    for (_, end), keys in alike.items():
        what = (
            f"{counted(len(keys), 'tensor')} that hold{'s' if len(keys) == 1 else ''} an alpha"
            if end == "alpha"
            else None
        )
        what = what or (f"{len(keys):,} keys alike" if len(keys) > 1 else None)
        problems.append(Problem("unexpected", keys[0], what, example, tuple(keys)))
    return problems


def _bad_names(lora: WrittenLora, beyond: int) -> str:
    wrong = len(lora.misnamed) + len(lora.unknown) + beyond
    if lora.misnamed and len(lora.misnamed) == len(lora.tensors):
        kinds = sorted({miss.what for miss in lora.misnamed.values()})
        return f"these are {' and '.join(kinds)}: {lora.naming.reader} would load none of them"
    if not wrong:
        return f"the file is not called {lora.naming.file_name}"
    return f"{counted(wrong, 'key')} of {len(lora.file.tensors)} with no place in the model"


def _who_reads_them(lora: WrittenLora) -> Hint:
    """What can be done with a file whose names are another program's."""
    if not lora.tensors:
        return _look(lora)
    again = command("export-lora", "CHECKPOINT", "OUT_DIR", advice=f"for {lora.naming.reader}")
    readers = {miss.reader for miss in lora.misnamed.values()}
    if not lora.misnamed or len(lora.misnamed) < len(lora.tensors):
        return again if lora.naming is DIFFUSERS else Hint(f"name it {lora.naming.file_name}")
    (reader, *others) = readers
    if reader is None or others:
        return again
    if reader == "cogtools export-lora":
        return command("export-lora", lora.path, "OUT_DIR")
    return replace(again, advice=f"load it with {reader}; {again.advice}")


def _look(lora: WrittenLora) -> Hint:
    return command("inspect", lora.path, advice="to see what the file holds")


def check_complete(lora: WrittenLora, expected: Expected) -> Check:
    """Every tensor is there that the transformer, or the file's own target_modules, asks for."""
    name = "complete"
    if not expected.names:
        return Check(name, "fail", "no LoRA tensor at all", hint=_look(lora))
    there = len(expected.names & lora.tensors.keys())
    seen = f"{there} of {len(expected.names)} tensors of {expected.transformer.name}"
    if expected.known_by is not None:
        seen += f", as {expected.known_by} says"
    if expected.partial:
        seen += f"; target_modules states {'; '.join(fold_names(expected.names)[:3])}"
    problems = tuple(lora.problems("missing", expected.names - lora.tensors.keys()))
    if problems and not expected.is_certain:
        seen += "; it names its modules by a regular expression, and which are meant, only --load tells"
        return Check(name, "warn", seen, problems, only_load_tells(lora))
    if problems:
        return Check(name, "fail", seen, problems)
    if expected.known_by is None:
        seen += f"; nothing tells how many layers the model has: taken to be {expected.transformer.layers}"
        return Check(name, "warn", seen, hint=Hint("state it with --model or --layers"))
    return Check(name, "pass", seen)


def check_pairs(lora: WrittenLora) -> Check:
    """Every lora_A has its lora_B."""
    if not lora.tensors:
        return Check("pairs", "skipped", _NO_TENSORS)
    lone = [name for name in lora.tensors if _partner(name) not in lora.tensors]
    problems = lora.problems("unpaired", lone, expected="its partner beside it")
    pairs = (len(lora.tensors) - len(lone)) // 2
    return judged("pairs", problems, counted(pairs, "pair"), f"{counted(len(lone), 'tensor')} without a partner")


def _partner(name: LoraKey) -> LoraKey:
    return name._replace(factor="B" if name.factor == "A" else "A")


def check_shapes(lora: WrittenLora, expected: Expected) -> Check:
    """lora_A is (rank, hidden) and lora_B (hidden, rank), with the transformer's hidden size."""
    if not lora.tensors:
        return Check("shapes", "skipped", _NO_TENSORS)
    hidden = expected.transformer.hidden
    fitting = ranks(lora, expected)
    wrong = [
        (
            name,
            Problem(
                "shape",
                tensor.key,
                str(tensor.entry.shape),
                f"(rank, {hidden})" if name.factor == "A" else f"({hidden}, rank)",
            ),
        )
        for name, tensor in lora.tensors.items()
        if not 0 < fitting.get(name, 0) <= hidden
    ]
    good = f"(rank, {hidden}) and ({hidden}, rank)"
    return judged("shapes", folded(wrong), good, f"{counted(len(wrong), 'tensor')} with a shape that does not fit")


def ranks(lora: WrittenLora, expected: Expected) -> dict[LoraKey, int]:
    """The rank of every tensor that has one: of those whose other side is the hidden size."""
    hidden = expected.transformer.hidden
    found = {}
    for name, tensor in lora.tensors.items():
        shape = tensor.entry.shape
        if len(shape) == 2 and cogvideox.hidden_of(name.factor, shape) == hidden:
            found[name] = cogvideox.rank_of(name.factor, shape)
    return found


def check_rank(lora: WrittenLora, expected: Expected, by_peft: Mapping[str, float]) -> Check:
    """One rank throughout, or for every module the one that the file states for it."""
    found = ranks(lora, expected)
    if not found:
        return Check("rank", "skipped", "no tensor of two dimensions")
    common = _most_common(found.values())
    config = lora.stated.config
    seen = ", ".join(map(str, sorted(set(found.values()))[:SHOWN_FIGURES]))
    if config is not None and config.rank_pattern is None:
        if by_peft:
            return Check("rank", "pass", f"{seen}, as PEFT reads rank_pattern")
        seen += "; rank_pattern is a regular expression: which modules it means, only --load tells"
        return Check("rank", "warn", seen, hint=only_load_tells(lora))
    wrong = []
    for name, rank in found.items():
        wanted = config.rank_of(diffusers.module_path(name)) if config is not None else None
        if rank != (wanted or common):
            why = "as the file states" if wanted else "as most have"
            wrong.append((name, Problem("rank", lora.key(name), str(rank), f"{wanted or common}, {why}")))
    good = f"{seen} throughout" if len(set(found.values())) == 1 else f"{seen}, as rank_pattern states"
    return judged("rank", folded(wrong), good, f"{seen}: not what {'the file states' if config else 'one LoRA has'}")


def _most_common(values: Iterable[int]) -> int:
    return Counter(values).most_common(1)[0][0]


def check_dtype(lora: WrittenLora) -> Check:
    """One dtype throughout, of floating-point numbers."""
    dtypes = Counter(tensor.entry.dtype.name for tensor in lora.tensors.values())
    if not dtypes:
        return Check("dtype", "skipped", "no tensors")
    common, _ = dtypes.most_common(1)[0]
    wanted = common if common in FLOATS else "one of " + ", ".join(FLOATS)
    wrong = [
        (name, Problem("dtype", tensor.key, tensor.entry.dtype.name, wanted))
        for name, tensor in lora.tensors.items()
        if tensor.entry.dtype.name != common or common not in FLOATS
    ]
    bad = ", ".join(f"{name} in {counted(count, 'tensor')}" for name, count in dtypes.items())
    return judged("dtype", folded(wrong), common, bad)


def scalings(lora: WrittenLora) -> dict[str, float]:
    """What every module's lora_B @ lora_A is multiplied by when it is loaded, as far as the file states it."""
    found = {module: lora.stated.scaling_of(module) for module in lora.modules}
    return {module: scaling for module, scaling in found.items() if scaling is not None}


def figures(values: Iterable[float]) -> str:
    """Some different numbers, the first ones of many."""
    return ", ".join(number(value) for value in sorted(set(values))[:SHOWN_FIGURES])


def check_scale(lora: WrittenLora, found: Mapping[str, float], by_peft: Mapping[str, float]) -> Check:
    """The scale is stated, where and how the program that loads the file reads it."""
    name = "scale"
    if not lora.tensors:
        return Check(name, "skipped", _NO_TENSORS)
    stated = lora.stated
    if stated.is_nothing:
        if lora.naming is DIFFUSERS:
            problem = Problem("missing", diffusers.ADAPTER_METADATA_KEY)
            return Check(name, "warn", "not stated: diffusers runs it at scaling 1.0", (problem,), _weight(lora.record))
        return Check(name, "fail", "there is no adapter_config.json, without which PEFT loads nothing")
    if stated.problems:
        return Check(name, "fail", "what the file states does not work", (*stated.problems, *stated.doubts))
    seen = f"scaling {figures(found.values()) or 'unknown'}"
    config = stated.config
    if (
        config is not None
        and config.alpha is not None
        and len(set(found.values())) == 1
        and config.rank_pattern == config.alpha_pattern == ()
    ):
        root = "sqrt(rank)" if config.rank_stabilised else "rank"
        seen += f": alpha {number(config.alpha)} / {root} {config.rank}"
    idle = [] if config is None else config.idle_patterns(lora.modules)
    doubts = [
        *stated.doubts,
        *(Problem("unexpected", key, f"in {field}", "a module of the file") for field, key in idle),
    ]
    if stated.unevaluated and not by_peft:
        return Check(name, "warn", seen, (*doubts, *stated.unevaluated), only_load_tells(lora))
    return judged(name, doubts, seen, seen, status="warn")


def _weight(record: ExportRecord) -> Hint | None:
    """How to load a file whose scale was left out on purpose."""
    if record.scale != "none" or record.alpha is None or record.rank is None:
        return None
    return Hint(f"load it at weight {number(record.alpha / record.rank)}, as it was exported with --scale none")


def check_target_modules(lora: WrittenLora, expected: Expected, by_peft: Mapping[str, float]) -> Check:
    """target_modules names the modules that the file has, and none that the model does not have."""
    name = "target_modules"
    config, stated = lora.stated.config, lora.stated.targets
    if config is None:
        return Check(name, "skipped", "not stated")
    if config.targets is None and not isinstance(stated, str):
        found = None if stated is None else type(stated).__name__
        problem = Problem("missing" if found is None else "invalid", name, found, "a list of the adapted modules")
        return Check(name, "fail", f"{name} is missing" if found is None else f"{name} is no list", (problem,))
    if config.has_expression:
        if by_peft:
            return Check(name, "pass", f"a regular expression that PEFT matches with {counted(len(by_peft), 'module')}")
        seen = "a regular expression: which modules it means, only --load tells"
        return Check(name, "warn", seen, hint=only_load_tells(lora))
    targets = config.targets or frozenset()
    missing = [module for module, layer in lora.modules.items() if not config.is_targeted(module, layer)]
    ends: set[str] = set()
    for key in cogvideox.lora_keys(range(expected.transformer.layers)):
        ends |= path_ends(diffusers.module_path(key))
    idle = [Problem("unexpected", target, expected="a module of the model") for target in sorted(targets - ends)]
    problems = [Problem("missing", module, expected=f"{name} to name it, as the file has it") for module in missing]
    if problems:
        seen = f"{counted(len(missing), 'module')} of the file not named"
        return Check(name, "fail", seen, (*problems, *idle))
    kind = "full paths" if all(map(diffusers.parse_module, targets)) else "ends of paths"
    good = f"{counted(len(targets), 'name')}, {kind}"
    return judged(name, idle, good, f"{good}; {len(idle)} without a module in the model", status="warn")


def check_record(lora: WrittenLora, expected: Expected, found: Mapping[str, float]) -> Check:
    """What the exporter recorded of the file is what the file is: nobody has changed one without the other."""
    name, record = "record", lora.record
    facts: list[str] = []
    problems: list[Problem] = []
    scaling = recorded_scaling(record)
    if scaling is not None and record.alpha is not None and not (record.scale == "none" and lora.stated.is_nothing):
        facts.append(f"alpha {number(record.alpha)} (scale: {record.scale})")
        wrong = [value for value in found.values() if not math.isclose(value, scaling, rel_tol=1e-9)]
        if wrong:
            where = f"scaling {figures(wrong)} in {counted(len(wrong), 'module')}"
            problems.append(Problem("scale", "the stated scale", where, f"scaling {number(scaling)}"))
    rank_found, dtypes = ranks(lora, expected), [tensor.entry.dtype.name for tensor in lora.tensors.values()]
    if record.rank is not None and rank_found:
        facts.append(f"rank {record.rank}")
        if (most := _most_common(rank_found.values())) != record.rank:
            problems.append(Problem("rank", "the rank", str(most), str(record.rank)))
    if record.dtype is not None and dtypes:
        facts.append(record.dtype)
        if (common := Counter(dtypes).most_common(1)[0][0]) != record.dtype:
            problems.append(Problem("dtype", "the dtype", common, record.dtype))
    if not facts:
        return Check(name, "skipped", "the file has no record of an export by cogtools")
    seen = ", ".join(facts)
    return judged(name, problems, f"{seen}, as exported", f"exported with {seen}; the file was changed since")


def recorded_scaling(record: ExportRecord) -> float | None:
    """The scaling that a file should state by its record; None if that does not say."""
    if record.alpha is None or record.rank is None or record.scale not in ("metadata", "fold", "none"):
        return None
    return 1.0 if record.scale == "fold" else record.alpha / record.rank
