"""The checks that need a file's header only: names, shapes, ranks, dtypes, and what it states of its scale.

Some of what a file states, only PEFT can interpret. The checks of that take the modules that PEFT adapted when it
loaded the file, and their scalings: {} where it was not asked, or did not load the file as the file says.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from cogtools.checkpoint.formats import safetensors
from cogtools.conversion.adapter_config import path_ends
from cogtools.conversion.lora import find_other_adapter
from cogtools.conversion.options import format_words
from cogtools.conversion.plan import FLOATS
from cogtools.conversion.scale import BY_NOTHING
from cogtools.errors import Hint, Problem, command
from cogtools.formatting import counted, number
from cogtools.layouts import diffusers
from cogtools.layouts.family import ATTENTION, LoraKey, rank_of
from cogtools.layouts.folded import fold_names
from cogtools.layouts.lora import other_adapter
from cogtools.verification.expected import stated_of
from cogtools.verification.hints import only_load_tells
from cogtools.verification.report import Check, folded, judged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cogtools.conversion.adapter_config import AdapterConfig
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import Module
    from cogtools.layouts.lora import OtherAdapter
    from cogtools.verification.expected import Expected

SHOWN_FIGURES = 10

_NO_TENSORS = "no tensors"


def check_readable(lora: Lora) -> Check:
    """Always passes: a file that could not be opened has no checks."""
    tensors = counted(len(lora.checkpoint.tensors), "tensor")
    is_safetensors = lora.checkpoint.format == safetensors.FORMAT
    return Check("readable", "pass", tensors + (", the safetensors library reads it too" if is_safetensors else ""))


def misnamed(lora: Lora) -> dict[str, LoraKey]:
    """The keys of the LoRA's tensors that its program does not read by these names."""
    found = {}
    for name, tensor in lora.tensors.items():
        reading = lora.reading(tensor.key)
        if reading is None or not reading.is_exact or not lora.intended.reads(reading.spelling):
            found[tensor.key] = name
    return found


def check_names(lora: Lora, expected: Expected) -> Check:
    """Every key, and the file itself, has the name that the program that is to load it looks for."""
    transformer, layout = expected.transformer, lora.intended
    if not lora.checkpoint.tensors:
        return Check("names", "fail", "the file has no tensor", hint=_look(lora))
    other = _other_adapter(lora)
    if other is not None:
        return Check("names", "fail", f"this is {other.name}, not a LoRA", hint=Hint(f"load it with {other.readers}"))
    beyond = [name for name in lora.tensors if name.layer is not None and name.layer >= transformer.layers]
    unknown_modules = [name for name in lora.tensors if name.layer is None and not transformer.has(name.module)]
    odd = misnamed(lora)
    problems = [
        *_wrong_file_name(lora),
        *_misnamed(lora, odd),
        *_unknown(lora),
        *lora.problems("unexpected", beyond, expected=f"layers 0-{transformer.layers - 1}"),
        *lora.problems("unexpected", unknown_modules, expected=f"a module of {transformer.name}"),
    ]
    good = f"all are {layout.title}" if layout.reader != "PEFT" else "all are PEFT's names"
    if lora.base_weights:
        good += f"; {counted(len(lora.base_weights), 'base weight')} among them, which {layout.reader} loads too"
    bad = _bad_names(lora, odd, len(beyond) + len(unknown_modules))
    return judged("names", problems, good, bad, hint=_who_reads_them(lora, odd))


def _other_adapter(lora: Lora) -> OtherAdapter | None:
    """The kind of adapter that the file has in place of a LoRA; None if it is not known."""
    return find_other_adapter(lora.checkpoint) if not lora.tensors else None


def _wrong_file_name(lora: Lora) -> list[Problem]:
    """The file itself, if its program does not find it by its name, or reads other kinds of files only."""
    layout, name = lora.intended, lora.checkpoint.path.name
    if _has_wrong_container(lora):
        expected = f"a file of torch.save: {layout.reader} reads no other"
        return [Problem("unexpected", name, found=lora.checkpoint.format, expected=expected)]
    if not layout.is_folder or name == layout.file_name:
        return []
    return [Problem("unexpected", name, expected=f"{layout.file_name}: {layout.reader} reads no other file")]


