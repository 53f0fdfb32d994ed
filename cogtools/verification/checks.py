"""The checks that need a file's header only: names, shapes, ranks, dtypes, and what it states of its scale."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cogtools.errors import Problem
from cogtools.layouts import cogvideox, diffusers
from cogtools.layouts.cogvideox import LoraKey
from cogtools.layouts.naming import DIFFUSERS
from cogtools.planning import FLOATS
from cogtools.verification.result import Check, judged
from cogtools.words import counted, fold_names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.verification.expected import Expected
    from cogtools.verification.written import WrittenLora

SHOWN_FIGURES = 10


def header_checks(lora: WrittenLora, expected: Expected) -> list[Check]:
    """All checks that need no values."""
    return [
        check_names(lora, expected),
        check_complete(lora, expected),
        check_pairs(lora),
        check_shapes(lora, expected),
        check_rank(lora, expected),
        check_dtype(lora),
        check_scale(lora),
        check_target_modules(lora, expected),
    ]


def check_names(lora: WrittenLora, expected: Expected) -> Check:
    """Every key names a tensor of the LoRA, in the words of the program that is to load it."""
    reader = lora.naming.reader
    problems = []
    for odd, count in Counter(lora.misnamed.values()).items():
        first = next(key for key, what in lora.misnamed.items() if what == odd)
        problems.append(Problem("unexpected", first, f"{odd}, {counted(count, 'key')}", _should_be(lora, first)))
    problems += [
        Problem("unexpected", key, expected=f"keys such as {lora.naming.key(LoraKey(0, 'q', 'A'))}")
        for key in lora.unknown
    ]
    layers = expected.transformer.layers
    beyond = [name for name in lora.tensors if name.layer >= layers]
    problems += [Problem("unexpected", text, expected=f"layers 0-{layers - 1}") for text in fold_names(beyond)]
    good = f"all are {lora.naming.name}' names" if lora.naming is DIFFUSERS else f"all are {lora.naming.name}'s names"
    return judged("names", problems, good, _bad_names(lora, reader, len(beyond)))


def _bad_names(lora: WrittenLora, reader: str, beyond: int) -> str:
    kinds = sorted(set(lora.misnamed.values()))
    if lora.misnamed and len(lora.misnamed) == len(lora.tensors):
        return f"these are {' and '.join(kinds)}: {reader} would load none of them"
    wrong = len(lora.misnamed) + len(lora.unknown) + beyond
    return f"{counted(wrong, 'key')} of {len(lora.file.tensors)} with no place in the model"


def _should_be(lora: WrittenLora, key: str) -> str:
    return next(lora.naming.key(name) for name, tensor in lora.tensors.items() if tensor.key == key)


def check_complete(lora: WrittenLora, expected: Expected) -> Check:
    """Every tensor is there that the transformer, or the file's own target_modules, asks for."""
    there = len(expected.names & lora.tensors.keys())
    seen = f"{there} of {len(expected.names)} tensors of {expected.transformer.name}"
    if not expected.names:
        return Check("complete", "fail", "no LoRA tensor at all")
    if expected.known_by is not None:
        seen += f", as {expected.known_by} says"
    if expected.partial:
        seen += f"; target_modules states {'; '.join(fold_names(expected.names)[:3])}"
    problems = [Problem("missing", text) for text in fold_names(expected.names - lora.tensors.keys())]
    if problems:
        return Check("complete", "fail", seen, tuple(problems))
    if expected.known_by is None:
        doubt = f"nothing tells how many layers the model has: taken to be {expected.transformer.layers}"
        return Check("complete", "warn", f"{seen}; {doubt} (--model or --layers says it)")
    return Check("complete", "pass", seen)


def check_pairs(lora: WrittenLora) -> Check:
    """Every lora_A has its lora_B."""
    lone = [name for name in lora.tensors if _partner(name) not in lora.tensors]
    problems = [Problem("alone", text, expected="its partner beside it") for text in fold_names(lone)]
    pairs = (len(lora.tensors) - len(lone)) // 2
    return judged("pairs", problems, counted(pairs, "pair"), f"{counted(len(lone), 'tensor')} without a partner")


def _partner(name: LoraKey) -> LoraKey:
    return name._replace(factor="B" if name.factor == "A" else "A")


def check_shapes(lora: WrittenLora, expected: Expected) -> Check:
    """lora_A is (rank, hidden) and lora_B (hidden, rank), with the transformer's hidden size."""
    hidden = expected.transformer.hidden
    problems = []
    for name, tensor in lora.tensors.items():
        shape = tensor.entry.shape
        rank = cogvideox.rank_of(name.factor, shape) if len(shape) == 2 else 0
        if not rank or rank > hidden or shape != cogvideox.lora_shape(name.factor, rank, hidden):
            wanted = f"(rank, {hidden})" if name.factor == "A" else f"({hidden}, rank)"
            problems.append(Problem("shape", tensor.key, str(shape), wanted))
    good = f"(rank, {hidden}) and ({hidden}, rank)"
    return judged("shapes", problems, good, f"{counted(len(problems), 'tensor')} with a shape that does not fit")


def ranks(lora: WrittenLora) -> Iterator[tuple[LoraKey, int]]:
    """The rank of every tensor that has one."""
    for name, tensor in lora.tensors.items():
        if len(tensor.entry.shape) == 2:
            yield name, cogvideox.rank_of(name.factor, tensor.entry.shape)


