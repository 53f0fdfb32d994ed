"""Who loads a LoRA file, and how strong: each program's rules, applied to what is in the file.

A file may be right for one program and do nothing in another, which mostly says nothing about it. What a program does
is worked out from the tables of `layouts/programs.py`; nothing is run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cogtools.conversion import scale as scales
from cogtools.conversion.lora import has_base_weights
from cogtools.formatting import counted, number
from cogtools.layouts.family import LoraKey
from cogtools.layouts.programs import PROGRAMS, TRAPS

if TYPE_CHECKING:
    from cogtools.conversion.lora import Lora
    from cogtools.conversion.scale import Scale, Statement
    from cogtools.layouts.family import Module, Transformer
    from cogtools.layouts.programs import Program, Way

Loads = Literal["yes", "partly", "no"]

MOST_SCALINGS = 10
"""How many different scalings a report lists."""


@dataclass(frozen=True, slots=True)
class Reader:
    """What one program does with a file.

    Attributes:
        program: the program, and the versions of it that this is about.
        format: what `export-lora --format` calls the layout that is made for it.
        loads: whether it loads the LoRA: all of it, some modules, or none.
        modules: how many modules it changes.
        scalings: what it multiplies their updates by at strength 1, each once; the first ones of many.
        ratio: how many times as strong that is as the training; None if it differs by module, or is not known.
        why: the reason, in a few words.
        otherwise: what its users see where it loads nothing; None where it loads something.
        notes: what else its users should know.
    """

    program: str
    format: str
    loads: Loads
    modules: int
    scalings: tuple[float, ...]
    ratio: float | None
    why: str
    otherwise: str | None
    notes: tuple[str, ...]


def readers_of(lora: Lora, scale: Scale | None, transformer: Transformer | None) -> tuple[Reader, ...]:
    """What every program that is known does with a file.

    Args:
        lora: the file.
        scale: what its updates should be multiplied by; None if that cannot be told.
        transformer: the one that it belongs to; None if unknown. Nobody is listed for one that is not a CogVideoX.
    """
    if not lora.tensors or (transformer is not None and transformer.others is not None):
        return ()
    return tuple(_reader(program, lora, scale, transformer) for program in PROGRAMS)


def _reader(program: Program, lora: Lora, scale: Scale | None, transformer: Transformer | None) -> Reader:
    trials = [_Trial(way, program, lora, transformer) for way in program.ways]
    best = max(trials, key=lambda trial: (len(trial.modules), trial.read))  # the first of equals
    as_run = best.scalings()
    loads: Loads = "no" if not best.modules else "yes" if len(best.modules) == len(lora.modules) else "partly"
    trained = {} if scale is None or scale.source == scales.BY_NOTHING else scale.scalings
    ratios = [
        None if not (wanted := trained.get(module)) or value is None else value / wanted
        for module, value in as_run.items()
    ]
    ratio = ratios[0] if ratios and all(_is_close(ratios[0], other) for other in ratios) else None
    known = sorted({value for value in as_run.values() if value is not None})
    return Reader(
        program=program.name,
        format=program.layout.name,
        loads=loads,
        modules=len(best.modules),
        scalings=tuple(known[:MOST_SCALINGS]),
        ratio=1.0 if ratio is not None and _is_close(ratio, 1.0) else ratio,
        why=best.why(),
        otherwise=program.otherwise if loads == "no" else None,
        notes=tuple(_notes(program, best.note if loads != "no" else None, lora, loads, ratio)),
    )


def _is_close(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-6)


def _notes(program: Program, note: str | None, lora: Lora, loads: Loads, ratio: float | None) -> list[str]:
    found = [note] if note is not None else []
    path = str(lora.checkpoint.path).lower()
    found += [
        trap.text
        for trap in TRAPS
        if program.name.startswith(trap.program) and trap.word in path and trap.loads == (loads != "no")
    ]
    if loads != "no" and program.layout.lora_only_note is not None and not has_base_weights(lora.checkpoint):
        found.append("the base weights are not in the file: load them first, or the videos are noise")
    if loads != "no" and ratio is not None and program.strength_step and not _is_close(ratio, 1.0):
        strength = 1 / ratio
        typed = round(strength / program.strength_step) * program.strength_step
        if not _is_close(strength, typed):
            steps = f"its strength has steps of {number(program.strength_step)}"
            found.append(f"strength {number(strength)} would be right, and cannot be set: {steps}")
    return found


class _Trial:
    """What comes of it if a program reads a file in one of its ways.

    Attributes:
        modules: the modules that it changes.
        read: how many tensors it reads by their names.
        note: what its users should know of such a file.
    """

    def __init__(self, way: Way, program: Program, lora: Lora, transformer: Transformer | None) -> None:
        self._way, self._layout, self._lora = way, program.layout, lora
        self.note = way.note
        self._read = {name for name, tensor in lora.tensors.items() if _reads(way, lora, tensor.key)}
        self.read = len(self._read)
        self._refusal = self._whole_file(transformer)
        self.modules = [] if self._refusal else [module for module in lora.modules if self._changes(module)]

    def _changes(self, module: Module) -> bool:
        both = {LoraKey(*module, part) for part in "AB"}
        is_convolution = any(len(self._lora.tensors[name].entry.shape) == 4 for name in both & self._read)
        return both <= self._read and (self._layout.reads_convolutions or not is_convolution)

    def _whole_file(self, transformer: Transformer | None) -> str | None:
        """Why the program loads nothing of the file; None if nothing is in the way but the names of tensors."""
        way, lora, layout = self._way, self._lora, self._layout
        containers = {"safetensors": "safetensors", "torch": "torch.save"}
        if not self._read:
            return f"these are {_whose_names(lora)}"
        if not lora.checkpoint.format.startswith(containers[layout.container]):
            other = "a file of torch.save" if layout.container == "safetensors" else "a safetensors file"
            return f"{other}: it reads {containers[layout.container]} files"
        if layout.is_folder and layout.file_name not in (None, lora.checkpoint.path.name):
            return f"the file is not called {layout.file_name}"
        if way.scale == "adapter_config" and "adapter_config" not in lora.stated:
            return "there is no adapter_config.json beside it"
        if way.wrapper is not None and lora.checkpoint.wrapper != way.wrapper:
            return f"its state dict does not lie under {'.'.join(way.wrapper)!r}"
        foreign = [key for key in lora.foreign if way.refused is not None and way.refused.match(key)]
        if foreign:
            return f"{counted(len(foreign), 'key')} that it does not know, such as {foreign[0]}"
        if way.alphas == "refused" and lora.alphas:
            return f"{counted(len(lora.alphas), 'tensor')} of alphas, which it does not accept"
        lone = [name for name in self._read if name.part in way.lone and name.partner not in self._read]
        if lone:
            return f"{counted(len(lone), 'factor')} without the other"
        unknown = len(lora.tensors) - len(self._read) + len(lora.unplaced)
        if way.whole and unknown:
            return f"{counted(unknown, 'tensor')} that it does not know"
        if layout.only_size is not None and transformer is not None and transformer[:2] != layout.only_size:
            layers, hidden = layout.only_size
            return f"it has {layers} layers of hidden size {hidden} only"
        return None

    def scalings(self) -> dict[Module, float | None]:
        """What the modules' updates are multiplied by."""
        statement = self._statement()
        return {module: statement.scalings.get(module) if statement is not None else None for module in self.modules}

    def _statement(self) -> Statement | None:
        own = self._lora.statements().get(self._way.scale)
        return own if own is not None else scales.by_reader(self._layout, self._lora.factors)

    def why(self) -> str:
        """The reason for what it does."""
        if self._refusal is not None:
            return self._refusal
        facts = [f"{counted(len(self.modules), 'module')} of {len(self._lora.modules)}"]
        left = {name.part for name in self._lora.tensors} - set(self._layout.parts)
        if left:
            facts.append(f"without the {' and '.join(sorted(left))} of each")
        statement = self._lora.statements().get(self._way.scale)
        place = {"header": "the header", "adapter_config": "adapter_config.json", "alpha_tensors": "the alpha tensors"}
        if self._way.scale in place:
            facts.append(f"the scale from {place[self._way.scale]}" if statement is not None else "no scale is stated")
        elif self._way.scale == "nowhere":
            facts.append("it reads no scale")
        return ", ".join(facts)


def _reads(way: Way, lora: Lora, key: str) -> bool:
    """Whether a way reads this very key."""
    reading = lora.reading(key)
    if reading is None or reading.spelling not in way.spellings:
        return False
    written = reading.spelling.key(reading.name)
    return written == key or (way.without_weight and written == f"{key}.weight")


def _whose_names(lora: Lora) -> str:
    if lora.names is None:
        return "names of no program that is known"
    spelling = lora.names.spelling
    reading = next((found for found in lora.names.readings.values() if found.spelling == spelling), None)
    return spelling.names.title if reading is None else reading.oddity