def _has_wrong_container(lora: Lora) -> bool:
    return lora.intended.container == "torch" and lora.checkpoint.format == safetensors.FORMAT


def _misnamed(lora: Lora, odd: Mapping[str, LoraKey]) -> list[Problem]:
    alike: dict[str, list[str]] = {}
    for key in odd:
        reading = lora.reading(key)
        alike.setdefault("unknown names" if reading is None else reading.oddity, []).append(key)
    return [
        Problem(
            "unexpected", keys[0], f"{what}, {counted(len(keys), 'key')}", lora.intended.key(odd[keys[0]]), tuple(keys)
        )
        for what, keys in alike.items()
    ]


def _unknown(lora: Lora) -> list[Problem]:
    """Keys that mean nothing, those that differ in the layer and the module only in one line."""
    layout = lora.intended
    # A program that loads whole models finds its base weights there.
    known = set(lora.base_weights if layout.lora_only_note is None else lora.foreign)
    unknown = [key for key in lora.foreign if key not in known]
    unknown = [key for key in unknown if (kind := other_adapter(key)) is None or kind.readers != layout.reader]
    if layout.scale != "alpha_tensors" and not layout.ignores_alphas:
        unknown = [*unknown, *(tensor.key for tensor in lora.alphas.values())]
    alike: dict[tuple[str, str], list[str]] = {}
    for key in unknown:
        beginning = key[: next((index for index, char in enumerate(key) if char.isdecimal()), len(key))]
        alike.setdefault((beginning, key.rpartition(".")[2]), []).append(key)
    example = f"keys such as {layout.key(LoraKey(0, 'q', 'A'))}"
    problems = []
    for (_, end), keys in alike.items():
        what = f"{len(keys):,} keys alike" if len(keys) > 1 else None
        if end == "alpha":
            what = f"{counted(len(keys), 'tensor')} that hold{'s' if len(keys) == 1 else ''} an alpha"
        problems.append(Problem("unexpected", keys[0], what, example, tuple(keys)))
    return problems


def _bad_names(lora: Lora, odd: Mapping[str, LoraKey], beyond: int) -> str:
    layout = lora.intended
    unknown = sum(len(problem.keys) for problem in _unknown(lora))
    if odd and len(odd) == len(lora.tensors):
        kinds = sorted({"unknown names" if (reading := lora.reading(key)) is None else reading.oddity for key in odd})
        return f"these are {' and '.join(kinds)}: {layout.reader} would load none of them"
    wrong = len(odd) + unknown + beyond
    if not wrong and _has_wrong_container(lora):
        return f"{layout.reader} reads no safetensors files"
    if not wrong:
        return f"the file is not called {layout.file_name}"
    return f"{counted(wrong, 'key')} of {len(lora.checkpoint.tensors)} with no place in the model"


def _who_reads_them(lora: Lora, odd: Mapping[str, LoraKey]) -> Hint:
    """What can be done with a file whose names are another program's."""
    layout, path = lora.intended, lora.checkpoint.path
    if not lora.tensors:
        return _look(lora)
    again = command("export-lora", path, "OUT_DIR", *format_words(layout), advice=f"for {layout.reader}")
    if not odd and _has_wrong_container(lora):
        return again
    if not odd:
        return Hint(f"name it {layout.file_name}") if _wrong_file_name(lora) else _look(lora)
    readers = {None if (reading := lora.reading(key)) is None else reading.layout for key in odd}
    (reader, *others) = readers
    if reader is None or others or len(odd) < len(lora.tensors) or reader.reader == "SAT":
        return again
    return replace(again, advice=f"load it with {reader.reader}; {again.advice}")


def _look(lora: Lora) -> Hint:
    return command("inspect", lora.checkpoint.path, advice="to see what the file holds")