def check_rank(lora: WrittenLora, expected: Expected) -> Check:
    """One rank throughout, or for every module the one that the file states for it."""
    found = {name: rank for name, rank in ranks(lora) if _is_whole(lora, name, expected)}
    if not found:
        return Check("rank", "skipped", "no tensor of two dimensions")
    common, _ = Counter(found.values()).most_common(1)[0]
    config = lora.stated.config
    problems = []
    for name, rank in found.items():
        wanted = config.rank_of(diffusers.module_path(name)) if config is not None else None
        if rank != (wanted or common):
            why = "as the file states" if wanted else "as most have"
            problems.append(Problem("rank", lora.tensors[name].key, str(rank), f"{wanted or common}, {why}"))
    seen = ", ".join(map(str, sorted(set(found.values()))[:SHOWN_FIGURES]))
    good = f"{seen} throughout" if len(set(found.values())) == 1 else f"{seen}, as rank_pattern states"
    return judged("rank", problems, good, f"{seen}: not what {'the file states' if config else 'one LoRA has'}")


def _is_whole(lora: WrittenLora, name: LoraKey, expected: Expected) -> bool:
    """Whether the side of a tensor that is not its rank has the hidden size; if not, its shape is at fault."""
    shape = lora.tensors[name].entry.shape
    return (shape[1] if name.factor == "A" else shape[0]) == expected.transformer.hidden


def check_dtype(lora: WrittenLora) -> Check:
    """One dtype throughout, of floating-point numbers."""
    dtypes = Counter(tensor.entry.dtype.name for tensor in lora.tensors.values())
    if not dtypes:
        return Check("dtype", "skipped", "no tensors")
    common, _ = dtypes.most_common(1)[0]
    problems = [
        Problem(
            "dtype", tensor.key, tensor.entry.dtype.name, common if common in FLOATS else "one of " + ", ".join(FLOATS)
        )
        for tensor in lora.tensors.values()
        if tensor.entry.dtype.name != common or common not in FLOATS
    ]
    bad = ", ".join(f"{name} in {counted(count, 'tensor')}" for name, count in dtypes.items())
    return judged("dtype", problems, common, bad)


def scalings(lora: WrittenLora) -> dict[str, float]:
    """What every module's lora_B @ lora_A is multiplied by when it is loaded, as far as that can be told."""
    found = {module: lora.stated.scaling_of(module) for module in lora.modules}
    return {module: scaling for module, scaling in found.items() if scaling is not None}


def check_scale(lora: WrittenLora) -> Check:
    """The scale is stated, where and how the program that loads the file reads it."""
    if lora.stated.is_nothing:
        if lora.naming is DIFFUSERS:
            seen = "not stated: diffusers runs it at scaling 1.0"
            return Check("scale", "warn", seen, (Problem("missing", diffusers.ADAPTER_METADATA_KEY),))
        return Check("scale", "fail", "there is no adapter_config.json, without which PEFT loads nothing")
    if lora.stated.problems:
        return Check(
            "scale", "fail", "what the file states cannot be used", (*lora.stated.problems, *lora.stated.doubts)
        )
    found = scalings(lora)
    distinct = sorted(set(found.values()))
    seen = "scaling " + ", ".join(f"{scaling:.10g}" for scaling in distinct[:SHOWN_FIGURES]) if found else "stated"
    config = lora.stated.config
    if config is not None and len(distinct) == 1 and not config.rank_pattern and not config.alpha_pattern:
        root = "sqrt(rank)" if config.rank_stabilised else "rank"
        seen += f": alpha {config.alpha:.10g} / {root} {config.rank}"
    doubts = list(lora.stated.doubts)
    if len(distinct) > 1:
        common, _ = Counter(found.values()).most_common(1)[0]
        doubts += [
            Problem("scale", module, f"scaling {scaling:.10g}", f"{common:.10g}, as most have")
            for module, scaling in found.items()
            if scaling != common
        ]
    return judged("scale", doubts, seen, seen, status="warn")


def check_target_modules(lora: WrittenLora, expected: Expected) -> Check:
    """target_modules names the modules that the file has, and none that the model has not."""
    name = "target_modules"
    if lora.stated.config is None:
        return Check(name, "skipped", "not stated")
    targets = lora.stated.config.targets
    if targets is None and isinstance(lora.stated.targets, str):
        doubt = Problem("unreadable", name, lora.stated.targets[:80], "a list")
        return Check(name, "warn", "one pattern for all modules: what it means, only --load tells", (doubt,))
    if targets is None:
        found = None if lora.stated.targets is None else type(lora.stated.targets).__name__
        problem = Problem("missing" if found is None else "wrong", name, found, "a list of the adapted modules")
        return Check(name, "fail", f"{name} is missing" if found is None else f"{name} is no list", (problem,))
    all_modules = {diffusers.module_path(key) for key in cogvideox.lora_keys(range(expected.transformer.layers))}
    missing = [module for module, layer in lora.modules.items() if not lora.stated.config.is_targeted(module, layer)]
    ends = {".".join(path.split(".")[first:]) for path in all_modules for first in range(path.count(".") + 1)}
    nowhere = sorted(targets - ends)
    problems = [Problem("missing", module, expected=f"{name} to name it, as the file has it") for module in missing]
    problems += [Problem("unexpected", target, expected="a module of the model") for target in nowhere]
    good = "full paths" if all(map(diffusers.parse_module, targets)) else "ends of paths"
    bad = f"{counted(len(missing), 'module')} not named, {len(nowhere)} named that the model has not"
    return judged(name, problems, f"{counted(len(targets), 'name')}, {good}", bad)