def check_complete(lora: Lora, expected: Expected) -> Check:
    """Every tensor is there that the file states, and each kind of module that occurs is in every layer."""
    name = "complete"
    if not expected.names or not lora.tensors:
        other = _other_adapter(lora)
        seen = "no LoRA tensor at all" if other is None else f"no LoRA tensor: this is {other.name}"
        return Check(name, "fail", seen, hint=_why_nothing(lora))
    there = len(expected.names & lora.tensors.keys())
    seen = f"{there} of {len(expected.names)} tensors of {expected.transformer.name}"
    if expected.known_by is not None:
        seen += f", as {expected.known_by} says"
    kinds = {(key.name, key.part) for key in expected.names if key.layer is not None}
    if expected.partial:
        seen += f"; target_modules states {'; '.join(fold_names(expected.names, kinds)[:3])}"
    lacking = sorted(expected.names - lora.tensors.keys(), key=lambda key: key.order)
    problems = tuple(lora.problems("missing", lacking, every=kinds))
    if problems and not expected.is_certain:
        seen += "; it names its modules by a regular expression, and which it matches, only --load tells"
        return Check(name, "warn", seen, problems, only_load_tells(lora))
    if problems:
        return Check(name, "fail", seen, problems)
    if expected.known_by is None:
        seen += f"; nothing tells how many layers the model has: taken to be {expected.transformer.layers}"
        return Check(name, "warn", seen, hint=Hint("state it with --model or --layers"))
    return Check(name, "pass", seen)


def _why_nothing(lora: Lora) -> Hint:
    """What may have emptied a file, and what to do."""
    other = _other_adapter(lora)
    if other is not None:
        return Hint(f"load it with {other.readers}")
    if lora.checkpoint.tensors:
        return _look(lora)
    return Hint(
        "a ZeRO-3 training that saves before its parameters are gathered writes no tensors: gather them when saving "
        "(stage3_gather_16bit_weights_on_model_save), or make the weights with DeepSpeed's zero_to_fp32.py"
    )


def check_pairs(lora: Lora) -> Check:
    """Every lora_A has its lora_B."""
    factors = [name for name in lora.tensors if name.part in ("A", "B")]
    if not factors:
        return Check("pairs", "skipped", _NO_TENSORS)
    unpaired = [name for name in factors if name.partner not in lora.tensors]
    problems = lora.problems("unpaired", unpaired, expected="its partner beside it")
    pairs = (len(factors) - len(unpaired)) // 2
    return judged("pairs", problems, counted(pairs, "pair"), f"{counted(len(unpaired), 'tensor')} without a partner")


def check_shapes(lora: Lora, expected: Expected) -> Check:
    """lora_A is (rank, in) and lora_B (out, rank), with the sizes of the transformer's modules."""
    if not lora.tensors:
        return Check("shapes", "skipped", _NO_TENSORS)
    ranks_found = lora.ranks
    wrong = []
    for name, (key, entry) in lora.tensors.items():
        rank = rank_of(name, entry.shape) or ranks_found.get(name.module, 0)
        shape = expected.transformer.lora_shape(name, rank)
        if shape is None:  # the patch embedding, which may be a convolution
            fits = len(entry.shape) in (2, 4)
        else:
            fits = len(shape) == len(entry.shape) and all(
                wanted in (None, size) for size, wanted in zip(entry.shape, shape, strict=True)
            )
        if not fits or rank <= 0:
            wrong.append((name, Problem("shape", key, str(entry.shape), _shape_text(expected, name))))
    hidden = expected.transformer.hidden
    good = f"(rank, {hidden}) and ({hidden}, rank)"
    if not hidden:
        good = "lora_A (rank, in) and lora_B (out, rank)"
    elif any(name.name not in ATTENTION for name in lora.tensors):
        good = f"lora_A (rank, in) and lora_B (out, rank) of modules of hidden size {hidden}"
    return judged("shapes", folded(wrong), good, f"{counted(len(wrong), 'tensor')} with a shape that does not fit")


def _shape_text(expected: Expected, name: LoraKey) -> str:
    inputs, outputs = expected.transformer.features(name.name)
    shapes = {"A": ("rank", inputs), "B": (outputs, "rank")}.get(name.part, (outputs,))
    return "(" + ", ".join("any" if size is None else str(size) for size in shapes) + ("," * (len(shapes) == 1)) + ")"


def ranks(lora: Lora, expected: Expected) -> dict[LoraKey, int]:
    """The rank of every factor that has one: of those whose other side is as the transformer's module has it."""
    found = {}
    for name, tensor in lora.tensors.items():
        rank = rank_of(name, tensor.entry.shape)
        if rank is None:
            continue
        shape = expected.transformer.lora_shape(name, rank)
        if shape is None or all(
            wanted in (None, size) for size, wanted in zip(tensor.entry.shape, shape, strict=False)
        ):
            found[name] = rank
    return found


def check_rank(lora: Lora, expected: Expected, by_peft: Mapping[Module, float]) -> Check:
    """For every module the rank that the file states for it; if it states none, one rank throughout."""
    found = ranks(lora, expected)
    if not found:
        return Check("rank", "skipped", "no tensor of two dimensions")
    stated = stated_of(lora)
    config = None if stated is None else stated.config
    seen = ", ".join(map(str, sorted(set(found.values()))[:SHOWN_FIGURES]))
    if config is not None and config.rank_pattern is None:
        if by_peft:
            return Check("rank", "pass", f"{seen}, as PEFT reads rank_pattern")
        seen += "; rank_pattern is a regular expression: which modules it matches, only --load tells"
        return Check("rank", "warn", seen, hint=only_load_tells(lora))
    by_module = lora.ranks
    wrong = []
    for name, rank in found.items():
        wanted = config.rank_of(name.module) if config is not None else None
        if rank != (wanted or by_module[name.module]):
            why = "as the file states" if wanted else "as its partner has"
            problem = Problem("rank", lora.key(name), str(rank), f"{wanted or by_module[name.module]}, {why}")
            wrong.append((name, problem))
    if wrong:
        return Check(
            "rank", "fail", f"{seen}: not what {'the file states' if config else 'a LoRA has'}", tuple(folded(wrong))
        )
    if len(set(found.values())) == 1:
        return Check("rank", "pass", f"{seen} throughout")
    if config is None and lora.intended.scale == "header":
        hint = Hint("state the scale in the file: releases of diffusers before August 2026 run some modules at another "
                    "scaling where ranks differ and nothing states it")  # fmt: skip
        return Check("rank", "warn", f"{seen}, and nothing states which module has which", hint=hint)
    return Check("rank", "pass", f"{seen}, as {'rank_pattern states' if config else 'modules have them'}")


def _most_common(values: Iterable[int]) -> int:
    return Counter(values).most_common(1)[0][0]


def check_dtype(lora: Lora) -> Check:
    """One dtype throughout, of floating-point numbers."""
    dtypes = Counter(tensor.entry.dtype.name for tensor in lora.tensors.values())
    if not dtypes:
        return Check("dtype", "skipped", "no tensors")
    common, _ = dtypes.most_common(1)[0]
    # diffusers and PEFT cast what they load to the dtype of the model: measured with float8_e4m3fn.
    is_cast = common.startswith("float8") and lora.intended.library is not None
    wanted = common if is_cast or common in FLOATS else "one of " + ", ".join(FLOATS)
    wrong = [
        (name, Problem("dtype", tensor.key, tensor.entry.dtype.name, wanted))
        for name, tensor in lora.tensors.items()
        if tensor.entry.dtype.name != wanted
    ]
    bad = ", ".join(f"{name} in {counted(count, 'tensor')}" for name, count in dtypes.items())
    good = f"{common}, which {lora.intended.reader} casts to the dtype of the model" if is_cast else common
    return judged("dtype", folded(wrong), good, bad)


def scalings(lora: Lora) -> dict[Module, float]:
    """What every module's lora_B @ lora_A is multiplied by when its program loads the file, as far as it states it."""
    statement = lora.scaling_as_run(lora.intended)
    if statement is None or (statement.source == BY_NOTHING and stated_of(lora) is not None):
        return {}
    return {module: scaling for module, scaling in statement.scalings.items() if scaling is not None}


def figures(values: Iterable[float]) -> str:
    """Some different numbers, the first ones of many."""
    return ", ".join(number(value) for value in sorted(set(values))[:SHOWN_FIGURES])


def check_scale(lora: Lora, found: Mapping[Module, float], by_peft: Mapping[Module, float]) -> Check:
    """The scale is stated, where and how the program that loads the file reads it, and was not assumed."""
    check = _check_stated_scale(lora, found, by_peft)
    if check.status != "pass" or lora.record.alpha_source != BY_NOTHING:
        return check
    problem = Problem("scale", "what it was made of states no scale", "1, assumed", "the training's alpha / rank")
    hint = command(
        "export-lora", lora.checkpoint.path, "OUT_DIR", *format_words(lora.intended), "--alpha", "A",
        advice="if you know the training's alpha",
    )  # fmt: skip
    return Check(check.name, "warn", check.seen, (problem,), hint)


def _check_stated_scale(lora: Lora, found: Mapping[Module, float], by_peft: Mapping[Module, float]) -> Check:
    name = "scale"
    if not lora.tensors:
        return Check(name, "skipped", _NO_TENSORS)
    stated = stated_of(lora)
    if stated is None or stated.is_nothing:
        return _scale_without_config(lora, found)
    problems = [*stated.problems, *_parts_that_differ(lora, stated.config)]
    if problems:
        return Check(
            name, "fail", "what the file states does not work", (*problems, *stated.doubts), _cure(problems, lora)
        )
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
    unknown = [problem for problem in doubts if problem.kind == "unreadable"]
    if (stated.unevaluated or unknown) and not by_peft:
        return Check(name, "warn", seen, (*doubts, *stated.unevaluated), only_load_tells(lora))
    return judged(name, [doubt for doubt in doubts if doubt not in unknown], seen, seen, status="warn")


def _scale_without_config(lora: Lora, found: Mapping[Module, float]) -> Check:
    """The scale of a file that has no LoraConfig where its program looks for one, if it looks for one at all."""
    layout = lora.intended
    if layout.unstated_scaling is None:
        return Check("scale", "fail", f"there is no adapter_config.json, without which {layout.reader} loads nothing")
    statement = lora.statements().get(layout.scale)
    if statement is not None:
        where = f" in {counted(len(lora.alphas), 'tensor')}" if lora.alphas else ""
        alpha = f": alpha {number(statement.alpha)}{where}" if statement.alpha else ""
        return Check("scale", "pass", f"scaling {figures(found.values())}{alpha}")
    if lora.record.scale == "fold":
        seen = f"{layout.reader} runs it at scaling {figures(found.values())}: the training's is multiplied in"
        return Check("scale", "pass", f"{seen}, as its record says")
    if layout.unstated_alpha is not None:
        default = f"its default alpha, {number(layout.unstated_alpha)}"
        return Check("scale", "pass", f"{layout.reader} runs it at scaling {figures(found.values())}: {default}")
    if layout.scale == "nowhere":
        return Check("scale", "pass", f"{layout.reader} reads no scale: it runs the file at scaling 1")
    where = {"header": diffusers.METADATA_KEY, "alpha_tensors": "alpha tensors"}.get(layout.scale, layout.scale)
    seen = f"not stated: {layout.reader} runs it at scaling {number(layout.unstated_scaling)}"
    return Check("scale", "warn", seen, (Problem("missing", where),), _weight(lora))


def _parts_that_differ(lora: Lora, config: AdapterConfig | None) -> list[Problem]:
    """Fields that ask for tensors which the file lacks, or do not ask for those that it has."""
    if config is None or not lora.tensors:
        return []
    problems = []
    for field, part, what in (
        ("use_dora", "magnitude", "magnitude vectors"),
        ("lora_bias", "bias", "biases of lora_B"),
    ):
        has = any(key.part == part for key in lora.tensors)
        asks = bool(config.fields.get(field))
        if has != asks and (field in config.fields or has):
            found = "true" if asks else "false" if field in config.fields else "not stated"
            problems.append(
                Problem("invalid", field, found, f"{str(has).lower()}: the file has {'' if has else 'no '}{what}")
            )
    return problems


def _cure(problems: Iterable[Problem], lora: Lora) -> Hint | None:
    """What helps against dropout that is stated in a header; None if that is not what is wrong."""
    if all(problem.subject != "lora_dropout" for problem in problems):
        return None
    return command(
        "export-lora", lora.checkpoint.path, "OUT_DIR",
        advice="load it and call pipe.transformer.eval(), or write it without dropout",
    )  # fmt: skip


def _weight(lora: Lora) -> Hint:
    """How to load a file that does not state its scale, and how to make one of it that does."""
    record, path = lora.record, lora.checkpoint.path
    rank = next(iter(lora.ranks.values()), 0)
    recorded = record.scaling_of(rank) if record.scale == "none" else None
    if recorded is not None:
        return Hint(f"load it at weight {number(recorded)}, as it was exported with --scale none")
    if len(set(lora.ranks.values())) > 1:  # not of SAT
        return command(
            "export-lora", path, "OUT_DIR", "--format", lora.intended.name, "--scaling", "1",
            advice="if it was trained at scaling 1, write a file that states it",
        )  # fmt: skip
    weight = number(1 / rank) if rank else "1 / rank"
    return command(
        "export-lora", path, "OUT_DIR", *format_words(lora.intended), "--alpha", "1",
        advice=f"load it at weight alpha / rank ({weight} for SAT's default alpha, 1); to write a file that states it",
    )  # fmt: skip


def check_target_modules(lora: Lora, expected: Expected, by_peft: Mapping[Module, float]) -> Check:
    """target_modules names the modules that the file has, and none that the model does not have."""
    name = "target_modules"
    held = stated_of(lora)
    config = None if held is None else held.config
    if held is None or config is None:
        return Check(name, "skipped", "not stated")
    if not lora.tensors:
        return Check(name, "skipped", _NO_TENSORS)
    stated = held.targets
    if config.targets is None and not isinstance(stated, str):
        found = None if stated is None else type(stated).__name__
        problem = Problem("missing" if found is None else "invalid", name, found, "a list of the adapted modules")
        return Check(name, "fail", f"{name} is missing" if found is None else f"{name} is not a list", (problem,))
    if config.has_expression:
        if by_peft:
            return Check(name, "pass", f"a regular expression that PEFT matches with {counted(len(by_peft), 'module')}")
        seen = "a regular expression: which modules it matches, only --load tells"
        return Check(name, "warn", seen, hint=only_load_tells(lora))
    targets = config.targets or frozenset()
    missing = [module for module in lora.modules if not config.is_targeted(module)]
    ends: set[str] = set()
    for module in expected.transformer.modules:
        ends |= path_ends(diffusers.module_path(module))
    idle = [Problem("unexpected", target, expected="a module of the model") for target in sorted(targets - ends)]
    problems = [
        Problem("missing", diffusers.module_path(module), expected=f"{name} to name it, as the file has it")
        for module in missing
    ]
    if problems:
        seen = f"{counted(len(missing), 'module')} of the file not named"
        return Check(name, "fail", seen, (*problems, *idle))
    kind = "full paths" if all(map(diffusers.parse_module, targets)) else "ends of paths"
    good = f"{counted(len(targets), 'name')}, {kind}"
    return judged(name, idle, good, f"{good}; {len(idle)} without a module in the model", status="warn")


def check_record(lora: Lora, expected: Expected, found: Mapping[Module, float]) -> Check:
    """What the exporter recorded of the file is what the file is: nobody has changed one without the other."""
    name, record = "record", lora.record
    facts: list[str] = []
    problems: list[Problem] = []
    wanted = recorded_scalings(lora)
    stated = stated_of(lora)
    is_nothing = stated is None or stated.is_nothing
    is_for_another = record.format not in (None, lora.intended.name)  # which reads its scale elsewhere
    if wanted and not is_for_another and not (record.scale == "none" and is_nothing):
        value = record.alpha if record.alpha is not None else record.scaling
        if value is not None:
            kind = "alpha" if record.alpha is not None else "scaling"
            facts.append(f"{kind} {number(value)} (scale: {record.scale})")
        wrong = {
            module: scaling
            for module, scaling in found.items()
            if module in wanted and not math.isclose(scaling, wanted[module], rel_tol=1e-6)
        }
        if wrong:
            where = f"scaling {figures(wrong.values())} in {counted(len(wrong), 'module')}"
            due = figures(wanted[module] for module in wrong)
            problems.append(Problem("scale", "the stated scale", where, f"scaling {due}"))
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


def recorded_scalings(lora: Lora) -> dict[Module, float]:
    """The scaling that each module of a file should have by its record, as far as that tells."""
    record, layout = lora.record, lora.intended
    found: dict[Module, float] = {}
    if record.scale not in ("metadata", "fold", "none"):
        return found
    for module, rank in lora.ranks.items():
        scaling = record.scaling_of(record.rank or rank)
        if scaling is not None and rank:
            found[module] = (layout.scaling_unstated(rank) or 1.0) if record.scale == "fold" else scaling
    return found
